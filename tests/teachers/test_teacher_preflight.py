from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

import pytest
import torch
from torch import Tensor, nn

from distill.errors import InputError
from distill.inputs import InputContract
from teachers import Teacher, check_accuracy

CLASSES = 10


class _ReadsTheAnswer(nn.Module):
    """Says the class that the first pixel, in tenths, encodes; `order` renames its answers."""

    def __init__(self, order: Tensor | None = None) -> None:
        super().__init__()
        self.order = torch.arange(CLASSES) if order is None else order

    def forward(self, images: Tensor) -> Tensor:
        seen = (images[:, 0, 0, 0] * 10).round().long().clamp(0, CLASSES - 1)
        return torch.eye(CLASSES)[self.order[seen]]


def _teacher(network: nn.Module | None = None, mean: float = 0.0) -> Teacher:
    return Teacher("reader", network or _ReadsTheAnswer(), InputContract((mean,), (1.0,), 2), CLASSES)


def _batches(samples: int, wrong: int, batch: int = 64) -> Iterator[tuple[Tensor, Tensor]]:
    """Images that hold their label, the first `wrong` of them the next class's."""
    labels = torch.arange(samples) % CLASSES
    shown = torch.where(torch.arange(samples) < wrong, (labels + 1) % CLASSES, labels)
    images = (shown / 10).view(-1, 1, 1, 1).expand(-1, 1, 2, 2)
    yield from zip(images.split(batch), labels.split(batch), strict=True)


def _preflight(teacher: Teacher, batches: Iterable[tuple[Tensor, Tensor]], min_accuracy: float | None) -> float:
    """As the trainer does it: all answers first, then the judgement."""
    labels, logits = zip(*((labels, teacher(images)) for images, labels in batches), strict=True)
    return check_accuracy(teacher, torch.cat(labels), torch.cat(logits), min_accuracy=min_accuracy)


def _answers(correct: int, classes: int, samples: int) -> tuple[Tensor, Tensor]:
    """Balanced labels, and logits that answer `correct` of them rightly and the others with the next class."""
    labels = torch.arange(samples) % classes
    answers = torch.where(torch.arange(samples) < correct, labels, (labels + 1) % classes)
    return labels, torch.eye(classes)[answers]


def test_the_accuracy_is_exact_for_any_batches() -> None:
    for batch in (1, 64, 1000):
        assert _preflight(_teacher(), _batches(1000, wrong=37, batch=batch), min_accuracy=None) == 0.963


def test_the_required_accuracy_is_inclusive() -> None:
    assert _preflight(_teacher(), _batches(1000, wrong=100), min_accuracy=0.9) == 0.9
    with pytest.raises(InputError, match=r"reader: 89.90% accuracy on 1000 images, below the required 90.00%"):
        _preflight(_teacher(), _batches(1000, wrong=101), min_accuracy=0.9)
    assert _preflight(_teacher(), _batches(1000, wrong=1000), min_accuracy=0.0) == 0.0


@pytest.mark.parametrize(
    ("classes", "samples", "required"),
    [
        (10, 5000, 0.2),  # twice chance
        (10, 100, 0.1 + 5 * 0.03),  # chance and five deviations of 100 draws
        (2, 5000, 0.75),  # half of the way to perfect
        (1000, 5000, 0.001 + 5 * (0.001 * 0.999 / 5000) ** 0.5),
        (10, 10, 0.55),
    ],
)
def test_well_above_chance(classes: int, samples: int, required: float) -> None:
    teacher = _teacher()
    enough = next(n for n in range(samples + 1) if n / samples >= required)
    check_accuracy(teacher, *_answers(enough, classes, samples), min_accuracy=None)
    with pytest.raises(InputError, match="well above chance"):
        check_accuracy(teacher, *_answers(enough - 1, classes, samples), min_accuracy=None)


def test_always_saying_the_largest_class_is_chance() -> None:
    labels = (torch.arange(1000) >= 900).long()
    logits = torch.tensor([1.0, 0.0]).expand(1000, 2)
    with pytest.raises(InputError, match=r"Likely causes: \(1\) it predicts class 0 for 100% of the images"):
        check_accuracy(_teacher(), labels, logits, min_accuracy=None)


def test_the_message_names_the_contract_and_likely_causes() -> None:
    with pytest.raises(InputError) as caught:
        _preflight(_teacher(mean=-1.0), _batches(1000, wrong=0), min_accuracy=0.5)
    message = str(caught.value)
    for part in (
        "mean (-1)",
        "it predicts class 9 for 100%",
        "normalisation",
        "teacher.weights",
        "order",
        "teacher.min_accuracy",
    ):
        assert part in message


def test_another_class_order_is_recognised() -> None:
    renamed = _teacher(_ReadsTheAnswer(torch.arange(CLASSES).roll(3)))
    with pytest.raises(InputError, match=r"\(1\) its classes in another order .* would reach 100.00%"):
        _preflight(renamed, _batches(1000, wrong=0), min_accuracy=None)


def test_answers_that_are_no_numbers_are_wrong() -> None:
    """argmax takes the first NaN for the largest: "100 %" for a network that answers nothing."""
    labels, logits = _answers(1000, CLASSES, 1000)
    logits[range(100), labels[:100]] = torch.nan
    assert check_accuracy(_teacher(), labels, logits, min_accuracy=0.5) == 0.9
    with pytest.raises(InputError, match=r"90.00% accuracy .* \(1\) its logits are not numbers on 10.00%"):
        check_accuracy(_teacher(), labels, logits, min_accuracy=0.95)
    with pytest.raises(InputError, match=r"0.00% accuracy on 1000 images, below the required 20.00%"):
        check_accuracy(_teacher(), labels, torch.full_like(logits, torch.nan), min_accuracy=None)


@pytest.mark.parametrize(
    ("where", "value", "refused"),
    [("weight", math.nan, True), ("weight", math.inf, True), ("mask", math.nan, True), ("mask", -math.inf, False)],
)
def test_weights_that_are_no_numbers_are_refused_by_name(where: str, value: float, refused: bool) -> None:
    class Masked(_ReadsTheAnswer):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(2, 3)
            self.layer.register_buffer("mask", torch.zeros(4))

    network = Masked()
    with torch.no_grad():
        getattr(network.layer, where).view(-1)[1] = value
    if not refused:
        assert _teacher(network).num_classes == CLASSES
        return
    size = 6 if where == "weight" else 4
    with pytest.raises(InputError, match=rf"reader: its weights are not all numbers: layer\.{where} \(1 of {size} val"):
        _teacher(network)
