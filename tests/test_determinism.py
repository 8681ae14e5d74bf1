"""The same recipe gives the same student, bit for bit."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.conftest import Counted, Toy
from tests.test_step_speed import batches_of, take_steps, toy_recipe, trainer_of
from tests.warm import launch

SHORT = ("train.epochs=1", "train.max_steps=4", "data.augment.rand_augment={}")
AREA = "student.attention={kind: area, max_area: [2, 1], blocks: [0, 1], key_mode: max, top_k: 3}"

SWITCH = "train.deterministic=true"

# Processes and overrides of a recipe that is trained twice.
RECIPES: dict[str, tuple[int, tuple[str, ...]]] = {
    "fp32": (1, ()),
    "only what repeats": (1, (SWITCH,)),
    "bf16": (1, ("train.precision=bf16",)),
    "convolutions": (1, ("student.stem=conv", SWITCH)),
    "largest areas": (1, (AREA, SWITCH)),
    "muon": (1, ("optim.name=nmuon", SWITCH)),
    "two processes": (2, ()),
}


def digest_of_export(out: Path) -> str:
    return hashlib.sha256((out / "export" / "model.safetensors").read_bytes()).hexdigest()


@pytest.mark.parametrize("names", [["fp32"], pytest.param(list(RECIPES), marks=pytest.mark.soak)], ids=["one", "all"])
def test_runs_repeat(toy: Toy, tmp_path: Path, counted: Counted, names: list[str]) -> None:
    done = 0
    for name in names:
        processes, overrides = RECIPES[name]
        digests = []
        for folder in (tmp_path / f"{name} once", tmp_path / f"{name} again"):
            folder.mkdir()
            launched = launch(
                ["train", toy.recipe, *SHORT, *overrides, "--out", "run"], cwd=folder, processes=processes
            )
            assert launched.wait() == [0] * processes, launched.output
            digests.append(digest_of_export(folder / "run"))
        done += digests[0] == digests[1]
    counted("the same recipe gives the same student", done=done, of=len(names))


def test_the_switch(toy: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    trainer = trainer_of(toy_recipe(toy, train={"deterministic": True}))
    try:
        assert torch.are_deterministic_algorithms_enabled()
        assert torch.backends.cudnn.deterministic
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
        take_steps(trainer, batches_of(trainer), 1)
    finally:
        trainer_of(toy_recipe(toy))
    assert not torch.are_deterministic_algorithms_enabled()
    assert not torch.backends.cudnn.deterministic


@pytest.mark.gpu
@pytest.mark.parametrize("overrides", [(), (AREA,), ("student.stem=conv",), ("train.precision=bf16",)])
def test_runs_repeat_on_a_gpu(toy: Toy, tmp_path: Path, overrides: tuple[str, ...]) -> None:
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("ACCELERATE_")}
    for out in ("one", "other"):
        command = [sys.executable, "-m", "distill.cli", "train", str(toy.recipe), *SHORT, *overrides, SWITCH,
                   "--out", out]  # fmt: skip
        subprocess.run(command, cwd=tmp_path, env=inherited, check=True, timeout=280)
        assert json.loads((tmp_path / out / "environment.json").read_text())["device"].startswith("cuda")
    assert digest_of_export(tmp_path / "one") == digest_of_export(tmp_path / "other")
