"""Which rows and curves a comparison has, and which runs it refuses."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from safetensors.numpy import load_file, save_file

from distill.errors import InputError
from distill.report.comparison import Comparison, compare
from distill.report.document import write_report
from distill.report.page import Table
from distill.report.sections import cost
from distill.report.tables import render_console

MakeRun = Callable[..., Path]


def rows(path: Path) -> list[tuple[str, str | None, int | None]]:
    return [(row.model, row.head, row.parameters) for row in compare([path]).rows]


@pytest.mark.parametrize(
    ("described", "label"),
    [
        ("cifar_resnet20: 0.27 M parameters", "teacher cifar_resnet20"),
        ("hf-hub:timm/resnet18.a1_in1k: 11.7 M parameters", "teacher hf-hub:timm/resnet18.a1_in1k"),
        ("local-dir:runs/teachers/digits_cnn-d3d972ac6091/export: 0.27 M parameters", "teacher digits_cnn"),
        ("local-dir:models/my-cnn: 3 M parameters", "teacher my-cnn"),
    ],
)
def test_a_teacher_has_a_name_to_tell_it_by(make_run: MakeRun, described: str, label: str) -> None:
    assert compare([make_run(described=described)]).rows[0].label == label


def test_every_head_of_student_and_control_has_a_row(make_run: MakeRun) -> None:
    path = make_run(control=True)
    comparison = compare([path])
    assert rows(path) == [
        ("teacher", None, 853_018),
        *((model, head, 684_404) for model in ("student", "control") for head in ("fused", "cls", "dist")),
    ]
    own, control = (load_file(folder / "predictions.safetensors") for folder in (path, path / "control"))
    keys = ["teacher", *["student.fused", "student.cls", "student.dist"] * 2]
    for row, tensors, key in zip(comparison.rows, [own] * 4 + [control] * 3, keys, strict=True):
        decisions = tensors[key].argmax(1)
        assert row.metrics.top1_correct == (decisions == own["labels"]).sum()
        # The control's file holds no teacher; it is measured against the run's.
        expected = None if key == "teacher" else (decisions == own["teacher"].argmax(1)).sum()
        assert row.metrics.agreements == expected


@pytest.mark.parametrize(
    ("outputs", "expected"),
    [
        (("student.fused",), [("student", None)]),
        (("student.fused", "student.cls"), [("student", None)]),
        (("student.fused", "teacher"), [("teacher", None), ("student", None)]),
        (("student.fused", "student.cls", "student.dist"), [("student", head) for head in ("fused", "cls", "dist")]),
    ],
)
def test_missing_pieces_shorten_the_table(make_run: MakeRun, outputs: tuple, expected: list) -> None:
    assert [row[:2] for row in rows(make_run(outputs=outputs))] == expected


def test_files_beside_predictions_and_status_are_optional(make_run: MakeRun) -> None:
    path = make_run()
    for name in ("metrics.jsonl", "environment.json", "resolved.yaml"):
        (path / name).unlink()
    (path / "status.json").write_text('{"state": "finished"}')
    comparison = compare([path])
    assert len(comparison.rows) == 4
    assert comparison.curves["loss"] == comparison.curves["top1"] == []
    assert all(row.parameters is None for row in comparison.rows)


@pytest.mark.parametrize("state", ["running", "interrupted", "failed"])
@pytest.mark.parametrize("part", ["", "control"])
def test_unfinished_runs_are_refused_by_name(make_run: MakeRun, state: str, part: str) -> None:
    path = make_run(control=True)
    (path / part / "status.json").write_text(json.dumps({"state": state}))
    with pytest.raises(InputError) as caught:
        compare([path])
    assert state in str(caught.value)
    assert str(caught.value).startswith(f"{path / part}: ")


def test_what_is_no_run_is_refused_by_name(make_run: MakeRun, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nowhere: no such run directory"):
        compare([tmp_path / "nowhere"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"empty: not a run directory"):
        compare([tmp_path / "empty"])
    path = make_run()
    (path / "predictions.safetensors").unlink()
    with pytest.raises(InputError, match=r"predictions\.safetensors: no such file"):
        compare([path])
    with pytest.raises(InputError, match="at least one"):
        compare([])


@pytest.mark.parametrize("name", ["status.json", "environment.json", "metrics.jsonl", "resolved.yaml"])
@pytest.mark.parametrize("text", ["{broken", "[1, 2]"])
def test_damaged_files_are_refused_by_name(make_run: MakeRun, name: str, text: str) -> None:
    path = make_run()
    (path / name).write_text(text)
    with pytest.raises(InputError) as caught:
        compare([path])
    assert name in str(caught.value)


def test_different_test_sets_are_refused_by_name(make_run: MakeRun) -> None:
    one, same = make_run("one"), make_run("same", seed=5)
    assert len(compare([one, same]).rows) == 8
    labels, digest = make_run("labels", labels_seed=8), make_run("digest", status={"data_digest": "ee" * 32})
    for other in (labels, digest):
        with pytest.raises(InputError) as caught:
            compare([one, same, other])
        assert str(one) in str(caught.value)
        assert str(other) in str(caught.value)
        assert "different test sets" in str(caught.value)
    with pytest.raises(InputError, match="given twice"):
        compare([one, one / ".." / "one"])


def test_a_control_on_another_test_set_is_refused(make_run: MakeRun) -> None:
    path = make_run(control=True)
    (path / "control" / "status.json").write_text(json.dumps({"state": "finished", "data_digest": "ee" * 32}))
    with pytest.raises(InputError, match="control were evaluated on different test sets"):
        compare([path])


def test_runs_of_the_same_name_go_by_their_paths(make_run: MakeRun) -> None:
    paths = [make_run("a/run"), make_run("b/run", seed=1), make_run("other", seed=2)]
    assert list(compare(paths).runs) == [str(paths[0]), str(paths[1]), "other"]


def test_curves_have_a_point_an_epoch(make_run: MakeRun) -> None:
    curves = compare([make_run(ema=True, control=True)]).curves
    assert [(curve.model, curve.epochs) for curve in curves["loss"]] == [
        ("student", (1, 2, 3, 4)),
        ("control", (1, 2, 3, 4)),
    ]
    assert np.allclose(curves["loss"][0].values, [2 / epoch + 0.5 for epoch in (1, 2, 3, 4)], rtol=1e-12)
    found = {(curve.model, curve.variant): curve.values for curve in curves["top1"]}
    assert found == {
        ("student", "validation"): (51, 52, 53, 54),
        ("student", "validation, EMA"): (52, 53, 54, 55),
        ("control", "validation"): (51, 52, 53, 54),
    }


def test_selection_on_the_test_set_is_said(make_run: MakeRun) -> None:
    assert compare([make_run("good")]).warnings == ()
    comparison = compare([make_run("bad", select_on="test", control=True)])
    assert len(comparison.warnings) == 1
    assert {curve.variant for curve in comparison.curves["top1"]} == {"test"}
    text = console_text(comparison)
    assert "select_on: test" in text
    assert "optimistic" in text


def test_rows_that_are_no_numbers_are_said_and_every_figure_is_one(make_run: MakeRun, tmp_path: Path) -> None:
    path = make_run("run", control=True, analysis=True, strength=2.0)
    tensors = load_file(path / "predictions.safetensors")
    tensors["student.fused"][:3] = np.nan
    tensors["teacher"][2:4] = np.nan
    save_file(tensors, path / "predictions.safetensors")
    comparison = compare([path])
    assert [text.split(";")[0] for text in comparison.warnings] == [
        "run, teacher: 2 of 40 rows of logits are not numbers",
        "run, student, both heads: 3 of 40 rows of logits are not numbers",
    ]
    student = comparison.row("run", "student")
    assert student is not None
    answers = tensors["student.fused"].argmax(1)
    same = (answers == tensors["teacher"].argmax(1))[4:].sum()
    assert student.metrics.top1_correct == (answers == tensors["labels"])[3:].sum()
    assert student.metrics.agreements == same  # row 3 has no answer of the teacher's
    write_report(comparison, tmp_path / "report.html")
    text = (tmp_path / "report.json").read_text()
    assert "NaN" not in text
    calibration = json.loads(text)["calibration"]
    assert all(isinstance(record["ece"], float) and isinstance(record["nll"], float) for record in calibration)


def test_numbers_that_are_none_are_not_drawn(make_run: MakeRun) -> None:
    path = make_run(epochs=2)
    with (path / "metrics.jsonl").open("a") as file:
        file.write(
            '{"event": "train", "step": 9, "epoch": 3, "loss": NaN}\n{"event": "train", "step": 9, "epoch": 4}\n'
        )
    assert compare([path]).curves["loss"][0].epochs == (1, 2)


def console_text(comparison: Comparison) -> str:
    console = Console(width=80)
    with console.capture() as capture:
        console.print(render_console(comparison))
    return " ".join(capture.get().split())


def test_console_table_shows_the_figures(make_run: MakeRun) -> None:
    comparison = compare([make_run(control=True)])
    text = console_text(comparison)
    for row in comparison.rows:
        for shown in (row.label, f"{row.metrics.top1:.2f}", f"{row.metrics.topk:.2f}", f"{row.parameters:,}"):
            assert shown in text
    assert "control, dist. head" in text


def test_run_names_are_no_console_markup(make_run: MakeRun) -> None:
    comparison = compare([make_run("[red]a"), make_run("[b]", seed=1)])
    text = console_text(comparison)
    assert "[red]a" in text
    assert "[b]" in text


def test_the_report_builds_no_model() -> None:
    code = "import sys, distill.report; print({'torch', 'timm', 'accelerate', 'teachers'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_the_time_of_a_run_stands_by_what_it_went_to(make_run: MakeRun) -> None:
    seconds = {"training": 90.0, "compilation": 5.0, "evaluation": 8.5, "analysis": 0.0}
    section = cost.build(compare([make_run(status={"seconds": seconds})]))
    assert section is not None
    (table,) = (part for part in section.parts if isinstance(part, Table) and part.name == "training")
    assert [*table.header][-3:] == ["training", "compilation", "evaluation"]
    assert [[entry.sort for entry in row[-3:]] for row in table.rows] == [[90.0, 5.0, 8.5]]
