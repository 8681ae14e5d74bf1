"""Distil a pretrained CNN into a small vision transformer with area attention and a distillation token."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from distill.version import __version__ as __version__

if TYPE_CHECKING:
    from distill.api import (
        compare,
        evaluate,
        export,
        init,
        load_student,
        load_teacher,
        predict,
        sweep,
        train,
    )
    from distill.errors import InputError, Interrupted, RunFailed
    from distill.inputs import InputContract as Contract
    from distill.recipe import Recipe
    from distill.results import Evaluation, Report, Run, Sweep


__all__ = [
    "Contract",
    "Evaluation",
    "InputError",
    "Interrupted",
    "Recipe",
    "Report",
    "Run",
    "RunFailed",
    "Sweep",
    "compare",
    "evaluate",
    "export",
    "init",
    "load_student",
    "load_teacher",
    "predict",
    "sweep",
    "train",
]

_MODULES = {
    "Contract": "inputs",
    "Evaluation": "results",
    "InputError": "errors",
    "Interrupted": "errors",
    "Recipe": "recipe",
    "Report": "results",
    "Run": "results",
    "RunFailed": "errors",
    "Sweep": "results",
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
