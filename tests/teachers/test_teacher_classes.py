"""The order of a teacher's classes: by the recipe, by recorded names, and found by preflight."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import teachers.cifar_resnet  # noqa: F401
from distill.errors import InputError
from distill.inputs import InputContract
from distill.recipe import Teacher as Spec
from teachers import Teacher, check_class_order, load_teacher
from teachers.classes import class_order

DATA = ("airplane", "bird", "car", "cat", "deer")
THEIRS = ("airplane", "automobile", "bird", "cat", "deer")


def _order(classes: Any = None, theirs: Any = THEIRS) -> list[int] | None:
    return class_order(Spec(model="m", classes=classes), theirs, DATA)


@pytest.mark.parametrize(
    ("classes", "theirs"),
    [
        (["airplane", "car", "bird", "cat", "deer"], None),
        ({"car": 1, "bird": 2}, None),
        ({"car": "automobile"}, THEIRS),
        ({"car": 1}, THEIRS),  # bird by its name
        (None, ("airplane", "car", "bird", "cat", "deer")),
        (None, ("Airplane", "CAR", "bird", "cat", "deer")),
    ],
)
def test_each_way_to_say_the_order(classes: Any, theirs: Any) -> None:
    assert _order(classes, theirs) == [0, 2, 1, 3, 4]


@pytest.mark.parametrize(
    "theirs", [None, DATA, ("a", "b", "c", "d", "e"), ("airplane", "b", "c", "cat", "e"), DATA[1:]]
)
def test_names_that_contradict_nothing_change_nothing(theirs: Any) -> None:
    assert _order(None, theirs) is None


def test_one_name_in_two_normal_forms_is_the_same() -> None:
    data, theirs = ("caf\u00e9", "bar"), ("bar", "cafe\u0301")
    assert class_order(Spec(model="m"), theirs, data) == [1, 0]


@pytest.mark.parametrize(
    ("classes", "theirs", "message"),
    [
        (None, THEIRS, "'bird' is its output 2, and class 1 of the data. .*automobile; the data's are car.*classes: {"),
        (["airplane", "car", "bird", "cat", "dear"], None, "'dear' is no class of the data"),
        (["airplane", "car", "bird", "cat"], None, "4 names; list each of the data's 5"),
        ({"automobile": 2}, THEIRS, "'automobile' is no class of the data; give {class of the data: output"),
        ({"car": "auto"}, THEIRS, r"teacher\.classes\.car: no output 'auto': its classes are airplane, automobile"),
        ({"car": "auto"}, None, "no output 'auto': its classes have no names; give its index"),
        ({"car": 1}, None, "each output from 0 to 4 .* that of 'car' is another's too"),
        ({"car": 7}, None, "each output from 0 to 4"),
    ],
)
def test_what_does_not_fit_is_refused(classes: Any, theirs: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        _order(classes, theirs)


@pytest.mark.parametrize("form", ["list", "mapping"])
def test_logits_of_a_folder_come_in_the_order_of_the_data(form: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = timm.create_model("cifar_resnet20", num_classes=5).eval()
    save_file(network.state_dict(), tmp_path / "model.safetensors")
    names = [*reversed(DATA)]
    inputs = {"input_size": [3, 16, 16], "mean": [0.5] * 3, "std": [0.2] * 3, "interpolation": "bilinear"}
    config = {"architecture": "cifar_resnet20", "num_classes": 5, "pretrained_cfg": inputs}
    config["label_names"] = names if form == "list" else {str(index): name for index, name in enumerate(names)}
    (tmp_path / "config.json").write_text(json.dumps(config))
    images, spec = torch.rand(4, 3, 16, 16), {"model": f"local-dir:{tmp_path}"}
    as_they_are, matched = load_teacher(spec, 5), load_teacher(spec, 5, DATA)
    torch.testing.assert_close(matched(images), as_they_are(images).flip(1), rtol=0, atol=0)
    assert matched.digest == as_they_are.digest
    assert "another order" in matched.describe()
    half = matched.with_weights_in(torch.float32)
    torch.testing.assert_close(half(images), matched(images), rtol=0, atol=0)
    explicit = load_teacher(spec | {"classes": [*DATA]}, 5, DATA)
    torch.testing.assert_close(explicit(images), as_they_are(images), rtol=0, atol=0)
    with pytest.raises(InputError, match="class_names"):
        load_teacher(spec | {"classes": [*DATA]}, 5)


def _check(answers: list[int], per_class: int, right: float = 0.9, order: Any = None) -> None:
    """Of a teacher that answers `answers[label]` for `right` of the images of each label, else the label itself."""
    labels = torch.arange(len(DATA)).repeat(per_class)
    says = torch.where(
        torch.arange(len(labels)) // len(DATA) < right * per_class, torch.tensor(answers)[labels], labels
    )
    teacher = Teacher("t", _Constant(), InputContract((0.0,), (1.0,), 2), len(DATA), order)
    check_class_order(teacher, labels, torch.eye(len(DATA))[says], DATA, key="teacher.1")


class _Constant(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return torch.zeros(len(images), len(DATA))


def test_an_exchange_of_two_classes_is_refused_by_name() -> None:
    with pytest.raises(InputError) as caught:
        _check([0, 2, 1, 3, 4], per_class=30)
    message = str(caught.value)
    assert "for 'bird' it answers 'car' (27 of 30 images); for 'car' it answers 'bird' (27 of 30 images)" in message
    assert """set 'teacher.1.classes={"bird": 2, "car": 1}'""" in message
    assert """'teacher.1.classes={"bird": 1, "car": 2}'""" in message


def test_a_longer_cycle_is_refused_too_and_outputs_are_the_networks() -> None:
    """A name that moves by two places: cat -> feline."""
    with pytest.raises(InputError, match=r'set \'teacher.1.classes={"cat": 4, "deer": 3}\''):
        _check([0, 1, 2, 4, 3], per_class=30)
    with pytest.raises(InputError, match=r'classes={"bird": 2, "car": 3, "cat": 1}'):
        _check([0, 2, 3, 1, 4], per_class=30)
    with pytest.raises(InputError, match=r'classes={"bird": 0, "car": 3}'):  # outputs 4, 3, ..., by an earlier order
        _check([0, 2, 1, 3, 4], per_class=30, order=[4, 3, 0, 2, 1])


@pytest.mark.parametrize(
    ("answers", "per_class", "right"),
    [
        ([0, 1, 2, 3, 4], 30, 1.0),
        ([0, 2, 1, 3, 4], 30, 0.45),  # confused, but more often right
        ([0, 2, 1, 3, 4], 2, 1.0),  # too few to tell
        ([0, 2, 2, 3, 4], 30, 1.0),  # one way only
        ([1, 1, 1, 1, 1], 30, 1.0),
    ],
)
def test_ordinary_mistakes_are_not_an_order(answers: list[int], per_class: int, right: float) -> None:
    _check(answers, per_class, right)


def test_a_teacher_that_answers_one_class_for_all_images_exchanges_none() -> None:
    _check([0, 0, 0, 0, 0], per_class=30, right=1.0)
