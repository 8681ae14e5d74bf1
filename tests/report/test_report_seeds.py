"""Runs under several seeds: which of them belong together, and what is said of them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from distill.report.answer import answer
from distill.report.comparison import compare
from distill.report.sections import seeds
from tests.formulas import p_of_flipped_signs
from tests.report.conftest import MakeRun

SOFT: dict[str, Any] = {"teacher": {"model": "resnet18"}, "distill": [{"method": "soft"}], "control": True}


def test_a_control_serves_every_recipe_whose_control_it_would_be(make_run: MakeRun) -> None:
    hard = SOFT | {"distill": [{"method": "hard"}, {"method": "guide"}], "control": False}
    runs = [
        make_run("soft-0", seed=0, control=True, strength=1.0, recipe=SOFT),
        make_run(
            "soft-1", seed=1, control=True, strength=1.0, recipe=SOFT | {"seed": 1, "data": {"root": "elsewhere"}}
        ),
        make_run("hard-0", seed=2, strength=2.0, recipe=hard),
        make_run("hard-1", seed=3, strength=2.0, recipe=hard | {"seed": 1, "control": True}),
        make_run("other-0", seed=4, recipe=hard | {"train": {"epochs": 7}}),
        make_run("other-1", seed=5, recipe=hard | {"train": {"epochs": 7}, "seed": 1}),
    ]
    comparison = compare(runs)
    shared = comparison.control_of("hard-1")
    assert shared is not None
    assert (shared.run, shared.model) == ("soft-1", "control")
    assert comparison.control_of("other-0") is None
    assert answer(comparison).count("The same network trained without the teacher") == 4
    section = seeds.build(comparison)
    assert section is not None
    groups = {(group["recipe"], group["model"]): group for group in section.data["groups"]}
    assert groups.keys() == {
        ("soft-0", "student"), ("soft-0", "control"), ("hard-0", "student"), ("hard-0", "control"),
        ("other-0", "student"),
    }  # fmt: skip
    for model in ("soft-0", "hard-0"):
        assert groups[model, "control"]["top1"] == [
            comparison.row(run, "control").metrics.top1
            for run in ("soft-0", "soft-1")  # type: ignore[union-attr]
        ]
    tests = {(test["first"], test["second"]): test for test in section.data["tests"]}
    test = tests["student of hard-0", "its control"]
    # By hand: of each image, under how many seeds one of the two alone has it right.
    apart = [0] * len(comparison.labels)
    for student, control in (("hard-0", "soft-0"), ("hard-1", "soft-1")):
        a, b = comparison.row(student, "student"), comparison.row(control, "control")
        assert a is not None
        assert b is not None
        for image, (label, ours, theirs) in enumerate(zip(comparison.labels, a.logits, b.logits, strict=True)):
            apart[image] += int(np.argmax(ours) == label) - int(np.argmax(theirs) == label)
    assert test["p_over_images"] == pytest.approx(p_of_flipped_signs(apart))
    assert test["points"] == pytest.approx(100 * sum(apart) / (2 * len(comparison.labels)))
    assert test["seeds"] == 2
    assert ("student of soft-0", "student of hard-0") in tests


def test_a_recipe_of_another_version_is_left_out(make_run: MakeRun) -> None:
    runs = [make_run("one", recipe={"gone": 1}), make_run("two", seed=1, recipe={"gone": 1, "seed": 1})]
    assert seeds.build(compare(runs)) is None
