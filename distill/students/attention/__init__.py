"""Kinds of attention, one a file: a new kind needs a new file here that uses `attention_kind`, and its recipe entry."""

from __future__ import annotations

import importlib
import pkgutil

from distill.students.attention.base import KINDS, PatchGrid, attention_kind

for _module in pkgutil.iter_modules(__path__, prefix=f"{__name__}."):
    importlib.import_module(_module.name)

__all__ = ["KINDS", "PatchGrid", "attention_kind"]
