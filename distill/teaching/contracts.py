"""Which input contract weights of the user's own were trained with: the likely ones, measured on a sample."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from itertools import product

from torch import Tensor

from distill.data.dataset import DatasetInfo
from distill.errors import InputError
from distill.inputs import InputContract
from distill.recipe import Teacher as Spec
from distill.report.metrics import decisions
from distill.report.statistics import mcnemar
from teachers import Teacher
from teachers.preflight import well_above_chance

MARKED = 0.001
"""p of McNemar's test below which one contract is better than another."""
_log = logging.getLogger("distill")


def candidates(spec: Spec, teacher: Teacher, info: DatasetInfo, resolution: int) -> list[Teacher]:
    """The teacher under its own contract, then under those with the data's resolution, or mean and standard deviation,
    in place of what `spec` leaves open; without those that its network cannot take.
    """
    own = teacher.contract
    sizes = [own.size, resolution] if spec.size is None else [own.size]
    # Greyscale images are repeated for a network with three channels.
    mean, std = (values * len(own.mean) if len(values) == 1 else values for values in (info.mean, info.std))
    statistics = [(own.mean, own.std)]
    if len(mean) == len(own.mean):
        statistics.append((mean if spec.mean is None else own.mean, std if spec.std is None else own.std))
    found = [teacher]
    for size, (mean, std) in product(sizes, statistics):
        contract = replace(own, size=size, mean=mean, std=std)
        if all(contract != other.contract for other in found):
            try:
                found.append(teacher.under(contract))
            except InputError:
                continue
    return found


def preferred(labels: Tensor, logits: Sequence[Tensor]) -> int:
    """The contract to use: the one with most right answers if it is markedly better than the first, else the first.

    Args: as those of `check_contract`.
    """
    known = labels.numpy()
    rights = [decisions(values.numpy()) == known for values in logits]
    best = max(range(len(rights)), key=lambda index: rights[index].mean())
    test = mcnemar("best", "first", rights[best], rights[0])
    required = well_above_chance(labels, classes=logits[0].shape[1])
    return best if test.points > 0 and test.p < MARKED and rights[best].mean() >= required else 0


def check_contract(teachers: Sequence[Teacher], labels: Tensor, logits: Sequence[Tensor], spec: Spec, key: str) -> None:
    """Log the accuracy under each contract of `candidates`.

    Args:
        labels: int64 [N].
        logits: by teacher, [N, classes] on the same images.
        key: of `spec` in the recipe, such as 'teacher.0'.

    Raises:
        InputError: another contract is markedly better than the first; the message has the keys to set.
    """
    known = labels.numpy()
    rights = [decisions(values.numpy()) == known for values in logits]
    found = [f"{right.mean():.2%} with {teacher.contract}" for right, teacher in zip(rights, teachers, strict=True)]
    says = (
        f"{spec.weights or spec.model} does not say for certain how its inputs were prepared. On {len(known)} images "
        "it has an accuracy of "
    )
    _log.info("teacher %s: %s%s; the first is used", teachers[0].name, says, "; ".join(found))
    best = preferred(labels, logits)
    if best:
        raise InputError(
            f"teacher {teachers[0].name}: {says}{found[0]}, which are those of the name '{spec.model}', and of "
            f"{found[best]}. Set what it was trained with, in the latter case {_keys(key, teachers[best].contract)}; "
            f"in the former {_keys(key, teachers[0].contract)}."
        )


def _keys(key: str, contract: InputContract) -> str:
    mean, std = ([float(f"{value:.5g}") for value in values] for values in (contract.mean, contract.std))
    return f"{key}.size={contract.size} '{key}.mean={mean}' '{key}.std={std}'"
