"""Inputs for the methods, and what holds for all of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from distill import registry
from distill.data import Batch
from distill.features import Features
from distill.methods.base import Method, Shapes
from distill.options import MethodOptions
from distill.students import Student
from distill.teaching.source import StepIndex, TeacherSource
from distill.training.task import Losses, Task

Loss = Callable[[Tensor, Tensor], Tensor]


def normal(seed: int, *shape: int, scale: float = 1.0) -> Tensor:
    """float64, but of float32 values: the teacher's may be rounded to float32 on the way."""
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale).double()


def softmax(row: Tensor) -> list[Tensor]:
    top = max(row.tolist())
    powers = [torch.exp(value - top) for value in row]
    return [power / sum(powers) for power in powers]


def value_and_gradient(loss: Loss, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Of a loss of a student, that of the teacher must not have any."""
    student = student.clone().requires_grad_()
    teacher = teacher.clone().requires_grad_()
    value = loss(student, teacher)
    assert value.shape == ()
    to_student, to_teacher = torch.autograd.grad(value, [student, teacher], allow_unused=True)
    assert to_teacher is None
    return value.detach(), to_student


def assert_equals_oracle(loss: Loss, oracle: Loss, student: Tensor, teacher: Tensor, tolerance: float = 1e-9) -> None:
    """Value and gradient in float64, and those of the same in float32 up to its rounding."""
    expected = oracle(exact := student.clone().requires_grad_(), teacher)
    assert expected.item() > 1e-4, "too small to show a difference"
    gradient = torch.autograd.grad(expected, exact)[0]
    value, found = value_and_gradient(loss, student, teacher)
    assert value.dtype == torch.float64
    torch.testing.assert_close(value, expected.detach(), rtol=tolerance, atol=0)
    torch.testing.assert_close(found, gradient, rtol=tolerance, atol=tolerance * gradient.abs().max().item())
    value, found = value_and_gradient(loss, student.float(), teacher.float())
    torch.testing.assert_close(value.double(), expected.detach(), rtol=1e-5, atol=0)
    torch.testing.assert_close(found.double(), gradient, rtol=1e-4, atol=1e-5 * gradient.abs().max().item())


def assert_half_is_computed_in_float32(loss: Loss, student: Tensor, teacher: Tensor) -> None:
    """And finite, with its gradients; in either half precision."""
    for dtype in (torch.float16, torch.bfloat16):
        halves = student.to(dtype), teacher.to(dtype)
        value, gradient = value_and_gradient(loss, *halves)
        exact, exact_gradient = value_and_gradient(loss, *(half.float() for half in halves))
        assert value.dtype == torch.float32
        assert gradient.dtype == dtype
        assert value.isfinite()
        assert gradient.isfinite().all()
        torch.testing.assert_close(value, exact, rtol=0, atol=0)
        torch.testing.assert_close(gradient, exact_gradient.to(dtype), rtol=0, atol=0)


# A whole step, without networks


class _FixedStudent(nn.Module):
    """Answers the same whatever the images."""

    def __init__(self, heads: Mapping[str, Tensor], maps: Mapping[int, Tensor]) -> None:
        super().__init__()
        self.heads, self.maps = heads, maps

    def forward(
        self, images: Tensor, blocks: tuple[int, ...] = (), side: int | None = None, embed: bool = False
    ) -> Any:
        return Features(self.heads, {block: self.maps[block] for block in blocks})


class _FixedSource(TeacherSource):
    def __init__(self, answer: Features) -> None:
        self.answer = answer

    def ask(self, views: Sequence[Tensor], index: StepIndex) -> list[Features]:
        return [self.answer for _ in views]


def build_methods(options: Sequence[MethodOptions], shapes: Shapes) -> dict[str, Method]:
    return {one.method: registry.find("methods", one.method).implementation(one, shapes) for one in options}


def task_of(
    methods: Mapping[str, Method],
    heads: Mapping[str, Tensor],
    student_maps: Mapping[int, Tensor],
    teacher: Features | None,
    *,
    label_smoothing: float = 0.0,
    weights: Mapping[str, float] | None = None,
) -> Task:
    """A step's task on these answers of student and teacher; the weights are 1 where none are given."""
    return Task(
        cast(Student, _FixedStudent(heads, student_maps)),
        methods,
        None if teacher is None else _FixedSource(teacher),
        label_smoothing=label_smoothing,
        weights=lambda progress: weights or dict.fromkeys(["label", *methods], 1.0),
    )


def losses_of(task: Task, targets: Tensor) -> Losses:
    """Halfway through the run."""
    size = len(targets)
    batch = Batch(torch.zeros(size, 3, 8, 8), targets, targets.argmax(1), torch.arange(size))
    losses: Losses = task(batch, StepIndex(0, 0), 0.5)
    return losses
