"""The names under which timm knows this project's models, and those that plugins bring."""

from __future__ import annotations

import difflib

import timm

import teachers.cifar_resnet  # noqa: F401  registers them with timm: a CNN can be a student too
from distill.errors import InputError
from distill.students import vit


def register_models() -> None:
    """Make every model of this project known to timm, also those of attention kinds that plugins brought."""
    vit.register_names()


def check_name(name: str, key: str) -> None:
    """InputError under `key`, with the nearest names, unless timm or this project has a model `name` (or name.tag)."""
    register_models()
    architecture, _, tag = name.partition(".")
    if not timm.is_model(architecture):
        near = difflib.get_close_matches(architecture, timm.list_models(), n=3, cutoff=0.5)
        hint = f"; the nearest names are {', '.join(near)}" if near else ""
        raise InputError(f"{key}: timm has no model '{name}'{hint}. `timm.list_models()` lists them all.")
    if tag and name not in (tagged := timm.list_pretrained(f"{architecture}.*")):
        raise InputError(f"{key}: {architecture} has no weights '{tag}', but {', '.join(tagged) or 'none at all'}.")
