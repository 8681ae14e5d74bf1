"""What is called a collapse, and what is not."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from distill.report.collapse import collapse
from distill.report.comparison import compare
from distill.report.sections import sections
from tests.report.conftest import MakeRun

RECIPE = {"distill": [{"method": "guide"}, {"method": "esvit", "prototypes": 64}]}
WHOLE = math.log(64)


def lines(entropies: list[float], *, name: str = "esvit/teacher_entropy", spread: float = 0.5) -> list[dict[str, Any]]:
    trained = [{"event": "train", "step": step, name: value} for step, value in enumerate(entropies, 1)]
    return [*trained, {"event": "eval", "split": "validation", "student/spread": spread}]


@pytest.mark.parametrize("name", ["esvit/teacher_entropy", "esvit/region_teacher_entropy"])
def test_answers_that_are_always_the_same_or_always_equally_probable(name: str) -> None:
    assert "was 0 throughout" in str(collapse(RECIPE, lines([0.0, 1e-5], name=name)))
    assert f"equal probabilities, {WHOLE:.3f}" in str(collapse(RECIPE, lines([WHOLE, 0.9999 * WHOLE], name=name)))
    assert collapse(RECIPE, lines([WHOLE, 0.99 * WHOLE], name=name)) is None
    assert collapse(RECIPE, lines([0.0, 1.0, 0.0], name=name)) is None
    assert collapse(RECIPE, lines([1.0, math.nan], name=name)) is None
    assert collapse({}, lines([WHOLE, WHOLE], name=name)) is None, "of how many is not known"


def test_features_without_spread() -> None:
    assert "the features collapsed" in str(collapse({}, lines([1.0], spread=1e-9)))
    assert collapse({}, [*lines([1.0], spread=1e-9), *lines([1.0])]) is None, "the newest evaluation counts"
    assert collapse({}, []) is None


def test_the_report_warns_and_draws_both(make_run: MakeRun) -> None:
    path = make_run()
    file = path / "metrics.jsonl"
    kept = [json.loads(line) for line in file.read_text().splitlines()]
    values = {"dino/teacher_entropy": 0.0, "dino/kl": 0.0}
    changed = [line | (values if line["event"] == "train" else {}) for line in kept]
    file.write_text("".join(json.dumps(line) + "\n" for line in changed))
    comparison = compare([path])
    assert any("the training collapsed" in warning for warning in comparison.warnings)
    assert [(curve.variant, set(curve.values)) for curve in comparison.curves["entropy"]] == [("dino", {0.0})]
    (learning,) = [section for section in sections(comparison) if section.name == "learning"]
    assert {"entropy", "kl"} <= {part.name for part in learning.parts if part.kind == "plot"}
