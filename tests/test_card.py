"""What a model card says, and that nothing in it does anything."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt

from distill.errors import InputError
from distill.exports.card import Card, Result, check_license, data_name, render
from distill.recipe import Data
from distill.report.metrics import Metrics, measure
from distill.students import Student, build_student, one_head
from tests.students.helpers import student_options

HOSTILE = "x\n---\n# [a](javascript:b) <script>c</script> | `d` ![e](f) \x1b[31m: {g}"


def build(**spec: Any) -> Student:
    return build_student(
        student_options(model="vit_nano", patch_size=8, **spec),
        resolution=16, num_classes=3, channels=3, mean=(0.5,) * 3, std=(0.2,) * 3, seed=0,
    )  # fmt: skip


def metrics(correct: int) -> Metrics:
    logits = np.eye(3)[[0] * correct + [1] * (10 - correct)]
    return measure(logits, np.zeros(10, dtype=np.int64))


RESULTS = [
    Result("teacher", None, metrics(9), 1234),
    *(Result("student", head, metrics(count), 5678) for head, count in (("fused", 7), ("cls", 6), ("dist", 5))),
    Result("control", None, metrics(4), 5678),
]
CARD = Card("nano", "cifar10", ["cat", "dog", "frog"], {"teacher": "cifar_resnet20", "step": "7"}, RESULTS)


def test_the_front_matter_is_what_the_hub_reads() -> None:
    data = ModelCard(render(CARD, build())).data
    assert (data.library_name, data.pipeline_tag, data.license) == ("timm", "image-classification", "unknown")
    assert (data.datasets, data.metrics) == (["uoft-cs/cifar10"], ["accuracy"])
    assert {"timm", "knowledge-distillation"} <= set(data.tags)
    (result,) = data.eval_results
    assert (result.metric_type, result.metric_value) == ("accuracy", 0.7)
    assert (result.dataset_type, result.dataset_split) == ("uoft-cs/cifar10", "test")
    licensed = ModelCard(render(replace(CARD, license="apache-2.0"), build())).data
    assert licensed.license == "apache-2.0"


@pytest.mark.parametrize(("head", "accuracy"), [("fused", "70.00"), ("cls", "60.00"), ("dist", "50.00")])
def test_the_accuracy_is_that_of_what_is_exported(head: str, accuracy: str) -> None:
    student = build()
    card = replace(CARD, head=head)
    assert card.metadata == {
        "teacher": "cifar_resnet20", "step": "7", "accuracy": accuracy, "head": head, "dtype": "float32",
    }  # fmt: skip
    text = render(card, student if head == "fused" else one_head(student, head))
    (result,) = ModelCard(text).data.eval_results
    assert f"{100 * result.metric_value:.2f}" == accuracy
    answer = {
        "fused": "the mean of its two heads",
        "cls": "its class head alone",
        "dist": "its distillation head alone",
    }
    assert f"It answers with {answer[head]}." in text


def test_all_that_was_measured_is_in_the_table() -> None:
    text = render(CARD, build())
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]
    assert [row[:2] for row in rows[2:]] == [
        ["teacher", "90.00"], ["student, both heads", "70.00"], ["student, class head", "60.00"],
        ["student, distillation head", "50.00"], ["control", "40.00"],
    ]  # fmt: skip
    assert rows[0][2] == "top-3 %"
    assert "10 test images of cifar10" in text
    assert "trained on the same batches without the teacher" in text
    assert "The control" not in render(replace(CARD, results=RESULTS[:-1]), build())


def test_before_the_test_set_is_read_there_is_no_table() -> None:
    text = render(replace(CARD, results=[], origin={}), build())
    assert "## Results" not in text
    assert "trained without a teacher" in text
    assert "accuracy" not in replace(CARD, results=[]).metadata
    assert ModelCard(text).data.eval_results is None


def test_how_to_load_share_and_use_it() -> None:
    own, stock = (
        render(CARD, student) for student in (build(attention={"kind": "area", "max_area": 2, "blocks": [0]}), build())
    )
    for text in (own, stock):
        for needed in (
            "distill.load_student(",
            "distill predict",
            "hf upload",
            '"hf_hub:',
            "## Intended use",
            "cat, dog",
        ):
            assert needed in text
    assert "import distill.students" in own
    assert "import distill.students" not in stock
    many = replace(CARD, class_names=[f"class {number}" for number in range(1000)])
    assert "class 19 and 980 more" in render(many, build())


def test_names_do_nothing() -> None:
    hostile = Card(HOSTILE, HOSTILE, [HOSTILE] * 3, {"teacher": HOSTILE, HOSTILE: HOSTILE}, RESULTS)
    text = render(hostile, build())
    card = ModelCard(text)
    assert card.data.model_name == HOSTILE
    assert card.data.library_name == "timm"
    assert re.fullmatch(r"[\w./-]+", card.data.datasets[0])
    assert "\x1b" not in card.text
    html = MarkdownIt().enable("table").render(card.text)
    assert "<script" not in html
    assert "javascript:" not in re.sub(r">[^<]*<", "><", html)
    assert html.count("<h1>") == 1
    assert "<img" not in html


@pytest.mark.parametrize(
    ("spec", "name"),
    [
        ({"name": "cifar10"}, "cifar10"),
        ({"name": "toy.safetensors"}, "toy"),
        ({"name": "folder", "root": "somewhere/flowers"}, "flowers"),
    ],
)
def test_data_are_called_what_people_call_them(spec: dict[str, str], name: str) -> None:
    assert data_name(Data(**spec)) == name


@pytest.mark.parametrize("text", ["", "Apache 2", "mit\nx: y", "-"])
def test_licences_are_identifiers(text: str) -> None:
    assert check_license("cc-by-4.0") == "cc-by-4.0"
    with pytest.raises(InputError, match="--license"):
        check_license(text)
