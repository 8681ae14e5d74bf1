"""The order of a teacher's classes: as the recipe says, or as the class names of its folder say."""

from __future__ import annotations

import logging
import unicodedata
from collections.abc import Mapping, Sequence

from distill import recipe
from distill.errors import InputError

_MOST_NAMED = 5
_log = logging.getLogger("distill")


def class_order(spec: recipe.Teacher, theirs: Sequence[str] | None, data: Sequence[str] | None) -> list[int] | None:
    """The teacher's output for each class of the data; None: the same order.

    Args:
        theirs: names of its outputs, if they are recorded.
        data: names of the data's classes, if they are known.

    Raises:
        InputError: teacher.classes does not fit the classes, or only some of the recorded names are the data's and
            these stand elsewhere.
    """
    known = theirs if theirs and data and len(theirs) == len(data) else None
    order: list[int] | None = None
    if spec.classes is not None:
        if data is None:
            raise InputError("teacher.classes: names the data's classes; give their names too (class_names=...).")
        if isinstance(spec.classes, Mapping):
            order = _by_mapping(spec.classes, known, data)
        else:
            order = _by_list(spec.classes, data)
    elif known is not None and data is not None:
        order = _by_names(str(spec.model), known, data)
    return None if order is None or order == list(range(len(order))) else order


def _by_list(classes: Sequence[str], data: Sequence[str]) -> list[int]:
    if sorted(classes) != sorted(data):
        wrong = next((name for name in classes if name not in data), None)
        problem = f"{len(classes)} names" if wrong is None else f"'{wrong}' is no class of the data"
        raise InputError(
            f"teacher.classes: {problem}; list each of the data's {len(data)} classes once, in the order of the "
            f"teacher's outputs. The data's: {_some(data)}."
        )
    return [classes.index(name) for name in data]


def _by_mapping(classes: Mapping[str, int | str], theirs: Sequence[str] | None, data: Sequence[str]) -> list[int]:
    if unknown := [name for name in classes if name not in data]:
        raise InputError(
            f"teacher.classes: '{unknown[0]}' is no class of the data; give {{class of the data: output of the "
            f"teacher}}. The data's: {_some(data)}."
        )
    order = []
    for index, name in enumerate(data):
        output = classes.get(name, name if theirs and name in theirs else index)
        if isinstance(output, str):
            if theirs is None or output not in theirs:
                has = f"its classes are {_some(theirs)}" if theirs else "its classes have no names"
                raise InputError(f"teacher.classes.{name}: no output '{output}': {has}; give its index, from 0.")
            output = list(theirs).index(output)
        order.append(output)
    if sorted(order) != list(range(len(data))):
        twice = next((data[at] for at, output in enumerate(order) if order.index(output) < at), None)
        raise InputError(
            f"teacher.classes: each output from 0 to {len(data) - 1} belongs to one class"
            + (f"; that of '{twice}' is another's too" if twice else "")
            + ". Give all classes that differ."
        )
    return order


def _by_names(model: str, theirs: Sequence[str], data: Sequence[str]) -> list[int] | None:
    own, ours = [*map(_normal, theirs)], [*map(_normal, data)]
    if own == ours or len(set(own)) < len(own) or len(set(ours)) < len(ours):
        return None
    if set(own) == set(ours):
        _log.info("teacher %s: its classes are in another order than the data's; they are matched by name", model)
        return [own.index(name) for name in ours]
    moved = [(name, at) for at, name in enumerate(ours) if name in own and own.index(name) != at]
    differ = [at for at, name in enumerate(ours) if own[at] != name]
    if moved:
        name, at = moved[0]
        raise InputError(
            f"teacher {model}: its classes are not those of the data, in their order: '{data[at]}' is its output "
            f"{own.index(name)}, and class {at} of the data. Its other names are "
            f"{_some([theirs[at] for at, name in enumerate(own) if name not in ours])}; the data's are "
            f"{_some([data[at] for at, name in enumerate(ours) if name not in own])}. Say which output each of these "
            "is: teacher.classes: {CLASS OF THE DATA: NAME OR INDEX OF THE OUTPUT}."
        )
    pairs = [f"'{theirs[at]}' for '{data[at]}'" for at in differ]
    _log.info("teacher %s: the order of its classes is taken to be the data's; its names: %s", model, _some(pairs))
    return None


def _normal(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold()


def _some(names: Sequence[str]) -> str:
    more = f", ... ({len(names)} in all)" if len(names) > _MOST_NAMED else ""
    return ", ".join(names[:_MOST_NAMED]) + more
