"""Where a recipe's `teacher.model` is found. Imports no torch."""

from __future__ import annotations

from typing import Literal, NamedTuple

from teachers.zoo import ZOO

Scheme = Literal["zoo", "local-dir", "hf_hub", "torchvision", "timm"]
_PREFIXES: dict[str, Scheme] = {
    "local-dir:": "local-dir", "hf_hub:": "hf_hub", "hf-hub:": "hf_hub", "torchvision/": "torchvision"
}  # fmt: skip


class Address(NamedTuple):
    """Where a teacher's `model` is found, and its name or folder there."""

    scheme: Scheme
    name: str


def parse(model: str) -> Address:
    """Parse a recipe's `teacher.model`: a name in the zoo, one with a prefix, or else a timm name."""
    if model in ZOO:
        return Address("zoo", model)
    for prefix, scheme in _PREFIXES.items():
        if model.startswith(prefix):
            return Address(scheme, model.removeprefix(prefix))
    return Address("timm", model)
