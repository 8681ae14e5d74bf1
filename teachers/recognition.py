"""Which known architecture a weights file belongs to, by the names and shapes of its tensors."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from distill.errors import InputError
from teachers.signatures import (
    Signature,
    classes_of,
    empty_network,
    known_signatures,
    linear_layers,
    possible_signatures,
)
from teachers.weights import differences, named_differences, read_state_dict, shared_prefixes

MOST_BUILT = 12
"""Architectures that are built to be compared with a file that fits none by its number of tensors and values."""
MOST_ALIKE = 4
"""Architectures with the same tensors that are named."""
SIMILAR = 0.1
"""Least share of common tensors at which an architecture is worth naming as the nearest."""
_log = logging.getLogger("distill")


class Recognised(NamedTuple):
    model: str
    """For `teacher.model`."""
    num_classes: int
    """Of the file's classifier; 0: it has none."""
    channels: int
    """Of the images that it takes."""
    alike: tuple[str, ...]
    """Other names of architectures with the same tensors, which may compute otherwise."""


def recognise(path: Path) -> Recognised:
    """The architecture of timm, torchvision or this project whose state dict is in the file at `path`.

    Raises:
        InputError: there is no state dict (see `read_state_dict`), or it fits none; the message has the nearest.
    """
    given = read_state_dict(path)
    prefixes = ("", *shared_prefixes(given))
    forms = [{key.removeprefix(prefix): value for key, value in given.items()} for prefix in prefixes]
    possible = possible_signatures({key: value.shape for key, value in given.items()})
    known = known_signatures()
    found: list[Recognised] = []
    for name in sorted((name for name in known if known[name] in possible), key=_preference):
        if len(found) == MOST_ALIKE or any(name == f"torchvision/{other.model}" for other in found):
            continue  # of one name in both libraries, the networks are the same
        if (fitting := _fitting(name, forms)) is not None:
            found.append(fitting)
    if not found:  # images of another number of channels give other numbers of values
        others = sorted(known, key=lambda name: (_distance(known[name], possible), *_preference(name)))[:MOST_BUILT]
        found = [fitting for name in others if (fitting := _fitting(name, forms)) is not None][:1]
        if not found:
            raise InputError(_unknown(path, others, forms, len(known)))
    return found[0]._replace(alike=tuple(other.model for other in found[1:]))


def _preference(name: str) -> tuple[bool, bool, int, str]:
    """timm's names before torchvision's, plain ones before those of converted or special weights."""
    return name.startswith("torchvision/"), name.startswith(("tf_", "legacy_", "test_")), len(name), name


def _distance(one: Signature, others: Iterable[Signature]) -> float:
    """In the logarithms of both numbers."""
    return min(
        abs(math.log((one.tensors + 1) / (other.tensors + 1))) + abs(math.log((one.values + 1) / (other.values + 1)))
        for other in others
    )


def _empty(name: str) -> Any:
    """The network; None: this version of its library has none of that name."""
    try:
        return empty_network(name)
    except Exception as error:  # of constructors of another version
        _log.debug("%s: cannot be built (%s)", name, error)
        return None


def _fitting(name: str, forms: Iterable[Mapping[str, Tensor]]) -> Recognised | None:
    """With the first form of the weights, each with other prefixes removed, that fits this architecture."""
    if (network := _empty(name)) is None:
        return None
    own, classes = network.state_dict(), classes_of(network)
    shapes = {key: value.shape for key, value in own.items()}
    head = {key for rows, pair in linear_layers(shapes) if rows == classes for key in pair}
    for weights in forms:
        missing, surplus, differing = differences(own, weights)
        if surplus:
            continue
        if missing and (set(missing) != head or not hasattr(network, "reset_classifier")):
            continue
        heads = [key for key in differing if key in head]
        rest = [key for key in differing if key not in head]
        outputs = {len(weights[key]) if weights[key].dim() else 0 for key in head if key in weights}
        if len(outputs) > 1 or any(own[key].shape[1:] != weights[key].shape[1:] for key in heads):
            continue
        channels = 3
        if rest:  # only the first convolution, of images with one channel
            first, *more = rest
            sides = list(own[first].shape)
            if more or name.startswith("torchvision/") or sides[1:2] != [3]:
                continue
            if list(weights[first].shape) != [sides[0], 1, *sides[2:]]:
                continue
            channels = 1
        return Recognised(name, 0 if missing else outputs.pop() if outputs else 0, channels, ())
    return None


def _unknown(path: Path, names: Iterable[str], forms: Sequence[Mapping[str, Tensor]], of: int) -> str:
    """What is nearest among these architectures, and what does not fit."""
    best: tuple[float, str, str] = (0.0, "", "")
    for name in names:
        if (network := _empty(name)) is None:
            continue
        own = network.state_dict()
        for weights in forms:
            missing, surplus, differing = differences(own, weights)
            share = (len(weights) - len(surplus) - len(differing)) / (len(weights) + len(missing))
            if share > best[0]:
                best = share, name, named_differences(own, weights)
    known = f"{path}: fits none of {of:,} architectures of timm and torchvision"
    remedy = (
        "Give the state dict of such a network, a folder with its config.json (local-dir:FOLDER), or the module itself "
        "from Python: distill.train(..., teacher=(module, distill.Contract(...)))."
    )
    if best[0] < SIMILAR:
        return f"{known}; its keys are {', '.join(list(forms[0])[:5])}, ... {remedy}"
    return f"{known}. The nearest is '{best[1]}'. {best[2]} {remedy}"
