"""Unbalanced classes: their weights, an order that draws them equally often, and a long tail for experiments."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from distill.data.holdout import rank_in_class
from distill.data.randomness import hashes, keys, permutation
from distill.errors import InputError
from distill.recipe import Data


def class_weights(spec: Data, class_names: Sequence[str], class_images: Sequence[int]) -> list[float] | None:
    """The weight of each class by `data.class_weights`, or None without it.

    With v the given weights, or for 'balanced' v_c = 1 / n_c, it is w_c = v_c * sum_j d_j / sum_j (d_j * v_j): d_j is
    how often class j is drawn, in proportion, which is its number of labelled training images n_j, or the same for all
    classes with `data.sampler`. So the mean weight of what is drawn is 1, and 'balanced' is n / (k * n_c), as in
    scikit-learn; a common factor of given weights does not matter.

    Raises:
        InputError: their number is not that of the classes, or the images of the classes are not counted.
    """
    given = spec.class_weights
    if given is None:
        return None
    if not class_images:
        raise InputError(f"data.class_weights: '{spec.name}' does not count the images of its classes; set it to null")
    if isinstance(given, list) and len(given) != len(class_names):
        raise InputError(
            f"data.class_weights: {len(given)} weights for {len(class_names)} classes; give one for each of "
            f"{', '.join(class_names)}"
        )
    values = given if isinstance(given, list) else [1 / max(1, count) for count in class_images]
    drawn = class_images if spec.sampler is None else [min(1, count) for count in class_images]
    scale = sum(drawn) / math.fsum(count * value for count, value in zip(drawn, values, strict=True))
    return [scale * value for value in values]


def balanced_draws(labels: Tensor, seed: int, epoch: int) -> Tensor:
    """Draws of an epoch, int64 [N]: draw d is image d % N; labels are int64 [N], all on the CPU.

    The classes take turns, from epoch to epoch, so that each is drawn equally often, to one draw. The images of a class
    come in one pass over them after another, each in an order of its own; d // N numbers the passes of an epoch, so
    that an image that is drawn again has other numbers d, and so another augmentation. The draws of an epoch are
    shuffled, and an incomplete last batch is dropped as ever. A function of labels, seed and epoch.
    """
    count = len(labels)
    sizes = torch.bincount(labels)
    present = sizes.nonzero()[:, 0].tolist()
    members = torch.argsort(labels, stable=True).split(sizes.tolist())
    of_class = keys(seed, 0, [f"sampler/{label}" for label in present])
    begin, draws = epoch * count, torch.empty(count, dtype=torch.int64)
    for turn, label in enumerate(present):
        start = (turn - begin) % len(present)
        own = draws[start :: len(present)]
        before, size = (begin + start) // len(present), len(members[label])  # its draws in earlier epochs
        first, offset = divmod(before, size)
        passes = -(-(offset + len(own)) // size)
        numbers = first * size + torch.arange(passes * size)
        order = hashes(of_class[turn : turn + 1], numbers)[0].view(passes, size).argsort(dim=1, stable=True)
        drawn = members[label][order] + count * torch.arange(passes)[:, None]
        own.copy_(drawn.flatten()[offset : offset + len(own)])
    return draws[permutation(seed, epoch, count)]


def long_tail(labels: Tensor, factor: float, seed: int, rows: Tensor) -> Tensor:
    """Positions that `data.long_tail` keeps, int64, in their order (Cui et al. 2019, arXiv 1901.05555, section 5.1).

    Class c of k keeps floor(n * factor^(-c / (k - 1))) images, n being those of the largest class, or all that it has:
    those with the smallest hash of (seed, row), so that a larger factor keeps some of the same images.

    Args:
        labels: int64 [N], from 0.
        rows: int64 [N], their rows among all training images, whatever is held out.

    Raises:
        InputError: a class would keep none.
    """
    sizes = torch.bincount(labels)
    most, last = int(sizes.max()), max(1, len(sizes) - 1)
    # The small addend: floating-point powers end up on either side of whole numbers.
    quota = torch.tensor([math.floor(most * factor ** (-label / last) + 1e-6) for label in range(len(sizes))])
    if not int(quota.min()):
        raise InputError(
            f"data.long_tail: {factor:g} leaves no training image of the last class, where the largest one has {most}; "
            f"take at most {most}"
        )
    kept = rank_in_class(labels, hashes(keys(seed, 0, ["long_tail"]), rows)[0]) < quota[labels]
    return kept.nonzero()[:, 0]
