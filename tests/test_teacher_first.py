"""A teacher that another launch is training: who waits, and for how long."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest
import yaml

from distill import pipeline, run
from distill.errors import InputError
from distill.given import Given
from distill.pipeline import Launch, train_earlier
from distill.recipe import Recipe, from_mapping
from distill.teaching.earlier import directory_of

TEACHER = "recipes/teachers/digits_cnn.yaml"
NOBODY = Launch(cast(Any, None), threads=1, given=Given())


@pytest.fixture
def recipe() -> Recipe:
    return from_mapping({"data": {"name": "digits"}, "teacher": {"recipe": TEACHER}})


def answers(monkeypatch: pytest.MonkeyPatch, **sequences: list[Any]) -> dict[str, Iterator[Any]]:
    """What pipeline's functions return or raise, call by call."""
    left = {name: iter(values) for name, values in sequences.items()}

    def answering(name: str) -> Any:
        def answer(*_: Any, **__: Any) -> Any:
            value = next(left[name])
            if isinstance(value, Exception):
                raise value
            return value

        return answer

    for name in sequences:
        monkeypatch.setattr(run if name == "holder_of" else pipeline, name, answering(name))
    return left


def test_a_teacher_in_training_is_waited_for(monkeypatch: pytest.MonkeyPatch, recipe: Recipe) -> None:
    waited: list[float] = []
    monkeypatch.setattr(pipeline.time, "sleep", waited.append)
    left = answers(
        monkeypatch,
        is_trained=[False, True],
        newest_location=[run.InUse("in use by 7. Wait.")],
        holder_of=["7", "7", None],
    )
    train_earlier(recipe, NOBODY)
    assert waited == [1, 1]
    assert [list(values) for values in left.values()] == [[], [], []]


def test_a_teacher_that_became_ready_meanwhile_is_taken(monkeypatch: pytest.MonkeyPatch, recipe: Recipe) -> None:
    answers(monkeypatch, is_trained=[False, True, True], newest_location=[InputError("this run is finished")])
    train_earlier(recipe, NOBODY)


def test_any_other_problem_of_the_teachers_run_is_said(monkeypatch: pytest.MonkeyPatch, recipe: Recipe) -> None:
    answers(monkeypatch, is_trained=[False, False], newest_location=[InputError("the recipe has changed")])
    with pytest.raises(InputError, match="the recipe has changed"):
        train_earlier(recipe, NOBODY)


def test_a_teacher_that_saw_the_test_images_is_refused(tmp_path: Path) -> None:
    """Whatever its resolution is."""
    of_digits = {"name": "digits", "test": 0.2}
    theirs = {"data": {**of_digits, "test_seed": 1, "resolution": 16}, "student": {"model": "resnet18"}}
    path = tmp_path / "its.yaml"
    path.write_text(yaml.safe_dump(theirs))
    recipe = from_mapping({"data": of_digits, "teacher": {"recipe": str(path)}})
    with pytest.raises(InputError, match=r"its\.yaml holds out other test images \(data\.test, data\.test_seed\)"):
        directory_of(recipe, recipe.teachers[0])
    del theirs["data"]["test_seed"]
    path.write_text(yaml.safe_dump(theirs))
    assert directory_of(recipe, recipe.teachers[0]).name.startswith("its-")
