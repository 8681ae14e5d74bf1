"""How far a model follows the teacher, where that is right and where it is wrong."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.special import log_softmax

from distill.report.metrics import Floats, Ints
from distill.report.statistics import Verdict, mcnemar


@dataclass(frozen=True)
class Fidelity:
    """One model beside its teacher on N images, as counts."""

    samples: int
    teacher_wrong: int
    same_where_right: int
    """Images on which teacher and model are right."""
    same_where_wrong: int
    """The teacher's mistakes that the model makes as well: inherited."""
    corrected: int
    """The teacher's mistakes where the model is right."""
    kl: float
    """Mean of KL(teacher || model) of their probabilities, in nats."""

    @property
    def teacher_right(self) -> int:
        return self.samples - self.teacher_wrong

    @property
    def agreement(self) -> float:
        return 100 * (self.same_where_right + self.same_where_wrong) / self.samples

    @property
    def agreement_where_right(self) -> float | None:
        return 100 * self.same_where_right / self.teacher_right if self.teacher_right else None

    @property
    def agreement_where_wrong(self) -> float | None:
        return 100 * self.same_where_wrong / self.teacher_wrong if self.teacher_wrong else None

    @property
    def other_mistakes(self) -> int:
        """Where the teacher is wrong: mistakes, but others."""
        return self.teacher_wrong - self.same_where_wrong - self.corrected

    @property
    def spoiled(self) -> int:
        """The teacher's right answers where the model is wrong."""
        return self.teacher_right - self.same_where_right


@dataclass(frozen=True)
class TwoByTwo:
    """Of the teacher's mistakes: what student and control do there."""

    what: str
    both: int
    student_only: int
    control_only: int
    neither: int
    verdict: Verdict


def fidelity(logits: Floats, teacher: Floats, labels: Ints) -> Fidelity:
    """Of a model's logits [N, classes] to the teacher's."""
    says, teacher_says = logits.argmax(1), teacher.argmax(1)
    wrong = teacher_says != labels
    same = says == teacher_says
    own, target = (log_softmax(values.astype(np.float64), axis=1) for values in (logits, teacher))
    probabilities = np.exp(target)
    # A probability of 0 adds nothing, whatever the model gives it.
    possible = probabilities > 0
    parts = probabilities * (np.where(possible, target, 0.0) - np.where(possible, own, 0.0))
    return Fidelity(
        samples=len(labels),
        teacher_wrong=int(wrong.sum()),
        same_where_right=int((same & ~wrong).sum()),
        same_where_wrong=int((same & wrong).sum()),
        corrected=int((wrong & (says == labels)).sum()),
        kl=float(parts.sum(1).mean()),
    )


def inheritance(student: Floats, control: Floats, teacher: Floats, labels: Ints) -> list[TwoByTwo]:
    """Student against control on the teacher's mistakes; empty where it makes none."""
    student_says, control_says, teacher_says = (values.argmax(1) for values in (student, control, teacher))
    wrong = teacher_says != labels
    if not wrong.any():
        return []
    events = {
        "makes the teacher's mistake": (student_says == teacher_says, control_says == teacher_says),
        "is right where the teacher is wrong": (student_says == labels, control_says == labels),
    }
    return [
        TwoByTwo(
            what,
            both=int((a & b)[wrong].sum()),
            student_only=int((a & ~b)[wrong].sum()),
            control_only=int((b & ~a)[wrong].sum()),
            neither=int((~a & ~b)[wrong].sum()),
            verdict=mcnemar("student", "control", a[wrong], b[wrong]),
        )
        for what, (a, b) in events.items()
    ]
