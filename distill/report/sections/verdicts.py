"""Every pair of models on the same images."""

from __future__ import annotations

from itertools import combinations

from distill.report.comparison import Comparison
from distill.report.page import Cell, Section, Table
from distill.report.statistics import SIGNIFICANT, Verdict, p_text

ORDER = ("student", "control", "teacher")


def build(comparison: Comparison) -> Section | None:
    if len(comparison.rows) < 2:
        return None
    rows = sorted(comparison.rows, key=lambda row: ORDER.index(row.model))  # the student against the others
    wholes = [comparison.verdict(a, b) for a, b in combinations([row for row in rows if row.is_whole], 2)]
    every = [comparison.verdict(a, b) for a, b in combinations(rows, 2)]
    others = [verdict for verdict in every if verdict not in wholes]
    shown = sum(verdict.p < SIGNIFICANT for verdict in every)
    says = (
        f"{shown} of {len(every)} pairs differ by more than chance on these {comparison.samples:,} images (McNemar's "
        f"exact test at {100 * SIGNIFICANT:.0f} %, each pair by itself, not adjusted for their number)."
    )
    parts = [_table("verdicts", "Pairs of models.", wholes)] if wholes else []
    if others:
        parts.append(_table("verdicts-heads", f"{len(others)} pairs with single heads.", others, folded=bool(wholes)))
    return Section("verdicts", "Pair by pair", says, parts, [_data(verdict) for verdict in every])


def _table(name: str, caption: str, verdicts: list[Verdict], *, folded: bool = False) -> Table:
    header = ["first", "second", "first against second", "points", "only first right", "only second right", "p"]
    rows = [
        [
            Cell(verdict.a),
            Cell(verdict.b),
            Cell(verdict.words, verdict.points),
            Cell(f"{verdict.points:+.2f}", verdict.points, good=_good(verdict)),
            Cell(f"{verdict.only_a:,}", verdict.only_a),
            Cell(f"{verdict.only_b:,}", verdict.only_b),
            Cell(p_text(verdict.p).removeprefix("p ").removeprefix("= "), verdict.p),
        ]
        for verdict in verdicts
    ]
    return Table(name, caption, header, rows, text_columns=3, folded=folded)


def _good(verdict: Verdict) -> bool | None:
    return verdict.points > 0 if verdict.p < SIGNIFICANT else None


def _data(verdict: Verdict) -> dict[str, object]:
    return {
        "first": verdict.a,
        "second": verdict.b,
        "points": verdict.points,
        "only_first_right": verdict.only_a,
        "only_second_right": verdict.only_b,
        "p": verdict.p,
        "words": verdict.words,
    }
