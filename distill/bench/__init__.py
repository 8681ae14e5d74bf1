"""Speed and memory, as ratios of arms that are measured side by side: what `distill bench` runs."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from rich.console import Console

from distill.bench.machine import Machine
from distill.bench.measure import Row, Unmeasured
from distill.bench.scaling import computed
from distill.bench.suites import run_suite
from distill.bench.table import render_console, render_markdown
from distill.console import console, say
from distill.errors import InputError
from distill.files.text import write_text
from distill.launching.processes import set_threads, start_processes

SIZES = {"cpu": ("vit_nano", "vit_tiny"), "cuda": ("vit_tiny",)}
"""The students that the goals speak of; at 224 px on CUDA vit_small besides."""


def bench(suites: Sequence[str], *, device: str | None, size: str | None, output: Path | None) -> None:
    """Measure the suites, print their table, and write it as JSON, and as Markdown beside it.

    Raises:
        InputError: there is no such device, or the file cannot be written there.
    """
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if place.type == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: torch sees no GPU here; leave it out, or give cpu.")
    if output is not None and not output.resolve().parent.is_dir():
        raise InputError(f"--json {output}: there is no folder {output.parent}.")
    set_threads()
    if place.type == "cpu":  # accelerate would take a GPU where there is one; so would the processes begun here
        os.environ["ACCELERATE_USE_CPU"] = "true"
    start_processes()
    logging.getLogger("distill").setLevel(logging.WARNING)
    rows: list[Row] = []
    unmeasured: list[Unmeasured] = []
    with TemporaryDirectory(prefix="distill-bench-") as scratch:
        machine = Machine(place, SIZES[place.type] if size is None else (f"vit_{size}",), Path(scratch))
        machine.measure_matrix_rates()
        described = machine.describe()
        rates = ", ".join(f"{name} {rate:,.0f}" for name, rate in described["matrix_gflops"].items())
        say(f"{described['device_name']}, {described['threads']} threads, torch {described['versions']['torch']}")
        say(f"matrix products: {rates} GFLOP/s")
        for suite in suites:
            for found in run_suite(suite, machine):
                if isinstance(found, Unmeasured):
                    unmeasured.append(found)
                else:
                    rows.append(found)
                    say(f"{found.name}: {found.arm_a} over {found.arm_b} {found.ratio:.3f}")
    Console(width=max(console.width, 160), highlight=False).print(render_console(rows, unmeasured))
    if output is not None:
        growth = computed() if "step" in suites else None
        content = {
            "machine": described,
            "rows": [row.as_json() for row in rows],
            "unmeasured": [asdict(one) for one in unmeasured],
            "computed": growth,
        }
        write_text(output, json.dumps(content, indent=1) + "\n")
        write_text(output.with_suffix(".md"), render_markdown(described, rows, unmeasured, growth))
