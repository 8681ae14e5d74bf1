"""Weights of the loss that change over the run."""

from __future__ import annotations

import math
from typing import Any

import pytest
import yaml

from distill.errors import InputError
from distill.methods import dkd, guide, hard, soft
from distill.options import WeightSchedule
from distill.recipe import Recipe, from_mapping


@pytest.mark.parametrize("shape", ["linear", "cosine"])
@pytest.mark.parametrize(("start", "end"), [(2.5, 0.0), (0.0, 1.0), (3.0, 1.0), (1.0, 1.0)])
@pytest.mark.parametrize("until", [0.08, 0.7, 1.0])
def test_from_start_to_end(shape: Any, start: float, end: float, until: float) -> None:
    schedule = WeightSchedule(start=start, end=end, until=until, shape=shape)
    assert schedule.at(0.0) == start
    assert schedule.at(until / 2) == pytest.approx((start + end) / 2, abs=1e-12)
    quarter = 0.25 if shape == "linear" else (1 - math.sqrt(0.5)) / 2
    assert schedule.at(until / 4) == pytest.approx(start + (end - start) * quarter, abs=1e-12)
    assert schedule.at(3 * until / 4) == pytest.approx(start + (end - start) * (1 - quarter), abs=1e-12)
    for after in (until, (until + 1) / 2, 1.0):
        assert schedule.at(after) == pytest.approx(end, abs=1e-12)
    values = [schedule.at(step / 1000) for step in range(1001)]
    assert values == sorted(values, reverse=end < start)
    numeric = sum(schedule.at((step + 0.5) / 100_000) for step in range(100_000)) / 100_000
    assert schedule.mean == pytest.approx(numeric, abs=1e-6)


def test_a_number_stays_one() -> None:
    fixed = hard.Options(weight=0.3)
    assert fixed.weight == 0.3
    assert {fixed.weight_at(progress) for progress in (0.0, 0.5, 1.0)} == {0.3}
    assert fixed.mean_weight == 0.3
    recipe = recipe_of({"method": "soft", "weight": 2})
    assert recipe.distill[0].weight == 2.0
    assert isinstance(recipe.distill[0].weight, float)


def test_the_methods_own_courses() -> None:
    assert [guide.Options().weight_at(progress) for progress in (0.0, 0.35, 0.7, 1.0)] == pytest.approx(
        [2.5, 1.25, 0.0, 0.0]
    )
    assert guide.Options().mean_weight == pytest.approx(0.875)
    assert [dkd.Options().weight_at(progress) for progress in (0.0, 0.04, 0.08, 1.0)] == pytest.approx(
        [0.0, 0.5, 1.0, 1.0]
    )


def recipe_of(*distill: dict[str, Any], **others: Any) -> Recipe:
    return from_mapping({"teacher": {"model": "cifar_resnet20"}, "distill": list(distill), **others})


def test_from_a_recipe_and_back() -> None:
    course = {"start": 3.0, "end": 0.5, "until": 0.4, "shape": "cosine"}
    recipe = recipe_of({"method": "guide", "weight": course}, {"method": "hard", "weight": {"start": 1, "end": 2}})
    assert recipe.distill[0].weight == WeightSchedule(**course)
    assert recipe.distill[1].weight == WeightSchedule(start=1.0, end=2.0, until=1.0, shape="linear")
    assert from_mapping(yaml.safe_load(recipe.to_yaml())) == recipe
    assert "weight" not in recipe.distill[0].arguments()
    changed = from_mapping(yaml.safe_load(recipe.to_yaml()), ["distill.0.weight.start=7", "distill.1.weight=0.25"])
    assert changed.distill[0].weight == WeightSchedule(**course | {"start": 7.0})
    assert changed.distill[1].weight == 0.25


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        ({"strat": 1.0}, "distill.0.weight.strat: unknown key; did you mean 'start'?"),
        ({"start": 1.0, "untill": 0.5}, "distill.0.weight.untill: unknown key; did you mean 'until'?"),
        ({"shap": "cosine"}, "distill.0.weight.shap: unknown key; did you mean 'shape'?"),
        ({"xyz": 1}, "distill.0.weight.xyz: unknown key; known here: start, end, until, shape"),
        ({"start": -1.0}, "distill.0.weight.start: should be greater than or equal to 0, got -1.0"),
        ({"until": 0.0}, "distill.0.weight.until: should be greater than 0, got 0.0"),
        ({"until": 1.5}, "distill.0.weight.until: should be less than or equal to 1, got 1.5"),
        ({"shape": "step"}, "distill.0.weight.shape: should be 'linear' or 'cosine', got 'step'"),
        ({"end": "low"}, "distill.0.weight.end: should be a valid number, got 'low'"),
        (-0.5, "distill.0.weight: should be greater than or equal to 0, got -0.5"),
        ("much", "distill.0.weight: should be a valid number, got 'much'"),
        (None, "distill.0.weight: should be a valid number, got None"),
        (True, "distill.0.weight: should be a valid number, got True"),
        ([1.0, 0.0], "distill.0.weight: should be a valid number"),
    ],
)
@pytest.mark.parametrize("method", ["guide", "hard"])
def test_what_is_wrong_is_said_at_its_key(method: str, weight: Any, message: str) -> None:
    with pytest.raises(InputError) as refused:
        recipe_of({"method": method, "weight": weight})
    assert str(refused.value) == f"recipe: 1 problem(s) in the recipe:\n  {message}"


def test_weights_that_are_all_zero_learn_nothing() -> None:
    nothing = {"method": "hard", "weight": {"start": 0.0, "end": 0.0}}
    with pytest.raises(InputError, match="all weights of the loss are 0"):
        recipe_of(nothing, label_weight=0.0)
    assert recipe_of(nothing | {"weight": {"start": 1.0}}, label_weight=0.0).label_weight == 0.0


def test_the_controls_label_weight_is_the_mean_of_what_taught_the_heads() -> None:
    """Methods on maps take nothing of the labels' place."""
    guided = {"method": "guide"}
    course = {"method": "soft", "weight": {"start": 2.0, "end": 0.0, "until": 0.5}}
    cases: list[tuple[list[dict[str, Any]], float | None, float, float]] = [
        ([{"method": "hard", "weight": 0.25}, guided], 0.3, 0.3, 0.55),
        ([course, guided], 0.5, 0.5, 1.0),
        ([course, {"method": "dkd"}], None, 0.5, 0.5 + 0.5 + 0.96),
        ([guided, {"method": "fitnet"}], None, 1.0, 1.0),
    ]
    for distill, given, own, controls in cases:
        recipe = recipe_of(*distill, **({} if given is None else {"label_weight": given}), control=True)
        control = recipe.as_control()
        assert recipe.label_weight == own
        assert control.label_weight == pytest.approx(controls)
        assert (control.teacher, control.distill, control.control) == (None, [], False)


def test_all_sections_have_a_weight() -> None:
    assert soft.Options().mean_weight == soft.Options().weight_at(0.3) == 0.5
