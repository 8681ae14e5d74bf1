"""How many tensors and values each known architecture has: finds the few that a weights file may belong to, before any
is built.

`python -m teachers.signatures` writes signatures.json anew, for the installed timm and torchvision (ten minutes).
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
import torchvision
from accelerate import init_empty_weights

import teachers.cifar_resnet  # noqa: F401  registers the names with timm

FILE = Path(__file__).with_name("signatures.json")
COUNTER = ".num_batches_tracked"
"""Ends the names of tensors that old weights lack."""
Shapes = Mapping[str, Sequence[int]]
"""Of a state dict's tensors, by key."""


class Signature(NamedTuple):
    """Of a state dict without its classifiers and batch norms' counters."""

    tensors: int
    values: int


@cache
def known_signatures() -> dict[str, Signature]:
    """By the name that `teacher.model` has for an architecture."""
    content = json.loads(FILE.read_text(encoding="utf-8"))
    return {name: Signature(*numbers) for name, numbers in content.items()}


def possible_signatures(shapes: Shapes) -> set[Signature]:
    """Those that a state dict may have: without a classifier, or with those of each possible number of classes."""
    return {
        _signature(shapes, 0),
        *(_signature(shapes, classes) for classes in {rows for rows, _ in linear_layers(shapes)}),
    }


def _signature(shapes: Shapes, classes: int) -> Signature:
    """`classes`: of the classifiers, which are left out."""
    left_out = {key for rows, pair in linear_layers(shapes) if rows == classes for key in pair}
    sizes = [math.prod(shape) for key, shape in shapes.items() if key not in left_out and not key.endswith(COUNTER)]
    return Signature(len(sizes), sum(sizes))


def linear_layers(shapes: Shapes) -> Iterator[tuple[int, tuple[str, str]]]:
    """Outputs and keys of weight and bias of what may be a classifier: a linear layer, or a convolution of 1x1."""
    for key, shape in shapes.items():
        bias = key.removesuffix("weight") + "bias"
        matrix = len(shape) >= 2 and all(side == 1 for side in shape[2:])
        if key.endswith("weight") and matrix and list(shapes.get(bias, ())) == [shape[0]]:
            yield shape[0], (key, bias)


def empty_network(name: str) -> Any:
    """The architecture without memory for its parameters, with as many classes as its library's weights have.

    Raises:
        Exception: there is none of that name in this version of its library, or it cannot be built like this.
    """
    library, _, rest = name.rpartition("/")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # on the initialisation of old networks
        # Some constructors compute with tensors, others copy into their buffers.
        for empty in (init_empty_weights(), torch.device("meta")):
            with suppress(RuntimeError), empty:
                return torchvision.models.get_model(rest, weights=None) if library else timm.create_model(name)
    raise NotImplementedError(name)


def main() -> None:
    """Build all architectures and write the file."""
    found = {}
    names = torchvision.models.list_models(torchvision.models)
    for name in [*timm.list_models(), *(f"torchvision/{name}" for name in names)]:
        network = empty_network(name)
        shapes = {key: value.shape for key, value in network.state_dict().items()}
        found[name] = _signature(shapes, classes_of(network))
    lines = [f"  {json.dumps(name)}: {json.dumps(signature)}" for name, signature in found.items()]
    FILE.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


def classes_of(network: Any) -> int:
    """Of timm's, which say it, and of torchvision's, whose weights are ImageNet's."""
    return int(getattr(network, "num_classes", 1000))


if __name__ == "__main__":
    main()
