"""Runs on unbalanced classes: weights, selection by macro accuracy, resumption, the control and the report."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors import safe_open

from distill import run
from distill.errors import InputError, Interrupted
from distill.recipe import from_mapping
from distill.report.comparison import compare
from distill.report.document import write_report
from tests.conftest import Toy
from tests.test_resume import go, train_lines
from tests.test_step_speed import toy_recipe, trainer_of

TAIL = {"long_tail": 4, "class_weights": "balanced"}


def test_a_run_on_a_long_tail_its_control_and_its_report(toy: Toy, tmp_path: Path) -> None:
    raw = toy.mapping(control=True, data=TAIL, train={"select": "macro"})
    recipe = from_mapping(raw, default_name="toy")
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    go(recipe, whole, None)
    with pytest.raises(Interrupted):
        go(recipe, stopped, 4)  # in the second of three epochs of three steps
    raw["data"] |= {"long_tail": 8}
    with pytest.raises(InputError, match=r"data\.long_tail: 4\.0 -> 8\.0"):
        go(from_mapping(raw, default_name="toy"), stopped, None, resume="auto")
    go(recipe, stopped, None, resume="auto")
    for part in ("", "control"):
        one, other = whole / part, stopped / part
        assert train_lines(one) == train_lines(other)
        exports = [path / "export" / "model.safetensors" for path in (one, other)]
        assert exports[0].read_bytes() == exports[1].read_bytes()
        status = run.read_status(one)
        assert status["class_images"] == {"a": 24, "b": 15, "c": 9, "d": 6}
        assert status["selected_by"] == "student/macro"
        lines = [line for line in run.read_metrics(one, "eval") if line["split"] == "validation"]
        best = max(line["student/macro"] for line in lines)
        chosen = [line for line in lines if {"step": line["step"], "weights": line["weights"]} == status["exported"]]
        assert [line["student/macro"] for line in chosen] == [best]
        with safe_open(exports[0], "pt") as file:
            assert file.metadata()["validation_macro"] == f"{best:.2f}"
    (check,) = run.read_metrics(whole, "control")
    assert check["equal_batches"] == check["epoch"] == 3
    comparison = compare([whole])
    assert {curve.variant for curve in comparison.curves["macro"]} == {"validation", "validation, EMA"}
    html, markdown, *_ = write_report(comparison, tmp_path / "report.html")
    assert "Macro accuracy" in html.read_text()
    assert "and its mean over the classes is" in markdown.read_text()


def test_a_trainer_weights_its_classes(toy: Toy) -> None:
    assert trainer_of(toy_recipe(toy)).task.class_weights is None
    weights = trainer_of(toy_recipe(toy, data=TAIL)).task.class_weights
    assert weights is not None
    assert weights.tolist() == pytest.approx([54 / 4 / count for count in (24, 15, 9, 6)])
    with pytest.raises(InputError, match="3 weights for 4 classes; give one for each of a, b, c, d"):
        trainer_of(toy_recipe(toy, data={"class_weights": [1.0, 2.0, 3.0]}))
