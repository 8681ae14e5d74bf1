"""Distil a pretrained CNN into a small vision transformer with area attention and a distillation token."""

from __future__ import annotations

from typing import TYPE_CHECKING

from distill.version import __version__ as __version__

if TYPE_CHECKING:
    from pathlib import Path

    from distill.exports.prediction import LoadedStudent


def load_student(folder: str | Path) -> LoadedStudent:
    """The student in a folder that `distill export` or a run wrote: model, transform and labels.

    Raises:
        InputError: a file is missing, damaged or was changed.
    """
    from distill.exports.prediction import load_student as load  # torch only where it is needed

    return load(folder)
