"""Registration of this project's and plugins' models with timm, and checks of model names."""

from __future__ import annotations

import difflib

import timm

import teachers.cifar_resnet  # noqa: F401  registers them with timm: CNNs can be students too
from distill import registry
from distill.errors import InputError
from distill.students import (
    refiner_vit,  # noqa: F401  as well
    vit,
)


def register_models() -> None:
    """Register every model with timm, also those with attention kinds from plugins."""
    for family in registry.builtin_names("students"):
        registry.find("students", family)
    vit.register_names()


def check_name(name: str, key: str) -> None:
    """Raise InputError under `key`, with the nearest names, unless timm has a model `name` (or name.tag)."""
    register_models()
    architecture, _, tag = name.partition(".")
    if not timm.is_model(architecture):
        near = difflib.get_close_matches(architecture, timm.list_models(), n=3, cutoff=0.5)
        hint = f"; the nearest names are {', '.join(near)}" if near else ""
        raise InputError(f"{key}: timm has no model '{name}'{hint}. `timm.list_models()` lists them all.")
    if tag and name not in (tagged := timm.list_pretrained(f"{architecture}.*")):
        raise InputError(f"{key}: {architecture} has no weights '{tag}', but {', '.join(tagged) or 'none at all'}.")
