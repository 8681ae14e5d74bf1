"""What runs, models and networks are called and cost, and what compared runs have in common."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from distill.errors import InputError
from distill.files.checksum import CHECKSUM
from distill.files.tensors import write_tensors
from distill.report.answer import answer, main_table
from distill.report.comparison import compare
from distill.report.document import write_report
from distill.report.networks import TOGETHER, Measurement
from distill.report.page import Attention, Plot, Table
from distill.report.sections import cost, int8, made, tokens
from distill.report.sections.learning import draw
from distill.report.standing import standings
from distill.report.statistics import mcnemar
from tests.report.conftest import DIGEST, MakeRun

SOFT: dict[str, Any] = {
    "name": "soft",
    "seed": 0,
    "teacher": {"model": "cifar_resnet20"},
    "student": {"model": "vit_nano"},
    "distill": [{"method": "soft"}],
}
CONTROL = SOFT | {"name": "plain", "teacher": None, "distill": [], "label_weight": 1.0}
RESNET = "cifar_resnet20: 0.27 M parameters, 10 classes, inputs mean (0.5), std (0.5), 32 px by bicubic, weights "
STUDENT_ONLY = ("student.fused",)


def test_a_run_that_is_a_control_is_called_one_and_serves_as_one(make_run: MakeRun) -> None:
    runs = [make_run("soft", recipe=SOFT), make_run("plain", outputs=STUDENT_ONLY, seed=1, recipe=CONTROL)]
    comparison = compare(runs)
    assert comparison.roles == {"soft": "student", "plain": "control"}
    control = comparison.control_of("soft")
    assert control is not None
    assert comparison.name(control) == "plain: control"
    assert "The same network trained without the teacher reaches" in answer(comparison)
    assert answer(compare(runs[1:])).startswith("The student without teacher (vit_nano) answers")
    assert [student.called for student in standings(comparison)] == ["soft"]
    other = compare([runs[0], make_run("other", outputs=STUDENT_ONLY, seed=2, recipe=CONTROL | {"seed": 4})])
    assert other.roles["other"] == "student without teacher"
    assert other.control_of("soft") is None


def test_a_teachers_run_is_called_one(make_run: MakeRun) -> None:
    weights = {"runs/teachers/resnet8-0123456789ab/export/model.safetensors": "00" * 32}
    own = make_run("resnet8-0123456789ab", outputs=STUDENT_ONLY, recipe=CONTROL | {"student": {"model": "resnet8"}})
    taught = make_run("taught", seed=1, recipe=SOFT, status={"teacher_weights": weights})
    assert compare([taught, own]).roles["resnet8-0123456789ab"] == "teacher"
    assert compare([own]).roles == {"resnet8-0123456789ab": "student without teacher"}
    assert compare([make_run("teachers/x", outputs=STUDENT_ONLY, recipe=CONTROL)]).roles == {"x": "teacher"}


def test_teachers_are_called_by_name_everywhere(make_run: MakeRun, tmp_path: Path) -> None:
    runs = [make_run(name, seed=seed, recipe=SOFT | {"seed": seed}, described=f"{RESNET}1c1c9302", analysis=True)
            for seed, name in enumerate(("a", "b"))]  # fmt: skip
    comparison = compare(runs)
    teacher = comparison.teacher_of("b")
    assert teacher is not None
    assert comparison.name(teacher) == "b: teacher cifar_resnet20"  # its logits are not those of a's
    page = write_report(comparison, tmp_path / "report.html")[0].read_text()
    assert "b: student and teacher cifar_resnet20 disagree" in page
    labels = [line.get_label() for line in draw(comparison, "top1").axes.get_lines()]
    assert "a: teacher cifar_resnet20 (test)" in labels
    assert "<h1>soft</h1>" in page


def test_a_network_has_one_speed_and_others_are_marked_apart(make_run: MakeRun) -> None:
    runs = [make_run(name, seed=seed, recipe=recipe, described=f"{RESNET}{seed}", analysis=True, latency=latency)
            for name, seed, recipe, latency in (
                ("a", 0, SOFT, 0.004), ("b", 1, SOFT | {"distill": [{"method": "hard"}]}, 0.008),
                ("c", 2, SOFT | {"student": {"model": "vit_micro"}}, 0.016),
            )]  # fmt: skip
    comparison = compare(runs)
    rows = {name: comparison.row(name, "student") for name in comparison.runs}
    assert all(rows.values())
    costs = {name: comparison.costs(row) for name, row in rows.items() if row}
    assert [costs[name]["latency_ms"] for name in "abc"] == [4.0, 4.0, 16.0]
    assert [costs[name]["measured_apart"] is None for name in "abc"] == [True, True, False]
    ratios = {student.name: student.ratios["latency_ms"] for student in standings(comparison)}
    assert ratios == {"a": 2.0, "b": 2.0, "c": 2.0}
    section = cost.build(comparison)
    assert section is not None
    plots = {part.name: part for part in section.parts if isinstance(part, Plot)}
    assert len(plots["cost-latency_ms"].chart.axes.get_lines()) == 5  # three teachers and two students
    assert plots["cost-latency_ms"].caption.endswith("Without c: student: measured apart.")
    table = main_table(comparison)
    assert "speed" in table.header
    assert sum("apart, on cpu" in cell.text for row in table.rows for cell in row) == 3
    together = Measurement(TOGETHER, "this machine", {
        network: {"flops": 1e9, "bytes": 1e6, "images_per_second": 10.0, "latency_seconds": 0.1, "batch": 8}
        for network in comparison.networks
    })  # fmt: skip
    measured = replace(comparison, measured=(together, *comparison.measured))
    assert len(comparison.networks) == 3
    assert {measured.costs(row)["latency_ms"] for row in measured.rows} == {100.0}
    assert "all in turns for this report" in main_table(measured).caption


def test_curves_end_where_the_run_ended(make_run: MakeRun) -> None:
    path = make_run(epochs=2)
    with (path / "metrics.jsonl").open("a") as file:
        file.write('{"event": "train", "step": 5, "epoch": 2.2, "loss": 1.0}\n')
        file.write('{"event": "train", "step": 6, "epoch": 2.4, "loss": 3.0}\n')
    (loss,) = compare([path]).curves["loss"]
    assert loss.epochs == (1, 2, 2.4)
    assert loss.values[-1] == 2.0


def test_what_one_recipe_leaves_unset_is_no_difference(make_run: MakeRun) -> None:
    runs = [
        make_run("older", recipe=SOFT),
        make_run("newer", seed=1, recipe=SOFT | {"train": {"log_gradient_share": False, "epochs": 7}}),
        make_run("plain", seed=2, outputs=STUDENT_ONLY, recipe=CONTROL),
    ]
    for paths, expected in (
        (runs[:2], {"train.epochs"}),
        ([runs[0], runs[2]], {"name", "teacher", "distill", "label_weight"}),
    ):
        section = made.build(compare(paths))
        assert section is not None
        (table,) = (part for part in section.parts if isinstance(part, Table) and part.name == "differences")
        assert {row[0].text for row in table.rows} == expected


def test_attention_is_shown_of_the_same_images(make_run: MakeRun) -> None:
    runs = [make_run("a", seed=0, analysis=True), make_run("b", seed=1, analysis=True)]
    file = runs[1] / "analysis.safetensors"
    tensors = load_file(file) | {"attention.indices": np.array([3, 4])}
    write_tensors(file, _torch(tensors), {"format": "1", "data": DIGEST, CHECKSUM: ""})
    section = tokens.build(compare(runs))
    assert section is not None
    shown = [part for part in section.parts if isinstance(part, Attention)]
    assert [[caption for _, caption, _ in part.pictures] for part in shown] == [
        [f"class {label} (test image 3)"]
        for label in [int(load_file(runs[0] / "predictions.safetensors")["labels"][3])] * 2
    ]
    assert [part.title for part in shown] == ["a: attention", "b: attention"]


def _torch(tensors: dict[str, Any]) -> dict[str, Any]:
    import torch

    return {name: torch.from_numpy(values) for name, values in tensors.items()}


INT8 = {
    "format": "1", "data": DIGEST, "head": "fused", "images": 40, "correct": [30, 29], "only_int8_right": 2,
    "only_float32_right": 3, "agreements": 33, "latency_seconds": [0.004, 0.002], "bytes": [3_000_000, 900_000],
    "kept": ["head"], "machine": "AMD EPYC", "threads": 2, "onnxruntime": "1.23.0",
}  # fmt: skip


def test_an_int8_file_has_a_row_and_a_section(make_run: MakeRun, tmp_path: Path) -> None:
    path = make_run()
    (path / "int8.json").write_text(json.dumps(INT8))
    comparison = compare([path, make_run("other", seed=1)])
    table = main_table(comparison)
    (row,) = [row for row in table.rows if row[1].text == "student, int8"]
    assert [cell.text for cell in row if cell.text][:3] == ["run", "student, int8", "72.50"]
    section = int8.build(comparison)
    assert section is not None
    float32, quantized = section.data
    a, b = np.arange(40) < 29, (np.arange(40) >= 2) & (np.arange(40) < 32)
    test = mcnemar("int8", "float32", a, b)
    assert (test.only_first_right, test.only_second_right) == (2, 3)
    assert (quantized["points"], quantized["p"]) == (-2.5, test.p)
    assert quantized["interval"] == [test.low, test.high]
    assert (float32["top1"], quantized["agreement"], quantized["latency_ms"]) == (75.0, 82.5, 2.0)
    assert "head left in float32" in section.says
    text = write_report(comparison, tmp_path / "report.html")[1].read_text()
    assert "AMD EPYC, 2 threads" in text
    assert int8.build(compare([make_run("third")])) is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data": "ee" * 32}, r"int8\.json: measured on other data"),
        ({"only_int8_right": 1}, r"int8\.json: the counts of right answers do not fit together"),
        ({"agreements": 41}, r"int8\.json: more answers than images"),
        ({"correct": [30]}, r"int8\.json: correct: "),
    ],
)
def test_a_damaged_int8_file_is_refused(make_run: MakeRun, change: dict[str, Any], message: str) -> None:
    path = make_run()
    (path / "int8.json").write_text(json.dumps(INT8 | change))
    with pytest.raises(InputError, match=message):
        compare([path])
