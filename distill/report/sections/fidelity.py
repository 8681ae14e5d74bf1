"""Fidelity: how far student and control follow the teacher, where that is right and where it is wrong."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from scipy.special import log_softmax
from sklearn.metrics import confusion_matrix

from distill.report.comparison import Comparison, Row
from distill.report.metrics import Floats, Ints, agree, as_numbers, decisions
from distill.report.page import Column, Section, Table
from distill.report.statistics import SIGNIFICANT, mcnemar, p_text

COLUMNS: list[Column] = [
    ("model", "model", ""),
    ("agreement %", "agreement", ".2f"),
    ("where it is right %", "agreement_where_right", ".2f"),
    ("where it is wrong %", "agreement_where_wrong", ".2f"),
    ("KL", "kl", ".4f"),
    ("same mistake", "same_mistakes", ",d"),
    ("other mistake", "other_mistakes", ",d"),
    ("corrected", "corrected", ",d"),
    ("spoiled", "spoiled", ",d"),
]
AGAINST_CONTROL: list[Column] = [
    ("run", "run", ""),
    ("on the teacher's mistakes", "what", ""),
    ("student against control", "words", ""),
    ("both", "both", ",d"),
    ("student only", "student_only", ",d"),
    ("control only", "control_only", ",d"),
    ("neither", "neither", ",d"),
]


class Fidelity(NamedTuple):
    """One model beside its teacher; agreement in percent of the images, None where there are none."""

    agreement: float
    agreement_where_right: float | None
    agreement_where_wrong: float | None
    kl: float
    """Mean of KL(teacher || model) of their probabilities, in nats."""
    teacher_wrong: int
    same_mistakes: int
    """The teacher's mistakes that the model makes as well: inherited."""
    other_mistakes: int
    """Where the teacher is wrong: mistakes, but others."""
    corrected: int
    """The teacher's mistakes where the model is right."""
    spoiled: int
    """The teacher's right answers where the model is wrong."""


class TwoByTwo(NamedTuple):
    """Of the teacher's mistakes: what student and control do there."""

    what: str
    both: int
    student_only: int
    control_only: int
    neither: int
    p: float
    """Of McNemar's exact test of student against control."""
    words: str


def fidelity(logits: Floats, teacher: Floats, labels: Ints) -> Fidelity:
    """Of a model's logits [N, classes] to the teacher's."""
    says, teacher_says = decisions(logits), decisions(teacher)
    same, right, wrong = agree(says, teacher_says), says == labels, teacher_says != labels
    own, target = (log_softmax(as_numbers(values), axis=1) for values in (logits, teacher))
    # From logarithms: a model's probability too small to store is not 0. One of 0 of the teacher's adds nothing.
    probabilities = np.exp(target)
    possible = probabilities > 0
    parts = probabilities * (np.where(possible, target, 0.0) - np.where(possible, own, 0.0))
    return Fidelity(
        agreement=100 * float(same.mean()),
        agreement_where_right=None if wrong.all() else 100 * float(same[~wrong].mean()),
        agreement_where_wrong=100 * float(same[wrong].mean()) if wrong.any() else None,
        kl=float(parts.sum(1).mean()),
        teacher_wrong=int(wrong.sum()),
        same_mistakes=int((wrong & same).sum()),
        other_mistakes=int((wrong & ~same & ~right).sum()),
        corrected=int((wrong & right).sum()),
        spoiled=int((~wrong & ~right).sum()),
    )


def inheritance(student: Floats, control: Floats, teacher: Floats, labels: Ints) -> list[TwoByTwo]:
    """Student against control on the teacher's mistakes; empty where it makes none."""
    wrong = decisions(teacher) != labels
    if not wrong.any():
        return []
    student_says, control_says, teacher_says = (decisions(values[wrong]) for values in (student, control, teacher))
    found = []
    for what, answers in (
        ("makes the teacher's mistake", teacher_says),
        ("is right where the teacher is wrong", labels[wrong]),
    ):
        a, b = agree(student_says, answers), agree(control_says, answers)
        both, student_only, control_only, neither = confusion_matrix(a, b, labels=[True, False]).ravel().tolist()
        test = mcnemar("student", "control", a, b)
        often = "more often" if test.points > 0 else "less often"
        words = f"{often if test.p < SIGNIFICANT else 'no difference shown'}, {p_text(test.p)}"
        found.append(TwoByTwo(what, both, student_only, control_only, neither, test.p, words))
    return found


def build(comparison: Comparison) -> Section | None:
    found = [
        (row, fidelity(row.logits, teacher.logits, comparison.labels))
        for row in comparison.rows
        if row.model != "teacher" and not row.by_neighbours and (teacher := comparison.teacher_of(row.run)) is not None
    ]
    if not found:
        return None
    against = {
        name: inheritance(student.logits, control.logits, teacher.logits, comparison.labels)
        for name in comparison.runs
        if (teacher := comparison.teacher_of(name)) is not None
        and (student := comparison.row(name, "student")) is not None
        and not student.by_neighbours
        and (control := comparison.control_of(name)) is not None
    }
    models = [{"model": comparison.name(row), **values._asdict()} for row, values in found]
    tables = [{"run": name, **table._asdict()} for name, pair in against.items() for table in pair]
    parts = [
        Table.of(
            "fidelity",
            "Agreement with the teacher, overall and where it is right and wrong; KL of the teacher's probabilities to "
            "the model's, in nats. Spoiled: images that the teacher has right and the model wrong.",
            models,
            COLUMNS,
        )
    ]
    if tables:
        caption = "On how many of the teacher's mistakes student and control do so."
        columns = AGAINST_CONTROL if comparison.several else AGAINST_CONTROL[1:]
        parts.append(Table.of("against-control", caption, tables, columns))
    row, values = next((pair for pair in found if pair[0].is_whole), found[0])
    says = _says(comparison, row, values, against.get(row.run, []))
    return Section("fidelity", "Fidelity", says, parts, {"models": models, "against_control": tables})


def _says(comparison: Comparison, row: Row, values: Fidelity, against: list[TwoByTwo]) -> str:
    whose = f"{row.model} of {row.run}" if comparison.several else row.model
    says = f"The {whose} agrees with the teacher on {values.agreement:.2f} % of the images"
    if values.teacher_wrong:
        says += (
            f"; of the teacher's {values.teacher_wrong:,} mistakes {values.same_mistakes:,} are made again and "
            f"{values.corrected:,} corrected"
        )
    if against:
        again = against[0]
        made = again.both + again.control_only
        says += f" (the control makes {made:,} of them again; the student against it: {again.words})"
    return f"{says}."
