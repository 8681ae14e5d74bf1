from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from distill.errors import InputError
from distill.inputs import InputContract
from teachers import Teacher, count, judge, preflight

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


def _counts(correct: int, classes: int, samples: int) -> Tensor:
    """Balanced labels, `correct` of them answered rightly, the others with the next class."""
    labels = torch.arange(samples) % classes
    answers = torch.where(torch.arange(samples) < correct, labels, (labels + 1) % classes)
    return torch.bincount(labels * classes + answers, minlength=classes**2).view(classes, classes)


def test_counts_are_exact_for_any_batches() -> None:
    for batch in (1, 64, 1000):
        counts = count(_teacher(), _batches(1000, wrong=37, batch=batch))
        assert (int(counts.sum()), int(counts.diagonal().sum())) == (1000, 963)
        assert counts.sum(1).tolist() == [100] * CLASSES  # rows are labels
        assert counts[0, 1] == 4
        assert counts[1, 0] == 0


def test_counts_of_processes_add_up() -> None:
    batches = list(_batches(1000, wrong=37))
    whole = count(_teacher(), batches)
    assert torch.equal(count(_teacher(), batches[0::2]) + count(_teacher(), batches[1::2]), whole)
    assert preflight(_teacher(), batches, min_accuracy=None) == judge(_teacher(), whole, min_accuracy=None) == 0.963


def test_the_required_accuracy_is_inclusive() -> None:
    assert preflight(_teacher(), _batches(1000, wrong=100), min_accuracy=0.9) == 0.9
    with pytest.raises(InputError, match=r"reader: 89.90% accuracy on 1000 images, below the required 90.00%"):
        preflight(_teacher(), _batches(1000, wrong=101), min_accuracy=0.9)
    assert preflight(_teacher(), _batches(1000, wrong=1000), min_accuracy=0.0) == 0.0


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
    judge(teacher, _counts(enough, classes, samples), min_accuracy=None)
    with pytest.raises(InputError, match="well above chance"):
        judge(teacher, _counts(enough - 1, classes, samples), min_accuracy=None)


def test_always_saying_the_largest_class_is_chance() -> None:
    counts = torch.tensor([[900, 0], [100, 0]])
    with pytest.raises(InputError, match=r"Likely causes: \(1\) it says class 0 to 100% of the images"):
        judge(_teacher(), counts, min_accuracy=None)


def test_the_message_names_the_contract_and_likely_causes() -> None:
    with pytest.raises(InputError) as caught:
        preflight(_teacher(mean=-1.0), _batches(1000, wrong=0), min_accuracy=0.5)
    message = str(caught.value)
    for part in (
        "mean (-1)",
        "it says class 9 to 100%",
        "normalisation",
        "teacher.weights",
        "order",
        "teacher.min_accuracy",
    ):
        assert part in message


def test_another_class_order_is_recognised() -> None:
    renamed = _teacher(_ReadsTheAnswer(torch.arange(CLASSES).roll(3)))
    with pytest.raises(InputError, match=r"\(1\) its classes in another order .* would give 100.00%"):
        preflight(renamed, _batches(1000, wrong=0), min_accuracy=None)
