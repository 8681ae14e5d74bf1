"""Distil a pretrained CNN into a small vision transformer with area attention and a distillation token."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from distill.version import __version__ as __version__

if TYPE_CHECKING:
    from distill.api import (
        Report,
        Run,
        compare,
        evaluate,
        export,
        init,
        load_student,
        load_teacher,
        predict,
        train,
    )
    from distill.errors import InputError, Interrupted, RunFailed
    from distill.inputs import InputContract as Contract
    from distill.recipe import Recipe


__all__ = [
    "Contract",
    "InputError",
    "Interrupted",
    "Recipe",
    "Report",
    "Run",
    "RunFailed",
    "compare",
    "evaluate",
    "export",
    "init",
    "load_student",
    "load_teacher",
    "predict",
    "train",
]

_MODULES = {
    "Contract": "inputs",
    "InputError": "errors",
    "Interrupted": "errors",
    "Recipe": "recipe",
    "RunFailed": "errors",
}
"""Modules of names that are not in api.py."""


def __getattr__(name: str) -> Any:
    """Import on first use: torch takes seconds."""
    import importlib

    if name not in __all__:
        raise AttributeError(f"module 'distill' has no attribute '{name}'")
    module = importlib.import_module(f"distill.{_MODULES.get(name, 'api')}")
    return getattr(module, "InputContract" if name == "Contract" else name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
