"""`distill validate` says, without torch, what a recipe names and is not there."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import timm.optim
import torchvision
import yaml
from timm.models._registry import _deprecated_models

import teachers.cifar_resnet  # noqa: F401  registers its models
from distill.cli import main
from distill.recipe import installed
from distill.students.names import register_models

ROOT = Path(__file__).resolve().parents[1]
GOOD: dict[str, Any] = {
    "data": {"name": "cifar10"},
    "teacher": {"model": "cifar_resnet20"},
    "student": {"model": "vit_nano", "patch_size": 4},
    "distill": [{"method": "hard"}],
}


@pytest.fixture
def validated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Exit code and standard error of `distill validate` for `GOOD` with changes."""
    monkeypatch.chdir(tmp_path)

    def run(**changes: Any) -> tuple[int, list[str]]:
        sections = {
            key: GOOD.get(key, {}) | value if isinstance(value, dict) else value for key, value in changes.items()
        }
        Path("r.yaml").write_text(yaml.safe_dump(GOOD | sections))
        code = main(["validate", "r.yaml"])
        return code, capsys.readouterr().err.splitlines()

    return run


def test_names_read_from_source_are_those_that_the_packages_know() -> None:
    register_models()
    theirs = {name for name in timm.list_models() if timm.models.model_entrypoint(name).__module__.startswith("timm.")}
    old = {name for name, new in _deprecated_models.items() if new}
    assert theirs <= installed.timm_models() <= set(timm.list_models())
    assert installed.old_timm_models() == old
    assert installed.torchvision_models() == set(torchvision.models.list_models())
    assert set(timm.optim.list_optimizers()) - installed.optimizers() <= {"nesterov"}
    assert len(installed.optimizers()) > 90


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"student": {"model": "vit_naano"}}, "student.model: nothing is called 'vit_naano'; did you mean 'vit_nano'"),
        ({"student": {"model": "resnet18x", "patch_size": None}},
         "student.model: nothing is called 'resnet18x'; did you mean 'resnet18'"),
        ({"student": {"weights": "nowhere"}}, "student.weights: no export there: nowhere"),
        ({"student": {"init": {"kind": "select", "source": "no/export"}}},
         "student.init.source: no export there: no/export"),
        ({"student": {"init": {"kind": "select", "source": "vit_small_patch16_225.augreg_in1k"}}},
         "student.init.source: nothing is called 'vit_small_patch16_225.augreg_in1k'; did you mean 'vit_small_patch"),
        ({"teacher": {"model": "resnet81"}}, "teacher.model: nothing is called 'resnet81'; did you mean 'resnet18'"),
        ({"teacher": {"model": "cifar_resnet21"}}, "nothing is called 'cifar_resnet21'; did you mean 'cifar_"),
        ({"teacher": {"model": "torchvision/resnet51"}}, "did you mean 'resnet50'"),
        ({"teacher": {"model": "local-dir:nowhere"}}, "teacher.model: no model of timm's layout there"),
        ({"teacher": {"weights": "nowhere.pth"}}, "teacher.weights: no such file: nowhere.pth"),
        ({"teacher": [{"recipe": "nowhere.yaml"}, {"model": "resnet18"}]}, "teacher.0.recipe: no such file: nowhere"),
        ({"data": {"name": "cifra10"}}, "data.name: nothing is called 'cifra10'; did you mean 'cifar10'"),
        ({"data": {"name": "folder", "root": "nowhere"}}, "data.root: no such folder: nowhere"),
        ({"data": {"name": "own.safetensors", "root": "."}}, "data.name: no such file: own.safetensors"),
        ({"optim": {"name": "adamv"}}, "optim.name: nothing is called 'adamv'; did you mean 'adam"),
        ({"teacher": "resnet18"}, "teacher: should be a section of keys, such as {model: resnet18}, got 'resnet18'"),
        ({"distill": "hard"}, "distill: should be a list of sections, such as [{method: hard}], got 'hard'"),
        ({"train": 5}, "train: should be a section of keys, got 5"),
        ({"name": "my run"}, "'_' and '-' alone, such as 'my-run', got 'my run'"),
    ],
    ids=str,
)  # fmt: skip
def test_one_problem_each(changes: dict[str, Any], message: str, validated) -> None:
    code, (first, *problems) = validated(**changes)
    assert code == 2
    assert first == "error: r.yaml: 1 problem(s) in the recipe:"
    assert len(problems) == 1
    assert message in problems[0]


def test_weights_of_classes_that_a_folder_does_not_have(validated) -> None:
    for name in ("train/cat", "train/dog", "train/eel", "train/.cache", "test/cat"):
        Path("photos", name).mkdir(parents=True)
    folder = {"name": "folder", "root": "photos"}
    code, (_, problem) = validated(data={**folder, "class_weights": [1.0, 2.0]})
    assert code == 2
    assert "data.class_weights: 2 weights for 3 classes; give one for each of cat, dog, eel" in problem
    assert validated(data={**folder, "class_weights": [1.0, 2.0, 3.0]}) == (0, [])


def test_all_at_once(validated) -> None:
    code, lines = validated(
        teacher={"model": "resnet81", "weights": "no.pth"},
        data={"name": "folder", "root": "no"},
        optim={"name": "adamv"},
    )
    assert code == 2
    assert lines[0].startswith("error: r.yaml: 4 problem(s)")


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"student": {"model": "gcvit_xxtiny", "patch_size": None}},
        {"student": {"model": "resnet18.a1_in1k", "patch_size": None, "pretrained": True}},
        {"student": {"init": {"kind": "select", "source": "vit_tiny_patch16_224.augreg_in21k"}}},
        {"teacher": {"model": "hf_hub:somebody/anything"}},
        {"teacher": {"model": "hf-hub:somebody/anything"}},
        {"teacher": {"model": "torchvision/resnet50"}},
        {"optim": {"name": "bnbadamw8bit"}},
        {"data": {"name": "hfds/somebody/anything"}},
    ],
    ids=str,
)
def test_what_may_be_there_is_no_problem(changes: dict[str, Any], validated) -> None:
    assert validated(**changes) == (0, [])


def test_a_warm_up_that_never_ends_is_a_warning(validated) -> None:
    code, (line,) = validated(optim={"warmup_epochs": 5}, train={"epochs": 5})
    assert code == 0
    assert line.startswith("warning: optim.warmup_epochs: 5 of train.epochs 5")


def test_an_empty_recipe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "r.yaml").touch()
    assert main(["validate", str(tmp_path / "r.yaml")]) == 2
    assert "r.yaml: the recipe is empty. `distill recipes` lists some" in capsys.readouterr().err
    assert main(["validate", str(tmp_path / "r.yaml"), "student.model=resnet18"]) == 0


def test_all_recipes_of_this_project_name_what_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    for path in sorted(Path("recipes").rglob("*.yaml")):
        if path.parent.name != "accelerate" and path.stem != "tiny_area":  # whose images are a folder of the user's
            assert main(["validate", str(path)]) == 0, path


def test_it_takes_no_torch(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(GOOD))
    code = "import sys; from distill.cli import main; main(['validate', 'r.yaml']); sys.exit('torch' in sys.modules)"
    environment = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin"}
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path, env=environment, stdout=subprocess.DEVNULL)
