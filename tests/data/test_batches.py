"""Which samples make up which batch, and what does not fit."""

from __future__ import annotations

import pytest

from distill.data import BatchPlan
from distill.errors import InputError


@pytest.mark.parametrize(("processes", "accumulation"), [(1, 1), (2, 1), (1, 3), (2, 3), (3, 2)])
def test_the_parts_of_a_step_make_up_the_global_batch(processes: int, accumulation: int) -> None:
    for step in (0, 4):
        positions: list[int] = []
        for rank in range(processes):
            plan = BatchPlan(0, 24, accumulation, processes, rank)
            parts = plan.slices(step)
            assert len(parts) == accumulation
            assert all(part.stop - part.start == plan.micro_batch for part in parts)
            for part in parts:
                positions += range(part.start, part.stop)
        assert positions == list(range(step * 24, (step + 1) * 24))


def test_the_incomplete_last_batch_is_dropped() -> None:
    plan = BatchPlan(0, 24)
    assert [plan.steps_per_epoch(count) for count in (24, 47, 48)] == [1, 1, 2]


@pytest.mark.parametrize(
    ("plan", "near"), [((0, 10, 1, 3, 0), "multiple of 3, such as 9"), ((0, 10, 4, 2, 0), "multiple of 8, such as 8")]
)
def test_batch_that_does_not_divide(plan: tuple[int, ...], near: str) -> None:
    with pytest.raises(InputError, match=r"^train\.batch_size: 10 does not divide over") as caught:
        BatchPlan(*plan)
    assert near in str(caught.value)


def test_pairs_need_even_micro_batches() -> None:
    plan = BatchPlan(0, 6, 1, 2, 0)
    plan.check(100, paired=False)
    with pytest.raises(InputError, match=r"^train\.batch_size: 6 .* pairs .* multiple of 4, such as 8"):
        plan.check(100, paired=True)


def test_a_batch_larger_than_the_training_split() -> None:
    with pytest.raises(InputError, match=r"^train\.batch_size: 24 is more than the 23 images"):
        BatchPlan(0, 24).steps_per_epoch(23)
