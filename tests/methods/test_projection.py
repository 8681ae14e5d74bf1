"""Orthogonal projections: the matrix against torch's parametrization and loops, and what training leaves of it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters
from torch.nn.utils import parametrizations

from distill.features import Features
from distill.methods import fitnet, guide
from distill.methods.base import Shapes
from distill.methods.fitnet import Hint
from distill.methods.guide import Guidance
from distill.methods.projection import OrthogonalProjection, standardise
from distill.recipe.schema import Optim
from distill.training.optim import build_optimizer
from tests.methods.helpers import (
    assert_equals_oracle,
    assert_half_is_computed_in_float32,
    build_methods,
    losses_of,
    normal,
    task_of,
    value_and_gradient,
)

WIDTHS = [(3, 5), (5, 3), (4, 4), (1, 3), (3, 1), (192, 64)]
LOSSES: list[tuple[type[Any], str]] = [(Guidance, "projection"), (Hint, "regressor")]


def of_widths(student: int, teacher: int, seed: int = 0) -> OrthogonalProjection:
    torch.manual_seed(seed)
    return OrthogonalProjection(student, teacher)


def assert_orthonormal(matrix: torch.Tensor, tolerance: float = 1e-5) -> None:
    """Of its columns, or of its rows if they are fewer."""
    rows, columns = matrix.shape
    product = matrix @ matrix.T if rows < columns else matrix.T @ matrix
    torch.testing.assert_close(product, torch.eye(min(rows, columns)).to(product), rtol=0, atol=tolerance)


@pytest.mark.parametrize(("student", "teacher"), WIDTHS)
def test_the_matrix_is_that_of_torchs_cayley_map(student: int, teacher: int) -> None:
    module = of_widths(student, teacher).double()
    linear = nn.Linear(student, teacher, bias=False, dtype=torch.float64)
    skew = module.skew.detach().view(max(student, teacher), -1)
    with torch.no_grad():
        linear.weight.copy_(skew.T if teacher < student else skew)
    parametrizations.orthogonal(linear, orthogonal_map="cayley", use_trivialization=False)
    torch.testing.assert_close(module.matrix(), linear.weight, rtol=0, atol=1e-12)
    factors = normal(1, teacher, student)
    (factors * module.matrix()).sum().backward()
    (factors * linear.weight).sum().backward()
    expected: torch.Tensor = linear.parametrizations.weight.original.grad
    assert module.skew.grad is not None
    ours = module.skew.grad.view(max(student, teacher), -1)
    torch.testing.assert_close(ours, expected.T if teacher < student else expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("scale", [1.0, 100.0])
@pytest.mark.parametrize(("student", "teacher"), WIDTHS)
def test_it_is_orthonormal_wherever_training_goes(student: int, teacher: int, scale: float) -> None:
    module = of_widths(student, teacher)
    with torch.no_grad():
        module.skew.mul_(scale)
    assert_orthonormal(module.matrix())


def test_what_it_keeps() -> None:
    """Distances and angles, to as many channels or more; and no scale that could grow."""
    tokens = normal(1, 2, 5, 3, 4)
    for teacher in (5, 9):
        projected = of_widths(5, teacher).double()(tokens)
        flat, ours = (maps.movedim(1, -1).flatten(0, 2) for maps in (tokens, projected))
        torch.testing.assert_close(ours @ ours.T, flat @ flat.T)
    fewer = of_widths(5, 3).double()(tokens)
    assert (fewer.square().sum(1) <= tokens.square().sum(1) + 1e-12).all()


@pytest.mark.parametrize(("loss", "owned"), LOSSES)
def test_it_learns_stays_orthonormal_and_is_not_decayed(loss: type[Any], owned: str) -> None:
    torch.manual_seed(0)
    module = loss(6, 9, "orthogonal")
    assert {name: tuple(p.shape) for name, p in module.named_parameters()} == {f"{owned}.skew": (54,)}
    optimizer = build_optimizer(Optim(lr=0.05, weight_decay=0.5), nn.Linear(2, 2), module)
    decays = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    projection = getattr(module, owned)
    assert decays[id(projection.skew)] == 0.0
    student, teacher = normal(0, 8, 6, 2, 2).float(), normal(1, 8, 9, 4, 4).float()
    before, losses = projection.matrix().detach(), []
    for _ in range(20):
        optimizer.zero_grad()
        value = module(student, teacher)
        value.backward()
        optimizer.step()
        losses.append(value.item())
    assert losses[-1] < losses[0] - 0.02
    assert_orthonormal(projection.matrix())
    assert (projection.matrix() - before).abs().max() > 0.1
    again, other = copy.deepcopy(module), loss(6, 9, "orthogonal")
    other.load_state_dict(module.state_dict())
    for same in (again, other):
        assert torch.equal(same(student, teacher), module(student, teacher))


# Both methods


def oracle(module: Any, owned: str) -> Any:
    """Of maps of the teacher whose sides are twice the student's."""
    matrix = getattr(module, owned).matrix().detach()

    def loss(student: torch.Tensor, teacher: torch.Tensor) -> Any:
        batch, _, height, width = student.shape
        errors = []
        for channel, row in enumerate(matrix):
            means = {}
            for n in range(batch):
                for y in range(height):
                    for x in range(width):
                        patch = teacher[n, channel, 2 * y : 2 * y + 2, 2 * x : 2 * x + 2].tolist()
                        means[n, y, x] = sum(map(sum, patch)) / 4
            mean = sum(means.values()) / len(means)
            variance = sum((value - mean) ** 2 for value in means.values()) / len(means)
            for (n, y, x), value in means.items():
                guess = sum(w * v for w, v in zip(row, student[n, :, y, x], strict=True))
                errors.append((guess - (value - mean) / (variance + 1e-6) ** 0.5) ** 2)
        return sum(errors) / len(errors)

    return loss


