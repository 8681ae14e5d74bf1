"""Locality guidance against loops, and over two processes against one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from distill.methods.guide import Guidance
from distill.methods.maps import resize
from distill.methods.projection import standardise
from tests.methods.helpers import (
    assert_equals_oracle,
    assert_half_is_computed_in_float32,
    normal,
    value_and_gradient,
)
from tests.warm import _context


def guide(seed, student_channels, teacher_channels):
    torch.manual_seed(seed)
    return Guidance(student_channels, teacher_channels)


def oracle(module):
    """Of maps of the teacher whose sides are a multiple of the student's."""
    weight, bias = module.projection.weight.detach().double(), module.projection.bias.detach().double()

    def loss(student, teacher):
        batch, _, height, width = student.shape
        ratio = teacher.shape[2] // height
        errors = []
        for channel in range(len(weight)):
            means = {}
            for n in range(batch):
                for y in range(height):
                    for x in range(width):
                        patch = teacher[n, channel, y * ratio : (y + 1) * ratio, x * ratio : (x + 1) * ratio].tolist()
                        means[n, y, x] = sum(map(sum, patch)) / ratio**2
            mean = sum(means.values()) / len(means)
            variance = sum((value - mean) ** 2 for value in means.values()) / len(means)
            for (n, y, x), value in means.items():
                products = zip(weight[channel, :, 0, 0], student[n, :, y, x], strict=True)
                guess = bias[channel] + sum(w * v for w, v in products)
                errors.append((guess - (value - mean) / (variance + 1e-6) ** 0.5) ** 2)
        return sum(errors) / len(errors)

    return loss


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("size", [(2, 3), (4, 6)], ids=["same", "larger"])
def test_it_is_its_formula(batch, size):
    single, double = guide(0, 3, 4), guide(0, 3, 4).double()

    def loss(student, teacher):
        return (double if student.dtype == torch.float64 else single)(student, teacher)

    # Channels whose scales and means are orders of magnitude apart.
    teacher = normal(1, batch, 4, *size) * torch.tensor([0.1, 1, 100, 1]).view(4, 1, 1) + torch.tensor(
        [0, 5.0, -30, 0]
    ).view(4, 1, 1)
    assert_equals_oracle(loss, oracle(double), normal(0, batch, 3, 2, 3), teacher.float().double(), tolerance=1e-6)


def test_zero_when_the_projection_makes_the_target():
    module = guide(0, 3, 5)
    student, teacher = normal(0, 4, 3, 4, 4).float(), normal(1, 4, 5, 4, 4).float()
    target = standardise(teacher)
    assert module(student, teacher).item() > 0.1
    # Tokens that are the target, and a projection that hands them on.
    module = guide(0, 5, 5)
    torch.nn.init.eye_(module.projection.weight.data[:, :, 0, 0])
    torch.nn.init.zeros_(module.projection.bias)
    assert module(target, teacher).item() == pytest.approx(0, abs=1e-12)
    assert module(target, F.interpolate(teacher, scale_factor=2)).item() == pytest.approx(0, abs=1e-10)
    assert module(target + 1, teacher).item() == pytest.approx(1, rel=1e-5)


def test_one_where_the_projection_says_nothing():
    module = guide(0, 3, 5)
    torch.nn.init.zeros_(module.projection.weight)
    torch.nn.init.zeros_(module.projection.bias)
    teacher = 7 + normal(1, 4, 5, 8, 8, scale=30).float()
    assert module(normal(0, 4, 3, 4, 4).float(), teacher).item() == pytest.approx(1, rel=1e-5)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.floats(-1, 4), st.floats(-100, 100))
