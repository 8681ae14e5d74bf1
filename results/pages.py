"""Fills the figures of README.md and docs/ from the files of results/, and from nothing else.

    python -m results.pages

A page says what it wants between two comments, and this writes the tables in between:

    <!-- filled: arms nano-control nano-hard -->      rows of results/README.md, by arm
    <!-- filled: goals laptop -->                     rows of its goals that have been measured, by arm
    <!-- filled: report cifar10-nano -->              the first table of results/NAME/report.md
    <!-- filled: bench cpu startup* memory*tiny* -->  rows of results/bench/NAME.json, by patterns of their names
    <!-- filled: reliability -->                      the counts of results/reliability.json
    <!-- end -->
"""

from __future__ import annotations

import itertools
import re
import sys
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from distill.bench.measure import table
from distill.errors import InputError
from distill.files.plain_data import read_json
from distill.files.text import write_text
from results.arms import HERE

ROOT = HERE.parent
LEFT_OUT = ("validation %", "agreement %", "p", "p over seeds", "in common")
"""Columns of results/README.md that pages do without."""
BLOCK = re.compile(r"^(<!-- filled: (\w+)(.*?) -->\n)(.*?)^(<!-- end -->)$", re.MULTILINE | re.DOTALL)


def pages() -> list[Path]:
    """README.md and all pages of docs/."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def filled(text: str) -> str:
    """The text of a page with its blocks filled.

    Raises:
        InputError: a block asks for what is not there.
    """

    def fill(block: re.Match[str]) -> str:
        begin, kind, words, _, end = block.groups()
        if kind not in KINDS:
            raise InputError(f"<!-- filled: {kind} -->: unknown; one of {', '.join(KINDS)}.")
        return f"{begin}{KINDS[kind](words.split())}\n{end}"

    return BLOCK.sub(fill, text)


def arms(names: Sequence[str]) -> str:
    """Rows of the first table of results/README.md that has all of these arms."""
    lines = (HERE / "README.md").read_text(encoding="utf-8").splitlines()
    for top in (place for place, line in enumerate(lines) if line.startswith("| arm |")):
        header, rule, *rows = map(_cells, itertools.takewhile(lambda line: line.startswith("|"), lines[top:]))
        found = {row[0].strip("`"): row for row in reversed(rows)}  # the first row of each
        if set(names) <= found.keys():
            kept = [place for place, column in enumerate(header) if column not in LEFT_OUT]
            shown = [header, rule, *(found[name] for name in names)]
            return "\n".join(_row([row[place] for place in kept]) for row in shown)
    raise InputError(f"results/README.md: there is no arm {' beside '.join(map(repr, names))} in a table.")


def _cells(row: str) -> list[str]:
    return [cell.strip() for cell in row.strip("|").split("|")]


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def goals(names: Sequence[str]) -> str:
    """The goals of these arms that have been measured, in the order of results/README.md, without their question."""
    lines = (HERE / "README.md").read_text(encoding="utf-8").splitlines()
    header = next(index for index, line in enumerate(lines) if line.startswith("| question | goal |"))
    rows = [_cells(line) for line in itertools.takewhile(lambda line: line.startswith("|"), lines[header + 2 :])]
    wanted = [[arm, goal, measured, met] for _, goal, arm, measured, met in rows if arm.strip("`") in names]
    run = [_row(row) for row in wanted if row[2] != "not run"]
    return "\n".join([_row(["run", "goal", "measured", "met"]), _row([":---"] * 4), *run])


def report(names: Sequence[str]) -> str:
    """The first table of a report."""
    (name,) = names
    lines = (HERE / name / "report.md").read_text(encoding="utf-8").splitlines()
    first = next(index for index, line in enumerate(lines) if line.startswith("|"))
    return "\n".join(itertools.takewhile(lambda line: line.startswith("|"), lines[first:]))


def bench(words: Sequence[str]) -> str:
    """Rows of a benchmark whose names match one of the patterns."""
    name, *patterns = words
    rows: list[Any] = read_json(HERE / "bench" / f"{name}.json")["rows"]
    found = [row for row in rows if any(fnmatchcase(row["name"], pattern) for pattern in patterns)]
    return table(found).rstrip("\n")


def reliability(_: Sequence[str]) -> str:
    """How often each promise held; of one that is counted in small and in large, the large count."""
    counts: dict[str, tuple[int, int]] = {}
    for file in read_json(HERE / "reliability.json").values():
        for line in file["counts"]:
            counts[line["promise"]] = max(counts.get(line["promise"], (0, 0)), (line["of"], line["done"]))
    rows = [f"| {promise} | {done:,} of {of:,} |" for promise, (of, done) in counts.items()]
    return "\n".join(["| promise | held |", "| :--- | ---: |", *rows])


KINDS = {"arms": arms, "goals": goals, "report": report, "bench": bench, "reliability": reliability}


def main() -> int:
    try:
        for page in pages():
            before = page.read_text(encoding="utf-8")
            if (after := filled(before)) != before:
                write_text(page, after)
                print(page.relative_to(ROOT))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
