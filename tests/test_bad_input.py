"""What a user can do wrong, through the real command: one clear message, exit code 2, nothing half-written, nothing
executed.
"""

from __future__ import annotations

import fcntl
import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import distill
from tests.conftest import Command, Toy


@pytest.fixture
def refused(command: Command, tmp_path: Path):
    """Runs `distill train`, asserts that it is refused cleanly, and returns its message."""

    def run(*arguments: object) -> str:
        before = sorted(tmp_path.rglob("*"))
        result = command("train", *arguments)
        assert result.returncode == 2, result.stdout + result.stderr
        assert result.stderr.count("error: ") == 1, result.stderr
        assert "Traceback" not in result.stderr
        assert sorted(tmp_path.rglob("*")) == before, "something was left behind"
        return result.stderr[result.stderr.index("error: ") :]

    return run


def test_missing_recipe(refused) -> None:
    assert "nowhere.yaml: cannot read the recipe: no such file" in refused("nowhere.yaml")


def test_recipe_problems_all_at_once(refused, toy: Toy) -> None:
    message = refused(
        toy.recipe,
        "train.epoch=3",
        "optim.lr=fast",
        "data.resolution=9",
        "student.attention.blocks=[0, 6]",
        "train.batch_size=15",
    )
    assert "5 problem(s)" in message
    assert "train.epoch: unknown key; did you mean 'epochs'?" in message
    assert "optim.lr: should be a valid number, got 'fast'" in message
    assert "data.resolution 9 is not divisible by the patch size 4" in message
    assert "student.attention.blocks: vit_nano has blocks 0 to 5, got [6]" in message
    assert "train.batch_size: 15 does not divide" in message


def test_a_key_of_another_variant(refused, toy: Toy) -> None:
    message = refused(toy.recipe, "distill=[{method: hard, temperature: 2.0}]")
    assert "distill.0.temperature: unknown key; other variants of 'distill' have it, the chosen one has not" in message


@pytest.mark.parametrize(("area", "found"), [("7", "from 1 to the 6 tokens"), ("[3, 1]", "2x2 patch grid, got [3, 1]")])
def test_area_larger_than_the_grid(refused, toy: Toy, area: str, found: str) -> None:
    assert found in refused(toy.recipe, f"student.attention.max_area={area}")


@pytest.mark.parametrize(
    ("model", "resolution"), [("vit_nano", 8), ("deit_tiny_distilled_patch16_224", 32), ("levit_128s", 64)]
)
def test_a_distillation_head_that_nothing_teaches(refused, toy: Toy, model: str, resolution: int) -> None:
    message = refused(
        toy.recipe,
        f"student={{model: {model}}}",
        *(["student.patch_size=4"] if model == "vit_nano" else []),
        f"data.resolution={resolution}",
        "distill=[{method: hard, weight: 0}]",
    )
    assert "distill.0.weight: always 0: the distillation head would not be trained" in message


@pytest.mark.parametrize("model", ["vit_nano", "deit_tiny_distilled_patch16_224"])
def test_a_class_head_that_nothing_teaches(refused, toy: Toy, model: str) -> None:
    patch, resolution = (["student.patch_size=4"], 8) if model == "vit_nano" else ([], 32)
    message = refused(
        toy.recipe, f"student={{model: {model}}}", *patch, f"data.resolution={resolution}", "label_weight=0"
    )
    assert "label_weight: 0: the class head would not be trained" in message


def test_missing_data_without_network(refused, toy: Toy, tmp_path: Path) -> None:
    message = refused(toy.recipe, "data.root=elsewhere")
    assert "elsewhere" in message
    assert "toy.safetensors" in message


