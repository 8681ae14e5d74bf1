"""Counts how often the promises of reliability hold: runs the tests that count them, the large counts too, and writes
results/reliability.json.

    python -m results.reliability

(in the project's folder; on two cores about an hour, half of it runs that are killed every few seconds)
"""

from __future__ import annotations

import json
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from distill.processes import set_threads
from distill.run import describe_environment
from distill.text_files import write_text

HERE = Path(__file__).resolve().parent
PLACES = ("tests/faults", "tests/distributed", "tests/test_resume.py", "tests/test_determinism.py")


def main() -> int:
    """Write the figures if every test passed; else say which did not."""
    with TemporaryDirectory() as scratch:
        report = Path(scratch) / "report.xml"
        arguments = ["-m", "soak or not soak", "-p", "no:cacheprovider", f"--junitxml={report}", *PLACES]
        result = subprocess.run([sys.executable, "-m", "pytest", *arguments], cwd=HERE.parent, check=False)
        if result.returncode:
            return result.returncode
        lines = [
            json.loads(found.attrib["value"])
            for found in ET.parse(report).iter("property")
            if found.attrib["name"] == "reliability"
        ]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    machine = describe_environment(num_processes=1, precision=None, device=device, threads=set_threads())
    for key in ("command", "host", "processes", "precision"):
        del machine[key]
    write_text(HERE / "reliability.json", json.dumps({"machine": machine, "promises": lines}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
