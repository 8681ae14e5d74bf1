"""Every pair of models on the same images."""

from __future__ import annotations

from itertools import combinations

from distill.report.comparison import Comparison
from distill.report.page import Column, Section, Table
from distill.report.statistics import SIGNIFICANT, holm, p_value

ORDER = ("student", "control", "teacher")
COLUMNS: list[Column] = [
    ("first", "first", ""),
    ("second", "second", ""),
    ("first against second", "words", ""),
    ("points", "points", "+.2f"),
    ("95 % interval", "interval", "{0[0]:+.2f} to {0[1]:+.2f}".format),
    ("only first right", "only_first_right", ",d"),
    ("only second right", "only_second_right", ",d"),
    ("p", "p", p_value),
    ("p, Holm", "p_holm", p_value),
]


def build(comparison: Comparison) -> Section | None:
    if len(comparison.rows) < 2:
        return None
    rows = sorted(comparison.rows, key=lambda row: ORDER.index(row.model))  # the student against the others
    tests = [(a.is_whole and b.is_whole, comparison.test(a, b)._asdict()) for a, b in combinations(rows, 2)]
    for (_, test), adjusted in zip(tests, holm([test["p"] for _, test in tests]), strict=True):
        test |= {"p_holm": adjusted, "interval": [test["low"], test["high"]]}
    every = [test for _, test in tests]
    wholes = [test for is_whole, test in tests if is_whole]
    heads = [test for is_whole, test in tests if not is_whole]
    says = (
        f"{sum(test['p'] < SIGNIFICANT for test in every)} of {len(every)} pairs differ by more than chance on these "
        f"{comparison.samples:,} images (McNemar's exact test at {100 * SIGNIFICANT:.0f} %, each pair by itself), "
        f"{sum(test['p_holm'] < SIGNIFICANT for test in every)} after Holm's adjustment for their number. Intervals of "
        "a difference are those of a paired bootstrap over the images; two models are equal within a point where two "
        "one-sided t-tests (TOST) say so."
    )
    parts = [Table.of("pairs", "Pairs of models.", wholes, COLUMNS)] if wholes else []
    if heads:
        caption = f"{len(heads)} pairs with single heads."
        parts.append(Table.of("pairs-heads", caption, heads, COLUMNS, folded=bool(wholes)))
    # The name by which readers of report.json know it.
    return Section("verdicts", "Pair by pair", says, parts, every)