def tamper(toy: Toy, folder: Path, **changes: torch.Tensor) -> Path:
    """A copy of the toy data with some tensors replaced and the old digests kept, or dropped where a label changes."""
    source = toy.root / "toy.safetensors"
    with safe_open(source, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(source)
    for key, value in changes.items():
        tensors[key.replace("_", ".")] = value
        metadata.pop(f"sha256/{key.replace('_', '.')}")
    folder.mkdir()
    save_file(tensors, folder / "toy.safetensors", metadata)
    return folder


def test_label_out_of_range(refused, toy: Toy, tmp_path: Path) -> None:
    root = tamper(toy, tmp_path / "data", train_labels=torch.arange(128) % 5)
    message = refused(toy.recipe, f"data.root={root}")
    assert "toy.safetensors" in message
    assert "label" in message


def test_truncated_and_tampered_data(refused, toy: Toy, tmp_path: Path) -> None:
    root = tmp_path / "data"
    root.mkdir()
    content = bytearray((toy.root / "toy.safetensors").read_bytes())
    file = root / "toy.safetensors"
    file.write_bytes(content[:-1000])
    assert str(file) in refused(toy.recipe, f"data.root={root}")
    content[-1] ^= 1
    file.write_bytes(content)
    message = refused(toy.recipe, f"data.root={root}")
    assert str(file) in message
    assert "SHA-256" in message


def test_missing_and_foreign_weights(refused, toy: Toy, tmp_path: Path) -> None:
    assert "none.pth" in refused(toy.recipe, "teacher.weights=none.pth")
    foreign = tmp_path / "foreign.pth"
    torch.save({"conv.weight": torch.zeros(3)}, foreign)
    message = refused(toy.recipe, f"teacher.weights={foreign}")
    assert str(foreign) in message
    assert "conv.weight" in message
    assert "conv1.weight" in message


def test_malicious_weights_never_execute(refused, toy: Toy, tmp_path: Path) -> None:
    witness = tmp_path / "executed"

    class Payload:
        def __reduce__(self) -> tuple[object, tuple[Path]]:
            return (Path.touch, (witness,))  # type: ignore[return-value]

    malicious = tmp_path / "malicious.th"
    malicious.write_bytes(pickle.dumps({"state_dict": Payload()}))
    assert str(malicious) in refused(toy.recipe, f"teacher.weights={malicious}")
    torch.save({"state_dict": Payload()}, malicious)
    assert str(malicious) in refused(toy.recipe, f"teacher.weights={malicious}")
    assert not witness.exists()


def test_class_count_of_teacher_and_data(refused, toy: Toy, tmp_path: Path) -> None:
    state = torch.load(toy.teacher, weights_only=True)
    state["linear.weight"], state["linear.bias"] = torch.zeros(10, 64), torch.zeros(10)
    weights = tmp_path / "ten.pth"
    torch.save(state, weights)
    message = refused(toy.recipe, f"teacher.weights={weights}")
    assert "10" in message
    assert "4" in message
    assert "class" in message


def test_a_bad_teacher_is_stopped_by_preflight(refused, toy: Toy) -> None:
    message = refused(toy.recipe, "teacher.min_accuracy=0.99")
    assert "below the required 99.00%" in message
    assert "normalisation" in message


@pytest.fixture(scope="module")
def finished(toy: Toy, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run in one step."""
    out = tmp_path_factory.mktemp("finished") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("distill.pipeline.report_on", lambda _: None)
        patch.setattr("distill.exports.folder._compare_with_reloaded", lambda *args: None)
        distill.train(toy.recipe, out=out, overrides=["train.max_steps=1"])
    return out


def test_a_finished_or_used_directory(refused, toy: Toy, finished: Path, tmp_path: Path) -> None:
    assert f"{finished}: there is a run already, and it is finished" in refused(toy.recipe, "--out", finished)
    assert "this run is finished" in refused(toy.recipe, "train.max_steps=1", "--out", finished, "--resume", "auto")
    out = tmp_path / "used"
    shutil.copytree(finished, out, symlinks=True)
    (out / "status.json").write_text(json.dumps({"state": "running"}))
    assert "it is killed" in refused(toy.recipe, "--out", out)
    with (out / ".lock").open("r+") as lock:
        fcntl.lockf(lock, fcntl.LOCK_EX)
        message = refused(toy.recipe, "train.max_steps=1", "--out", out, "--resume", "auto")
        assert f"{out}: in use by process" in message


def test_a_changed_recipe_says_what_changed(refused, toy: Toy, finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "interrupted"
    shutil.copytree(finished, out, symlinks=True)
    (out / "status.json").write_text(json.dumps({"state": "interrupted"}))
    message = refused(toy.recipe, "train.max_steps=1", "optim.lr=0.5", "seed=3", "--out", out, "--resume", "auto")
    assert "seed: 0 -> 3" in message
    assert "optim.lr: 0.001 -> 0.5" in message
    assert "train." not in message


def test_nothing_to_resume_there(refused, toy: Toy, tmp_path: Path) -> None:
    assert "neither a run directory nor a checkpoint" in refused(toy.recipe, "--resume", tmp_path)


def test_precision_and_optimizer_that_do_not_exist_here(refused, toy: Toy) -> None:
    assert "fp16 needs a GPU" in refused(toy.recipe, "train.precision=fp16")
    assert "optim.name: timm has no optimizer 'adamm'" in refused(toy.recipe, "optim.name=adamm")
