"""Speed and memory, as ratios of arms that are measured side by side: what `distill bench` runs."""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from rich.console import Console
from rich.markdown import Markdown

from distill.bench.measure import Machine, Row, table
from distill.console import console, say
from distill.environment import describe_environment
from distill.errors import InputError
from distill.files.text import write_text
from distill.launching.processes import set_threads, start_processes

SIZES = {"cpu": ("vit_nano", "vit_tiny"), "cuda": ("vit_tiny",)}
BATCH_SIZE = {"cpu": 128, "cuda": 1024}


def bench(
    suites: Sequence[str],
    *,
    device: str | None,
    size: str | None,
    output: Path | None,
    repetitions: int = 3,
    minutes: float | None = None,
    only: str | None = None,
) -> None:
    """Measure the suites, print their table, and write it as JSON, and as Markdown beside it, after every row.

    Args:
        repetitions: rounds of every row, at least 2.
        minutes: begin no other row after so many.
        only: measure only rows whose name has this in it, whatever its case; * stands for anything.

    Raises:
        InputError: there is no such device, too few rounds, no such row, or the file cannot be written there.
    """
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if place.type == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: torch sees no GPU here; leave it out, or give cpu.")
    if output is not None and not output.resolve().parent.is_dir():
        raise InputError(f"--json {output}: there is no folder {output.parent}.")
    if repetitions < 2:
        raise InputError(f"--repetitions {repetitions}: quartiles need at least 2.")
    if place.type == "cpu":  # accelerate would take a GPU where there is one; so would the processes begun here
        os.environ["ACCELERATE_USE_CPU"] = "true"
    start_processes()
    logging.getLogger("distill").setLevel(logging.WARNING)
    described = describe_environment(num_processes=1, precision=None, device=place, threads=set_threads())
    for irrelevant in ("command", "host", "processes", "precision"):
        del described[irrelevant]
    end = None if minutes is None else time.monotonic() + 60 * minutes
    rows: list[Row] = []
    with TemporaryDirectory(prefix="distill-bench-") as scratch:
        sizes = SIZES[place.type] if size is None else (f"vit_{size}",)
        machine = Machine(place, sizes, Path(scratch), BATCH_SIZE[place.type], repetitions, only)
        if "bf16" not in machine.precisions:
            say("bf16 is left out: this CPU has no instructions for it.")
        measured = (
            (suite, row) for suite in suites for row in import_module(f"distill.bench.suites.{suite}").measure(machine)
        )
        for suite, row in measured:
            if not machine.wants(row["name"]):
                continue
            rows.append(row)
            say(f"{row['name']}: {row['arm_a']} over {row['arm_b']} {row['ratio']:.3f}")
            text = _write(rows, machine, described, output)
            if end is not None and time.monotonic() > end:
                say(f"--minutes {minutes:g}: stopped in the suite {suite}; what would have followed is left out.")
                break
        if not rows and only is not None:
            raise InputError(
                f"--only {only}: no row of {', '.join(suites)} on {place.type} has this in its name. The names are in "
                "the first column of the table."
            )
        if not rows:
            text = _write(rows, machine, described, output)
    Console(width=max(console.width, 160), highlight=False).print(Markdown(text))


def _write(rows: Sequence[Row], machine: Machine, described: Mapping[str, Any], output: Path | None) -> str:
    """Write what has been measured; the Markdown."""
    rates = {name: rate / 1e9 for name, rate in machine.matrix_rates.items()}
    head = [f"{described['device_name']}, {described['threads']} threads"]
    head += [f"matrix products of {rate:,.0f} GFLOP/s in {name}" for name, rate in rates.items()]
    head += [", ".join(f"{name} {version}" for name, version in described["versions"].items())]
    text = f"{'; '.join(head)}.\n\n{table(rows)}"
    if output is not None:
        figures = {"machine": {**described, "matrix_gflops": rates}, "rows": rows}
        write_text(output, json.dumps(figures, indent=1) + "\n")
        write_text(output.with_suffix(".md"), text)
    return text
