"""A report's verdict: one sentence on each student, by the rules in docs/explanation/report.md."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from distill.report.roles import STUDENT
from distill.report.standing import Difference, Shown, Standing
from distill.report.statistics import EQUAL

Cost = Literal["less", "same", "more", "mixed", "unknown"]
ALIKE = 1.1
"""Ratio, or its inverse, up to which two costs count as the same."""
NOUNS = {"parameters": "parameters", "latency_ms": "time"}
"""What counts as cost, by its name in `Standing.ratios`, and what a manager calls it."""
CONCLUSIONS: Mapping[tuple[Shown, Cost], str] = {
    ("better", "less"): "worth it",
    ("better", "same"): "worth it",
    ("better", "mixed"): "worth it where accuracy counts more than {dear}",
    ("better", "more"): "worth it where accuracy counts more than {dear}",
    ("better", "unknown"): "the better of the two",
    ("equal", "less"): "worth it",
    ("equal", "same"): "no reason to change",
    ("equal", "mixed"): "worth it where {cheap} counts more than {dear}",
    ("equal", "more"): "not worth it",
    ("equal", "unknown"): "as good as its teacher",
    ("open", "less"): "promising, and a larger test set would have to show it",
    ("open", "same"): "no reason to change",
    ("open", "mixed"): "undecided",
    ("open", "more"): "not worth it",
    ("open", "unknown"): "undecided",
    ("worse", "less"): "worth it only where {cheap} counts more than {points} points",
    ("worse", "same"): "not worth it",
    ("worse", "mixed"): "worth it only where {cheap} counts more than {points} points and {dear}",
    ("worse", "more"): "not worth it",
    ("worse", "unknown"): "behind its teacher",
}
"""By the accuracy that is shown against the teacher, and by costs against the teacher's."""


def verdict(found: Sequence[Standing]) -> str:
    """Of the most accurate student, which comes first; of how many, if there are several."""
    told = sentence(found[0])
    return told if len(found) == 1 else f"Most accurate of {len(found)}: {told[0].lower()}{told[1:]}"


def sentence(student: Standing) -> str:
    """Of one student."""
    name = f"The {student.role} of {student.called}"
    if student.against_teacher is not None:
        text = f"{_beside_teacher(student, student.against_teacher)}{_beside_control(student)}"
    elif student.against_control is not None:
        text = _by_control(student.against_control)
    else:
        with_what = "its features, by neighbours, give" if student.by_neighbours else "it gives"
        text = f"{with_what} {student.top1:.2f} % of the test images the right class"
        if student.role == STUDENT:
            text += "; without a teacher's answers or a control there is nothing to judge that by"
    return f"{name} {text}." if student.against_teacher is not None else f"{name}: {text}."


def cost(ratios: Mapping[str, float]) -> Cost:
    """What all known ones together are beside the teacher's."""
    if not NOUNS.keys() & ratios.keys():
        return "unknown"
    cheaper, dearer = (bool(names) for names in _sides(ratios))
    if cheaper and dearer:
        return "mixed"
    return "less" if cheaper else "more" if dearer else "same"


def _sides(ratios: Mapping[str, float]) -> tuple[list[str], list[str]]:
    """Names of the costs that are lower than the teacher's, and of those that are higher."""
    cheaper = [name for key, name in NOUNS.items() if ratios.get(key, 1) < 1 / ALIKE]
    dearer = [name for key, name in NOUNS.items() if ratios.get(key, 1) > ALIKE]
    return cheaper, dearer


def _beside_teacher(student: Standing, difference: Difference) -> str:
    cheaper, dearer = _sides(student.ratios)
    conclusion = CONCLUSIONS[difference.shown, cost(student.ratios)].format(
        cheap=_size(cheaper), dear=_size(dearer), points=f"{abs(difference.points):.2f}"
    )
    accuracy = {
        "better": f"{difference.points:+.2f} points",
        "worse": f"{difference.points:+.2f} points",
        "equal": f"an accuracy equal within {EQUAL:g} point ({difference.points:+.2f})",
        "open": f"an accuracy with no difference shown ({difference.points:+.2f} points)",
    }[difference.shown]
    if student.by_neighbours:
        accuracy += " by neighbours"
    costs = " and ".join(
        f"{times(student.ratios[key])} the {name}" for key, name in NOUNS.items() if key in student.ratios
    )
    if not costs:
        return f"has {accuracy} beside {student.its_teacher}: {conclusion}"
    return f"costs {costs} of {student.its_teacher} for {accuracy}: {conclusion}"


def _size(names: Sequence[str]) -> str:
    return " and ".join("size" if name == "parameters" else name for name in names)


def times(ratio: float) -> str:
    """'2.5x', '0.32x', '14x', '1.05x'."""
    if ratio < 1 / ALIKE:
        return f"{ratio:.2g}x"
    return f"{ratio:.{2 if ratio <= ALIKE else 1 if ratio < 10 else 0}f}x"


def _beside_control(student: Standing) -> str:
    difference = student.against_control
    return "" if difference is None else f"; {_gain(difference, 'distillation itself')}"


def _by_control(difference: Difference) -> str:
    conclusion = "worth it" if difference.shown == "better" else "distillation is not worth it"
    return f"{_gain(difference, 'distillation')}: {conclusion}"


def _gain(difference: Difference, what: str) -> str:
    """Over the control; `what` is the subject of the sentence where there is a difference."""
    points = f"({difference.points:+.2f} points)"
    return {
        "better": f"{what} gained {difference.points:.2f} points over training without a teacher",
        "worse": f"{what} lost {-difference.points:.2f} points against training without a teacher",
        "equal": f"training without a teacher gives an accuracy equal within {EQUAL:g} point {points}",
        "open": f"no gain over training without a teacher is shown {points}",
    }[difference.shown]
