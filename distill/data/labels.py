"""Labels as their sources have them -> class names, and numbers from 0."""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from distill.errors import InputError

MISSING = -1
"""The label of an image that has none."""
Value = str | int | None


def class_name(name: str) -> str:
    """In Unicode's form NFC, so that one name written in two forms is one class."""
    return unicodedata.normalize("NFC", name)


def encode(values: Mapping[str, Sequence[Value]], where: str) -> tuple[tuple[str, ...], dict[str, Tensor]]:
    """Class names, and labels int64 [N] by split, `MISSING` where there is none.

    Args:
        values: by split, 'train' among them. Classes are those of train: strings sorted by their characters, numbers by
            their value (then -1 is a missing label), bools as False and True; None and '' are missing.
        where: begins the message of an error.

    Raises:
        InputError: another split has a label that train does not have.
    """
    known = sorted({value for value in map(_normal, values["train"]) if value is not None}, key=_order)
    numbers = {value: number for number, value in enumerate(known)}
    labels = {}
    for split, of_split in values.items():
        normal = [_normal(value) for value in of_split]
        if unknown := [value for value in normal if value is not None and value not in numbers]:
            raise InputError(f"{where}: split {split} has the label {unknown[0]!r}, which train does not have")
        labels[split] = torch.tensor([MISSING if value is None else numbers[value] for value in normal])
    return tuple(map(str, known)), {split: of_split.to(torch.int64) for split, of_split in labels.items()}


def _normal(value: Value) -> Value:
    if isinstance(value, str):
        return class_name(value) or None
    return None if value == MISSING else value


def _order(value: Value) -> tuple[bool, str | int]:
    assert value is not None
    return isinstance(value, str), value


def check_labelled(labels: Tensor, where: str) -> bool:
    """Whether a split has labels.

    Raises:
        InputError: some of its images have one and others none.
    """
    missing = int((labels < 0).sum())
    if 0 < missing < len(labels):
        first = int(torch.nonzero(labels < 0)[0])
        raise InputError(
            f"{where}: {missing:,} of {len(labels):,} images have no label, the first is number {first}; leave them out"
        )
    return not missing
