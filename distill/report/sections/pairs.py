"""Every pair of models on the same images."""

from __future__ import annotations

from itertools import combinations

from distill.report.comparison import Comparison, Row
from distill.report.page import Column, Section, Table
from distill.report.roles import ALONE, CONTROL, STUDENT, TEACHER
from distill.report.statistics import SIGNIFICANT, holm, p_value

ORDER = (STUDENT, ALONE, CONTROL, TEACHER)
COLUMNS: list[Column] = [
    ("first", "first", ""),
    ("second", "second", ""),
    ("first against second", "words", ""),
    ("points", "points", "+.2f"),
    ("only first right", "only_first_right", ",d"),
    ("only second right", "only_second_right", ",d"),
    ("p", "p", p_value),
    ("p, Holm", "p_holm", p_value),
]


def build(comparison: Comparison) -> Section | None:
    if len(comparison.rows) < 2:
        return None
    rows = sorted(comparison.rows, key=lambda row: ORDER.index(row.role))  # the student against the others
    tests = [(_asked(comparison, a, b), comparison.test(a, b)._asdict()) for a, b in combinations(rows, 2)]
    for (_, test), adjusted in zip(tests, holm([test["p"] for _, test in tests]), strict=True):
        test |= {"p_holm": adjusted, "interval": [test["low"], test["high"]]}
    every = [test for _, test in tests]
    first = [test for is_asked, test in tests if is_asked]
    others = [test for is_asked, test in tests if not is_asked]
    says = (
        f"{sum(test['p'] < SIGNIFICANT for test in every)} of {len(every)} pairs differ by more than chance on these "
        f"{comparison.samples:,} images (McNemar's exact test at {100 * SIGNIFICANT:.0f} %, each pair by itself), "
        f"{sum(test['p_holm'] < SIGNIFICANT for test in every)} after Holm's adjustment for their number. Intervals of "
        "a difference are those of a paired bootstrap over the images; two models are equal within a point where two "
        "one-sided t-tests (TOST) say so."
    )
    caption = "Students against their teachers, their controls and each other."
    parts = [Table.of("pairs", caption, first, COLUMNS)] if first else []
    if others:
        caption = f"{len(others)} other pairs of models and heads." if first else "Pairs of models."
        parts.append(Table.of("pairs-others", caption, others, COLUMNS, folded=bool(first)))
    # The name by which readers of report.json know it.
    return Section("verdicts", "Pair by pair", says, parts, every)


def _asked(comparison: Comparison, a: Row, b: Row) -> bool:
    """Whether a is a student, and b its teacher, its control or another student."""
    students = (STUDENT, ALONE)
    asked = b.role in students or b is comparison.teacher_of(a.run) or b is comparison.control_of(a.run)
    return a.role in students and a.is_whole and b.is_whole and asked
