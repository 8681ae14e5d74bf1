"""`distill recipes`: the recipes that come with the package, listed and copied with what they name."""

from __future__ import annotations

from pathlib import Path

import pytest

from distill.cli import main
from distill.recipe import load
from distill.shipped import copy_recipe, shipped_recipes

ROOT = Path(__file__).resolve().parents[1]


def test_all_recipes_are_listed_with_a_line_that_ends(capsys: pytest.CaptureFixture[str]) -> None:
    recipes = shipped_recipes()
    assert set(recipes) == {
        path.relative_to(ROOT / "recipes").with_suffix("").as_posix()
        for path in (ROOT / "recipes").rglob("*.yaml")
        if path.parent.name != "accelerate"
    }
    assert all(what[-1] in ".?:" for what in recipes.values()), "the first line of a recipe is a whole sentence"
    assert main(["recipes"]) == 0
    assert "teachers/digits_cnn" in capsys.readouterr().out


@pytest.mark.parametrize("name", shipped_recipes())
def test_a_copy_is_the_same_recipe(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, *others = copy_recipe(name, tmp_path)
    assert first == tmp_path / "recipes" / f"{name}.yaml"
    monkeypatch.chdir(tmp_path)
    copied = load(first)
    assert copied == load(ROOT / "recipes" / f"{name}.yaml")
    named = [Path(spec.recipe) for spec in copied.teachers if spec.recipe]
    assert [path.is_file() for path in named] == [True] * len(named), "found from the folder of the copy"
    assert set(named) <= {path.relative_to(tmp_path) for path in others}


def test_the_command_copies_and_says_what_comes_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for _ in range(2):  # the second time all is there already, and equal
        assert main(["recipes", "quickstart"]) == 0
        assert capsys.readouterr().out.splitlines() == [
            "recipes/quickstart.yaml",
            "recipes/accelerate/one_process.yaml",
            "recipes/teachers/digits_cnn.yaml",
            "next: distill train recipes/quickstart.yaml",
        ]


def test_a_file_of_the_user_is_not_overwritten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    own = tmp_path / "recipes" / "teachers" / "digits_cnn.yaml"
    own.parent.mkdir(parents=True)
    own.write_text("seed: 1\n")
    assert main(["recipes", "quickstart"]) == 2
    assert "recipes/teachers/digits_cnn.yaml: is there already" in capsys.readouterr().err
    assert own.read_text() == "seed: 1\n"
    assert not (tmp_path / "recipes" / "quickstart.yaml").exists(), "all of it or nothing"


@pytest.mark.parametrize("name", ["quick", "../pyproject", "accelerate/single_gpu", "/etc/passwd", ""])
def test_no_such_recipe(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["recipes", name]) == 2
    assert f"'{name}' is none of them" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