@pytest.mark.parametrize("widths", [(3, 4), (4, 3)], ids=str)
@pytest.mark.parametrize(("loss", "owned"), LOSSES)
def test_it_is_its_formula(loss: type[Any], owned: str, widths: tuple[int, int]) -> None:
    torch.manual_seed(0)
    single = loss(*widths, "orthogonal")
    double = copy.deepcopy(single).double()

    def either(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        value: torch.Tensor = (double if student.dtype == torch.float64 else single)(student, teacher)
        return value

    levels = torch.tensor([0.1, 1, 100, 1])[: widths[1]].view(-1, 1, 1)
    teacher = (normal(1, 2, widths[1], 4, 6) * levels + 5).float().double()
    # The teacher's maps are standardised in float32 if they come in it.
    assert_equals_oracle(either, oracle(double, owned), normal(0, 2, widths[0], 2, 3), teacher, tolerance=1e-6)


@pytest.mark.parametrize(("loss", "owned"), LOSSES)
def test_precision_and_extremes(loss: type[Any], owned: str) -> None:
    torch.manual_seed(0)
    module = loss(3, 5, "orthogonal")
    for scale in (1.0, 1000.0):
        student, teacher = normal(0, 2, 3, 4, 4, scale=scale), normal(1, 2, 5, 8, 8, scale=scale)
        assert_half_is_computed_in_float32(module, student, teacher)
    for student in (torch.zeros(2, 3, 4, 4), torch.zeros(1, 3, 1, 1)):
        value, gradient = value_and_gradient(module, student, torch.zeros(len(student), 5, 8, 8))
        assert value.item() == 0
        assert gradient.isfinite().all()
    # The perfect student.
    target = normal(2, 4, 3, 2, 2).float()
    teacher = getattr(module, owned)(standardise(target)).detach()
    value = module(standardise(target), teacher * teacher.new_tensor([1, 2, 3, 4, 5]).view(5, 1, 1) + 7)
    assert value < module(normal(3, 4, 3, 2, 2).float(), teacher)


def test_under_autocast_and_compiled_it_is_the_same() -> None:
    """The task computes losses in float32; the matrix and its gradients are one graph."""
    torch.manual_seed(0)
    options = [guide.Options(projection="orthogonal"), fitnet.Options(projection="orthogonal")]
    methods = build_methods(options, Shapes([6], {"a": 4}, ["a"]))
    heads, targets = {"cls": normal(8, 2, 3).float()}, torch.eye(3)[:2]
    maps, teacher = {0: normal(0, 2, 6, 4, 4).float()}, Features({}, {"a": normal(1, 2, 4, 4, 4).float()})
    task = task_of(methods, heads, maps, teacher)
    expected = losses_of(task, targets).total
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(losses_of(task, targets).total, expected)
    counters.clear()
    module: Any = task.methods["guide"].guidance[0]
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    found = []
    for each in (module, compiled):
        module.zero_grad()
        value = each(maps[0], teacher.maps["a"])
        value.backward()
        found.append((value.detach(), module.projection.skew.grad.clone()))
    torch.testing.assert_close(found[1], found[0])
    assert counters["stats"]["unique_graphs"] == 1
