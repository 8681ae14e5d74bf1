"""Stratified hold-out of part of the training set, for validation or for the test."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from distill.data.randomness import hashes, keys
from distill.errors import InputError


def hold_out(
    labels: Tensor,
    amount: float,
    seed: int,
    split: Literal["validation", "test", "labelled"] = "validation",
    rows: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Rows to train on and rows of `split`, int64, each in file order.

    `labels` int64 [N]; `amount` a fraction (below 1) or a count. Stratified: quotas are proportional to class sizes,
    rounded by largest remainder to the exact total; within a class the rows with the smallest hash of (seed, row), or
    of the numbers `rows` int64 [N] that stand for them. A function of seed, split, labels and `rows` only. InputError
    if a class would keep no training image or nothing would be held out.
    """
    count = round(amount * len(labels)) if amount < 1 else int(amount)
    sizes = torch.bincount(labels)
    present = sizes > 0
    if not 0 < count <= len(labels) - int(present.sum()):
        raise InputError(
            f"data.{split}: {amount:g} of {len(labels)} training images would hold out {count}; "
            f"from 1 image to all but one of each of the {int(present.sum())} classes is possible"
            + (" (0: none)" if split == "validation" else "")
        )
    # Integers throughout: floor(size * count / total) each, then one more for the largest remainders (ties: the lower
    # class) among the classes that keep an image then.
    quota, remainder = sizes * count // len(labels), sizes * count % len(labels)
    remainder[quota + 1 >= sizes] = -1
    extra = torch.argsort(remainder, descending=True, stable=True)[: count - int(quota.sum())]
    quota[extra] += 1
    if bool((quota >= sizes)[present].any()):
        worst = int(torch.nonzero((quota >= sizes) & present)[0])
        raise InputError(
            f"data.{split}: holding out {amount:g} leaves class {worst} (of {int(sizes[worst])} images) without a "
            + ("label; keep more labels" if split == "labelled" else "training image; hold out less")
        )
    hashed = hashes(keys(seed, 0, [split]), torch.arange(len(labels)) if rows is None else rows)[0]
    held_out = rank_in_class(labels, hashed) < quota[labels]
    return torch.nonzero(~held_out)[:, 0], torch.nonzero(held_out)[:, 0]


def rank_in_class(labels: Tensor, hashed: Tensor) -> Tensor:
    """int64 [N]: the place of each row among those of its class by rising hash, from 0; of equal ones in file order."""
    by_hash = torch.argsort(hashed, stable=True)
    by_class = by_hash[torch.argsort(labels[by_hash], stable=True)]
    sizes = torch.bincount(labels)
    rank = torch.empty_like(labels)
    rank[by_class] = torch.arange(len(labels)) - (sizes.cumsum(0) - sizes)[labels[by_class]]
    return rank


def keep_labels(labels: Tensor, amount: float, seed: int, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Positions whose labels `data.labelled` keeps and those that lose them, as in `hold_out`; `rows` int64 [N] are
    their rows among all training images, so that most labels are kept for another validation split too.
    """
    count = round(amount * len(labels)) if amount < 1 else int(amount)
    classes = len(labels.unique())
    if not classes <= count < len(labels):
        raise InputError(
            f"data.labelled: {amount:g} of {len(labels)} training images would keep {count} labels; from one of each "
            f"of the {classes} classes to all but one is possible (null: all)"
        )
    return hold_out(labels, len(labels) - count, seed, "labelled", rows)