def test_what_does_not_matter(seed, exponent, shift):
    """A channel's scale and mean; the order of samples; and nothing makes it negative."""
    module = guide(seed, 3, 4).double()
    student, teacher = normal(seed, 4, 3, 2, 2), normal(seed + 1, 4, 4, 4, 4)
    loss = module(student, teacher)
    assert loss.item() >= 0
    factors, shifts = torch.ones(4, 1, 1), torch.zeros(4, 1, 1)
    factors[1], shifts[2] = 10**exponent, shift
    torch.testing.assert_close(module(student, teacher * factors + shifts), loss, rtol=5e-3, atol=0)
    order = torch.randperm(4, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(module(student[order], teacher[order]), loss)


def test_standardised_maps():
    maps = normal(0, 5, 3, 4, 6, scale=20) + 3
    found = standardise(maps)
    torch.testing.assert_close(found.mean((0, 2, 3)), torch.zeros(3).double(), rtol=0, atol=1e-12)
    torch.testing.assert_close(found.var((0, 2, 3), correction=0), torch.ones(3).double(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("level", [0.0, 1.0, -3e4])
def test_a_dead_channel_is_zero(level):
    teacher = normal(1, 2, 4, 4, 4).float()
    teacher[:, 1] = level
    assert (standardise(teacher)[:, 1] == 0).all()
    value, gradient = value_and_gradient(guide(0, 3, 4), normal(0, 2, 3, 2, 2).float(), teacher)
    assert value.isfinite()
    assert gradient.isfinite().all()


def test_one_sample_on_a_grid_of_one():
    """Nothing varies: the target is zero, and the loss still a number."""
    module = guide(0, 3, 4)
    student = normal(0, 1, 3, 1, 1).float()
    value, gradient = value_and_gradient(module, student, normal(1, 1, 4, 2, 2).float())
    torch.testing.assert_close(value, module.projection(student).square().mean().detach())
    assert gradient.isfinite().all()


@pytest.mark.parametrize("scale", [1.0, 1000.0])
def test_half_precision_is_computed_in_float32(scale):
    student, teacher = normal(0, 2, 3, 4, 4, scale=scale), normal(1, 2, 5, 8, 8, scale=scale)
    assert_half_is_computed_in_float32(guide(0, 3, 5), student, teacher)


def test_the_projection_learns_and_the_teacher_does_not():
    module = guide(0, 3, 5)
    assert {name: tuple(p.shape) for name, p in module.named_parameters()} == {
        "projection.weight": (5, 3, 1, 1),
        "projection.bias": (5,),
    }
    student = normal(0, 2, 3, 4, 4).float()
    value_and_gradient(module, student, normal(1, 2, 5, 8, 8).float())  # asserts that the teacher has none
    module(student, normal(1, 2, 5, 8, 8).float()).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in module.parameters())


# Sizes


def test_maps_shrink_to_means_and_grow_to_lines():
    ramp = torch.arange(4.0).view(1, 1, 1, 4).expand(1, 1, 4, 4)
    assert resize(ramp, (4, 4)) is ramp
    assert resize(ramp, (2, 2))[0, 0].tolist() == [[0.5, 2.5], [0.5, 2.5]]
    assert resize(ramp, (1, 2))[0, 0].tolist() == [[0.5, 2.5]]
    assert resize(ramp, (1, 4))[0, 0].tolist() == [[0, 1, 2, 3]]
    # Uneven: areas as adaptive pooling has them, which overlap.
    assert resize(ramp, (4, 3))[0, 0, 0].tolist() == [0.5, 1.5, 2.5]
    grown = resize(ramp[..., :2, :2], (2, 4))
    assert grown[0, 0].tolist() == [[0, 0.25, 0.75, 1]] * 2
    torch.testing.assert_close(resize(torch.full((1, 1, 1, 1), 3.0), (5, 7)), torch.full((1, 1, 5, 7), 3.0))


@pytest.mark.parametrize("size", [(2, 8), (8, 2), (3, 5)], ids=str)
def test_maps_that_shrink_one_way_and_grow_the_other(size):
    flat = torch.full((2, 3, 4, 4), 2.5)
    torch.testing.assert_close(resize(flat, size), torch.full((2, 3, *size), 2.5))
    across = torch.arange(4.0).view(4, 1).expand(1, 1, 4, 4)
    found = resize(across, size)
    assert found.shape == (1, 1, *size)
    torch.testing.assert_close(found, found[..., :1].expand_as(found))  # what is the same along a side stays so
    assert (found.diff(dim=2) > 0).all()
    for half in (torch.float16, torch.bfloat16):
        assert torch.equal(resize(across.to(half), size), found)


# Two processes


def on_one_of_two(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    module, (student, teacher) = guide(0, 3, 4), batch_of_six()
    half = slice(3 * rank, 3 * rank + 3)
    alone = module(student[half], teacher[half])
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    loss = module(student[half], teacher[half])
    loss.backward()
    gradients = [parameter.grad for parameter in module.parameters()]
    torch.save({"loss": loss.detach(), "alone": alone.detach(), "gradients": gradients}, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def batch_of_six():
    """Whose halves differ in level and scale."""
    teacher = normal(1, 6, 4, 4, 4).float()
    teacher[3:] = teacher[3:] * 5 + 20
    return normal(0, 6, 3, 2, 2).float(), teacher


def test_two_processes_standardise_over_the_batch_of_both(tmp_path: Path) -> None:
    processes = [_context().Process(target=on_one_of_two, args=(rank, str(tmp_path))) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0]
    found = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    module = guide(0, 3, 4)
    student, teacher = batch_of_six()
    loss = module(student, teacher)
    loss.backward()
    torch.testing.assert_close((found[0]["loss"] + found[1]["loss"]) / 2, loss.detach(), rtol=1e-5, atol=1e-6)
    for index, parameter in enumerate(module.parameters()):
        mean = (found[0]["gradients"][index] + found[1]["gradients"][index]) / 2
        torch.testing.assert_close(mean, parameter.grad, rtol=1e-4, atol=1e-6)
    for rank, half in enumerate((slice(0, 3), slice(3, 6))):
        torch.testing.assert_close(found[rank]["alone"], module(student[half], teacher[half]).detach())
        assert abs(found[rank]["alone"] - found[rank]["loss"]) > 0.1, "its own half would be another target"
