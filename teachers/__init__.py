"""Teachers: frozen networks with their own input contract.

Listing the zoo needs no torch, so modules that need it are imported on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from teachers.preflight import check_accuracy, check_class_order, check_features
    from teachers.teacher import Ensemble, Teacher, load_teacher
    from teachers.zoo import ZOO, ZooEntry

_MODULES = {
    "ZOO": "zoo",
    "ZooEntry": "zoo",
    "Ensemble": "teacher",
    "Teacher": "teacher",
    "load_teacher": "teacher",
    "check_accuracy": "preflight",
    "check_class_order": "preflight",
    "check_features": "preflight",
}

__all__ = [
    "ZOO",
    "Ensemble",
    "Teacher",
    "ZooEntry",
    "check_accuracy",
    "check_class_order",
    "check_features",
    "load_teacher",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'teachers' has no attribute '{name}'")
    return getattr(importlib.import_module(f"teachers.{_MODULES[name]}"), name)
