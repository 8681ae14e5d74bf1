"""One suite a file: `measure(machine)` yields rows, and the goals that this machine cannot show."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module

from distill.bench.machine import Machine
from distill.bench.measure import Row, Unmeasured


def run_suite(name: str, machine: Machine) -> Iterator[Row | Unmeasured]:
    """The rows of one suite, as they are measured."""
    yield from import_module(f"distill.bench.suites.{name}").measure(machine)
