"""The validation split: exact in number, stratified, a function of seed and labels."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from distill.data.holdout import hold_out
from distill.errors import InputError
from distill.recipe import Recipe
from distill.run import Run


def test_cifar_like() -> None:
    labels = torch.arange(5000) * 7 % 10
    train, held = hold_out(labels, 0.1, seed=0)
    assert torch.bincount(labels[held]).tolist() == [50] * 10
    assert torch.equal(torch.cat([train, held]).sort().values, torch.arange(5000))
    assert torch.equal(train, train.sort().values)
    assert torch.equal(held, held.sort().values)


@given(st.lists(st.integers(2, 40), min_size=2, max_size=8), st.floats(0.02, 0.6), st.integers(0, 2**31 - 1))
def test_exact_count_and_proportion(sizes: list[int], share: float, seed: int) -> None:
    labels = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    labels = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))]
    count = round(share * len(labels))
    if count == 0 or any(share * size > size - 2 for size in sizes):
        return
    train, held = hold_out(labels, share, seed)
    assert len(held) == count
    assert len(train) == len(labels) - count
    taken = torch.bincount(labels[held], minlength=len(sizes))
    for size, number in zip(sizes, taken.tolist(), strict=True):
        assert abs(number - size * count / len(labels)) <= 1
        assert number < size


def test_what_is_held_out_for_the_test_is_listed_in_the_run(tmp_path: Path) -> None:
    run = Run(tmp_path / "run", is_main=True)
    run.claim()
    run.open(Recipe(), source=None, environment={}, held_out=("cat/1.png", "dog/2.png"))
    run.close()
    assert (tmp_path / "run" / "test_split.txt").read_text() == "cat/1.png\ndog/2.png\n"


def test_the_test_split_is_another_draw_than_validation() -> None:
    labels = torch.arange(300) % 3
    held = [hold_out(labels, 30, 0, split)[1].tolist() for split in ("validation", "test")]
    assert held[0] != held[1]
    with pytest.raises(InputError, match=r"data\.test: 300 of 300"):
        hold_out(labels, 300, 0, "test")


def test_a_count_is_a_count_and_the_seed_matters() -> None:
    labels = torch.arange(300) % 3
    splits = [hold_out(labels, 31, seed)[1] for seed in (0, 0, 1)]
    assert [len(split) for split in splits] == [31, 31, 31]
    assert torch.equal(splits[0], splits[1])
    assert not torch.equal(splits[0], splits[2])


def test_the_choice_within_a_class_does_not_follow_the_file() -> None:
    _, held = hold_out(torch.zeros(10_000, dtype=torch.int64), 0.1, seed=0)
    assert abs(held.double().mean() - 5000) < 4 * 2887 / 1000**0.5


def test_a_class_of_one_image_keeps_it() -> None:
    labels = torch.tensor([0] * 20 + [1] + [2] * 20)
    train, held = hold_out(labels, 0.5, seed=0)
    assert 1 in labels[train]
    assert len(held) == round(0.5 * 41)


@pytest.mark.parametrize("amount", [0.01, 29, 0.99, 1000])
def test_impossible_amounts(amount: float) -> None:
    with pytest.raises(InputError, match=r"^data\.validation: "):
        hold_out(torch.arange(30) % 3, amount, seed=0)
