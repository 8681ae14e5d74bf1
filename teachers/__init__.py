"""Teachers: frozen networks with their own input contract.

Listing the zoo needs no torch, so what does need it is imported when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from teachers.preflight import judge, judge_features
    from teachers.teacher import Ensemble, Teacher, load_teacher
    from teachers.zoo import ZOO, ZooEntry

_HOMES = {
    "ZOO": "zoo",
    "ZooEntry": "zoo",
    "Ensemble": "teacher",
    "Teacher": "teacher",
    "load_teacher": "teacher",
    "judge": "preflight",
    "judge_features": "preflight",
}

__all__ = ["ZOO", "Ensemble", "Teacher", "ZooEntry", "judge", "judge_features", "load_teacher"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'teachers' has no attribute '{name}'")
    return getattr(importlib.import_module(f"teachers.{_HOMES[name]}"), name)
