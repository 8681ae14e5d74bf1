"""Counts how often the promises of reliability hold: runs the tests that count them, the large counts too, and writes
results/reliability.json.

    python -m results.reliability [TEST_FILE ...]

(in the project's folder; on two cores more than an hour, half of it runs that are killed every few seconds). With
files, only those are run and their figures replaced.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from distill.environment import describe_environment
from distill.files.text import write_text
from distill.launching.processes import set_threads

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
RESULT = HERE / "reliability.json"


def main() -> int:
    """The exit code: 1 if a test failed; its file's figures are left out then."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path, metavar="TEST_FILE")
    asked = parser.parse_args().files
    failed = False
    if not asked:
        RESULT.unlink(missing_ok=True)
    for file in asked or counting_files():
        name = str(file.resolve().relative_to(ROOT))
        lines = count(name)
        failed |= lines is None
        figures = json.loads(RESULT.read_text(encoding="utf-8")) if RESULT.exists() else {}
        figures.pop(name, None)
        if lines is not None:
            figures[name] = {"machine": machine(), "counts": lines}
        write_text(RESULT, json.dumps(figures, indent=1) + "\n")
    return int(failed)


def counting_files() -> list[Path]:
    """The files of tests that take the fixture `counted`."""
    return sorted(path for path in (ROOT / "tests").rglob("test_*.py") if "counted: Counted" in path.read_text())


def count(name: str) -> list[dict[str, Any]] | None:
    """What the tests of one file counted; None if one failed."""
    with TemporaryDirectory() as scratch:
        report = Path(scratch) / "report.xml"
        arguments = [
            "--numprocesses=0",
            "-m",
            "soak or not soak",
            "-o",
            "timeout=14400",
            "-o",
            "junit_family=xunit1",
            f"--junitxml={report}",
            name,
        ]
        if subprocess.run([sys.executable, "-m", "pytest", *arguments], cwd=ROOT, check=False).returncode:
            return None
        found = [entry.attrib for entry in ET.parse(report).iter("property")]
    return [json.loads(entry["value"]) for entry in found if entry["name"] == "reliability"]


def machine() -> dict[str, Any]:
    """Where, with which versions and at which commit one file's figures were counted."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    described = describe_environment(num_processes=1, precision=None, device=device, threads=set_threads())
    return {key: value for key, value in described.items() if key not in ("command", "host", "processes", "precision")}


if __name__ == "__main__":
    sys.exit(main())
