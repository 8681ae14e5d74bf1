"""Completion: what argcomplete is told at each place of a command line, and how fast."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from distill.cli import COMMANDS, add_arguments
from distill.completion import finder
from teachers.zoo import ZOO

ROOT = Path(__file__).resolve().parents[1]


def offered(line: str) -> list[str]:
    """All completions of what is behind `distill `."""
    asked = finder({name: summary for name, (summary, _, _) in COMMANDS.items()}, add_arguments)
    found: list[str] = []
    while (word := asked.rl_complete(line, len(found))) is not None:
        found.append(word.removeprefix(line[: line.rfind(" ") + 1]))
    return found


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with recipes, runs (one within another), an export and images."""
    for folder in ("runs/nano/control", "runs/laptop", "runs/teachers/cnn", "student", "photos", ".hidden"):
        (tmp_path / folder).mkdir(parents=True)
    for run in ("runs/nano", "runs/nano/control", "runs/laptop", "runs/teachers/cnn"):
        (tmp_path / run / "status.json").touch()
    for file in ("recipe.yaml", "other.yml", "notes.txt", "student/config.json"):
        (tmp_path / file).touch()
    monkeypatch.chdir(tmp_path)
    return tmp_path


RUNS = ["runs/laptop", "runs/nano", "runs/teachers/"]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("", sorted(COMMANDS)),
        ("ev", ["evaluate "]),
        ("export --keep", ["--keep-float "]),
        ("train --p", ["--plugin "]),
        ("init --goal ", ["accurate", "fast", "small"]),
        ("recipes quick", ["quickstart "]),
        # A recipe, then its keys; a section is opened at once where it is the only one.
        ("train ", ["other.yml", "photos/", "recipe.yaml", "runs/", "student/"]),
        ("train rec", ["recipe.yaml "]),
        ("train recipe.yaml train.prec", ["train.precision="]),
        ("validate recipe.yaml data.augment.rand_augment.n", ["data.augment.rand_augment.num_ops="]),
        ("train recipe.yaml distill.1.meth", ["distill.1.method="]),
        ("train recipe.yaml --out there seed=1 see", ["seed="]),
        ("train recipe.yaml contr", ["control="]),
        # Values that the types list.
        ("train recipe.yaml train.precision=", [f"train.precision={name}" for name in ("bf16", "fp16", "fp32")]),
        ("train recipe.yaml control=t", ["control=true "]),
        ("train recipe.yaml data.name=ima", ["data.name=imagenet "]),
        ("train recipe.yaml optim.name=muo", ["optim.name=muon "]),
        ("train recipe.yaml student.model=vit_nan", ["student.model=vit_nano "]),
        ("train recipe.yaml data.root=pho", ["data.root=photos/"]),
        ("train recipe.yaml teacher.recipe=o", ["teacher.recipe=other.yml "]),
        # Runs.
        ("show ", RUNS),
        ("compare runs/nano runs/l", ["runs/laptop "]),
        ("show runs/nano/", ["runs/nano/control "]),
        ("export ru", [*RUNS, "runs/"]),
        ("predict st", ["student "]),
        ("train recipe.yaml --resume ", ["auto", *RUNS]),
        ("evaluate runs/l", ["runs/laptop "]),
        ("evaluate rec", ["recipe.yaml "]),
        ("evaluate runs/laptop pho", ["photos/"]),
        ("teachers cifar_resnet2", ["cifar_resnet20 "]),
        ("sweep recipe.yaml --teachers cifar_resnet20,cifar_resnet5", ["cifar_resnet20,cifar_resnet56 "]),
    ],
)
def test_what_is_offered(line: str, expected: list[str]) -> None:
    assert sorted(offered(line)) == sorted(expected)


def test_sections_are_opened_one_by_one() -> None:
    sections = offered("train recipe.yaml data.")
    assert {"data.name=", "data.root=", "data.augment."} <= set(sections)
    assert not any(word.startswith("data.augment.m") for word in sections)
    assert offered("train recipe.yaml data.augm") == offered("train recipe.yaml data.augment.")
    assert {"train.", "data.", "seed="} <= set(offered("train recipe.yaml "))
    kinds = offered("train recipe.yaml student.attention.kind=")
    assert {"standard", "area", "performer"} <= {word.rpartition("=")[2] for word in kinds}
    assert set(ZOO) <= set(offered("evaluate "))


def ask(line: str, place: Path) -> tuple[list[str], str]:
    """By the protocol of shells: completions, and what Python has imported."""
    answer = place / "answer"
    code = (
        "import atexit, os, sys\n"
        "leave = os._exit\n"
        "os._exit = lambda code: (print(*sys.modules, flush=True), leave(code))\n"
        "from distill.cli import main\nmain()"
    )
    given = {"_ARGCOMPLETE": "1", "_ARGCOMPLETE_IFS": "\013", "_ARGCOMPLETE_STDOUT_FILENAME": str(answer)}
    given |= {"COMP_LINE": line, "COMP_POINT": str(len(line)), "_ARGCOMPLETE_COMP_WORDBREAKS": " \t\n\"'><=;|&(:"}
    environment = os.environ | given | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=place, capture_output=True, text=True, check=True
    )
    return answer.read_text().split("\013"), done.stdout


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("distill train recipe.yaml train.precision=f", ["fp16", "fp32"]),
        ("distill show runs/nano/c", ["runs/nano/control "]),
    ],
)
def test_shells_are_answered_without_torch(line: str, expected: list[str], place: Path) -> None:
    found, imported = ask(line, place)
    assert sorted(found) == expected
    assert not {"torch", "rich", "timm", "numpy"} & set(imported.split())
