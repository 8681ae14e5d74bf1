"""The table of a benchmark, for the console and in Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from distill.bench.measure import Row, Unmeasured

COLUMNS = ("what", "A over B", "ratio", "spread", "goal", "met", "A, B", "share of the matrix rate")
VERDICTS = {True: "yes", False: "no", None: ""}


def cells(row: Row) -> tuple[str, ...]:
    """One row's cells in the order of COLUMNS."""
    details = row.details or {}
    each = [_speed(speed) for speed in details.get("per_second", ())]
    if "bytes" in details:
        each = [f"{size / 2**20:,.0f} MiB" for size in details["bytes"]]
    share = ", ".join(f"{share:.0%}" for share in details.get("share_of_matrix_rate", ()))
    if "waiting_for_data" in details:
        share += f"; {details['waiting_for_data']:.1%} of the time waiting for data"
    goal = "" if row.goal is None else str(row.goal)
    spread = f"{row.spread[0]:.3f} to {row.spread[1]:.3f}"
    over = f"{row.arm_a} over {row.arm_b}"
    return row.name, over, f"{row.ratio:.3f}", spread, goal, VERDICTS[row.met], ", ".join(each), share


def _speed(value: float) -> str:
    if value >= 1e9:
        return f"{value / 1e9:,.0f} G/s"
    return f"{value:,.3g}/s" if value < 100 else f"{value:,.0f}/s"


def render_console(rows: Sequence[Row], unmeasured: Sequence[Unmeasured]) -> Group:
    """The table, and below it what this machine cannot show; the last columns are left to the files."""
    table = Table(*COLUMNS[:-1])
    for row in rows:
        style = {True: "green", False: "yellow", None: ""}[row.met]
        table.add_row(*cells(row)[:-1], style=style)
    return Group(table, *(Text(line) for line in _left_out(unmeasured)))


def render_markdown(
    machine: Mapping[str, Any],
    rows: Sequence[Row],
    unmeasured: Sequence[Unmeasured],
    computed: Mapping[str, Any] | None,
) -> str:
    """The whole table, with a line on the machine above it, and below it what was computed, if anything."""
    rates = ", ".join(f"{rate:,.0f} GFLOP/s in {name}" for name, rate in machine["matrix_gflops"].items())
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    head = f"{machine['device_name']}, {machine['threads']} threads; matrix products {rates}; {versions}."
    lines = [head, "", _line(COLUMNS), _line(["---"] * len(COLUMNS)), *(_line(cells(row)) for row in rows)]
    if unmeasured:
        lines += ["", *(f"- {line}" for line in _left_out(unmeasured))]
    if computed is None:
        return "\n".join(lines) + "\n"
    what = f"{computed['what']}, if no part of the gradients' all-reduce overlaps with computing."
    lines += ["", f"Computed, not measured: {what}", ""]
    lines += [_line(("GPUs", "speed in multiples of one GPU's", "share of the step in the all-reduce"))]
    lines += [_line(["---"] * 3)]
    lines += [
        _line((str(row["gpus"]), f"{row['speed']:.2f}", f"{row['all_reduce_share']:.1%}")) for row in computed["rows"]
    ]
    assumed = ", ".join(f"{key} {value:g}" for key, value in computed["assumptions"].items())
    lines += ["", f"Assumed of each GPU: {assumed}."]
    return "\n".join(lines) + "\n"


def _line(texts: Sequence[str]) -> str:
    return f"| {' | '.join(texts)} |"


def _left_out(unmeasured: Sequence[Unmeasured]) -> list[str]:
    return [f"not measured: {one.name}, {one.goal}: {one.reason}" for one in unmeasured]
