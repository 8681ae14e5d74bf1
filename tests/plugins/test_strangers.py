"""Variants that a file outside the package brings: each trains through the real command, resumes bit for bit, exports,
and stands in the report.
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from tests.conftest import Command, Toy
from tests.warm import launch

ROOT = Path(__file__).resolve().parents[2]
STRANGERS = Path(__file__).parent / "strangers.py"
SHORT = ("train.epochs=1", "train.max_steps=6", "train.log_every=2", "train.checkpoint_every=2", "control=false")

ATTENTION = {"student": {"attention": {"kind": "carried", "blocks": "all", "share": 0.25}}}
READER = {"data": {"name": "stripes"}, "teacher": None, "distill": []}
VARIANTS: dict[str, dict[str, Any]] = {
    "attention, methods": ATTENTION
    | {"distill": [{"method": "queue", "size": 16, "weight": 1.0}, {"method": "two_views", "weight": 1.0}]},
    "student, teacher, reader": {
        "data": {"name": "stripes", "shine": 240},
        "teacher": {"source": "average", "momentum": 0.8},
        "student": {"model": "stranger_vit", "width": 24, "patch_size": None, "attention": {"kind": "standard"}},
        "distill": [{"method": "soft"}],
    },
}


def recipe(toy: Toy, folder: Path, changes: dict[str, Any]) -> Path:
    raw = toy.mapping(**{key: value for key, value in changes.items() if key != "teacher"})
    if "teacher" in changes:
        raw["teacher"] = changes["teacher"]
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(raw))
    return path


def train(folder: Path, *arguments: object) -> tuple[int, str]:
    launched = launch(["train", *arguments], cwd=folder, report="whole" in arguments)
    return launched.wait(250)[0], launched.output


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {
        f"{path.name}/{key}": tensor
        for path in sorted(folder.glob("*.safetensors"))
        for key, tensor in load_file(path).items()
    }


@pytest.mark.parametrize("name", VARIANTS)
def test_a_strangers_variant(toy: Toy, tmp_path: Path, name: str) -> None:
    path = recipe(toy, tmp_path, VARIANTS[name])
    plugin = ("--plugin", STRANGERS)
    code, output = train(tmp_path, path, *SHORT, "report.analysis=full", "--out", "whole", *plugin)
    assert code == 0, output
    code, output = train(tmp_path, path, *SHORT, "train.max_minutes=1.0e-4", "--out", "parts", *plugin)
    assert code == 75, output
    assert f"--plugin {STRANGERS} --resume parts" in output, "the line to go on with"
    code, output = train(tmp_path, path, *SHORT, "--resume", "parts", *plugin)
    assert code == 0, output
    for place in ("export", "checkpoints/step_00000006"):
        whole, parts = tensors(tmp_path / "whole" / place), tensors(tmp_path / "parts" / place)
        assert whole
        assert all(torch.equal(whole[key], parts[key]) for key in whole), place
    environment = json.loads((tmp_path / "whole" / "environment.json").read_text())
    digest = hashlib.sha256(STRANGERS.read_bytes()).hexdigest()
    assert len(environment["variants"]) == 3
    assert set(environment["variants"].values()) == {f"{STRANGERS} sha256:{digest}"}
    shown = json.loads((tmp_path / "whole" / "report.json").read_text())
    assert "whole" in json.dumps(shown)
    kept = tensors(tmp_path / "whole" / "checkpoints/step_00000006")
    seen = load_file(tmp_path / "whole" / "analysis.safetensors")
    assert any(key.startswith("attention.") for key in seen), "its maps are among the pictures"
    if "attention" in name:
        assert kept["methods.safetensors/queue.queue"].abs().sum() > 0
    else:
        assert any(key.startswith("teacher.safetensors/") for key in kept)


def test_without_its_plugin_everything_says_what_brings_it(toy: Toy, command: Command, tmp_path: Path) -> None:
    path = recipe(toy, tmp_path, ATTENTION)
    code, output = train(tmp_path, path, *SHORT, "--out", "run", "--plugin", STRANGERS)
    assert code == 0, output
    for arguments in (
        ("predict", "run/export", "image.png"),
        ("compare", "run"),
        ("export", "run", "--to", "elsewhere"),
        ("evaluate", "run"),
    ):
        refused = command(*arguments)
        assert refused.returncode == 2, arguments
        assert f"Give --plugin {STRANGERS}" in refused.stderr, arguments
        assert len(refused.stderr.splitlines()) == 1
    refused = command("train", path, *SHORT, "--resume", "run")
    assert refused.returncode == 2
    assert "--plugin" in refused.stderr
    assert not (tmp_path / "elsewhere").exists()


def test_a_changed_plugin_does_not_resume(toy: Toy, tmp_path: Path) -> None:
    plugin = tmp_path / "mine.py"
    plugin.write_text(STRANGERS.read_text())
    path = recipe(toy, tmp_path, READER)
    code, output = train(tmp_path, path, *SHORT, "train.max_minutes=1.0e-4", "--out", "run", "--plugin", plugin)
    assert code == 75, output
    plugin.write_text(plugin.read_text() + "\n# changed\n")
    code, output = train(tmp_path, path, *SHORT, "--resume", "run", "--plugin", plugin)
    assert code == 2
    assert "began with datasets/stripes" in output


PROGRAM = "from distill.options import MethodOptions\nfrom distill.registry import register\n"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("import nothing_of_that_name\n", "fails to import: ModuleNotFoundError"),
        ("1 / 0\n", "fails to import: ZeroDivisionError"),
        (PROGRAM + "@register('methods', 'hard', MethodOptions)\nclass Mine: ...\n", "methods 'hard' is built in"),
        (PROGRAM + "@register('losses', 'mine', MethodOptions)\nclass Mine: ...\n", "groups of variants are"),
    ],
)
def test_a_plugin_that_cannot_be_used_is_one_message(
    command: Command, toy: Toy, tmp_path: Path, text: str, expected: str
) -> None:
    plugin = tmp_path / "mine.py"
    plugin.write_text(text)
    refused = command("validate", toy.recipe, "--plugin", plugin)
    assert refused.returncode == 2
    assert expected in refused.stderr
    assert len(refused.stderr.splitlines()) == 1
    assert not (tmp_path / "runs").exists()


def test_two_plugins_of_one_name_are_refused(command: Command, toy: Toy, tmp_path: Path) -> None:
    for name in ("one.py", "other.py"):
        (tmp_path / name).write_text(
            PROGRAM + "from typing import Literal\nclass O(MethodOptions):\n    method: Literal['mine']\n"
            "@register('methods', 'mine', O)\nclass Mine: ...\n"
        )
    refused = command("validate", toy.recipe, "--plugin", "one.py", "--plugin", "other.py")
    assert refused.returncode == 2
    assert "is already registered by" in refused.stderr
    assert command("validate", toy.recipe, "--plugin", "one.py").returncode == 0


def test_an_unknown_variant_names_the_nearest(command: Command, toy: Toy) -> None:
    refused = command("validate", toy.recipe, "distill.0.method=hardd")
    assert refused.returncode == 2
    assert "did you mean 'hard'" in refused.stderr
    assert "--plugin" in refused.stderr


def test_the_example_of_the_docs_works(toy: Toy, tmp_path: Path) -> None:
    page = ROOT / "docs" / "how-to" / "variants.md"
    (example,) = re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
    assert len(example.splitlines()) <= 40
    (tmp_path / "smooth_hard.py").write_text(example)
    path = recipe(toy, tmp_path, {"distill": [{"method": "smooth_hard", "smoothing": 0.2}]})
    code, output = train(tmp_path, path, *SHORT, "--out", "run", "--plugin", "smooth_hard.py")
    assert code == 0, output
    losses = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert all("loss/smooth_hard" in line for line in losses if line["event"] == "train")


NAMES = re.compile(
    r"""(==|!=|\bin\b)\s*\(?["'](area|hard|soft|dkd|dist|guide|fitnet|relational|similarity|contrast|attention_transfer|vit)["']"""
    r"""|in VIT_SIZES|isinstance\([^()]*\b(Guide|Fitnet|AreaAttention|Hard|Soft)\b"""
)


def test_the_core_names_no_variant() -> None:
    """Outside of the variants' own files; `bench` measures the built-in ones."""
    own = {"methods", "attention", "bench"}
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for package in ("distill", "teachers")
        for path in sorted((ROOT / package).rglob("*.py"))
        if not own & set(path.parts) and path.name not in ("vit.py", "timm_model.py")
        for number, line in enumerate(path.read_text().splitlines(), start=1)
        if NAMES.search(line)
    ]
    assert found == []
