"""The README's first two shell blocks are what .ci/run executes; what it names exists."""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import sys
from pathlib import Path
from urllib.parse import unquote

import pytest

from distill.bench.measure import table
from distill.cli import COMMANDS
from distill.recipe import Recipe
from distill.run import read_metrics, read_status

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def block(number: int) -> str:
    command = [sys.executable, ".ci/readme_blocks.py", "README.md", str(number)]
    return subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout


def test_the_first_block_installs_and_runs_the_quickstart() -> None:
    assert block(1) == "python -m pip install -e .\naccelerate launch distill/train.py recipes/quickstart.yaml\n"


def test_the_second_block_installs_and_passes_the_tests() -> None:
    assert block(2) == 'python -m pip install -e ".[test]"\npytest\n'


@pytest.mark.parametrize("document", ["README.md", "CONTRIBUTING.md"])
def test_files_that_are_named_exist(document: str) -> None:
    text = (ROOT / document).read_text(encoding="utf-8")
    paths = re.findall(r"\b(?:recipes|distill|teachers|tests)/[\w./]+\.(?:yaml|py)\b", text)
    assert paths
    assert [path for path in [*paths, *re.findall(r"\]\((\w[\w.]*)\)", text)] if not (ROOT / path).exists()] == []


def test_links_lead_somewhere() -> None:
    documents = subprocess.run(
        ["git", "ls-files", "*.md"], capture_output=True, text=True, check=True, cwd=ROOT
    ).stdout.split()
    assert {"README.md", "results/README.md"} <= set(documents)
    broken = [
        f"{document}: {link}"
        for document in documents
        for link in re.findall(r"\]\(([^)\s:#]+)\)", (ROOT / document).read_text(encoding="utf-8"))
        if not ((ROOT / document).parent / unquote(link)).exists()
    ]
    assert broken == []


@pytest.mark.parametrize("document", sorted(path.name for path in (ROOT / "docs").glob("*.md")))
def test_tests_that_docs_name_exist(document: str) -> None:
    named = set(re.findall(r"`(test_\w+)`", (ROOT / "docs" / document).read_text(encoding="utf-8")))
    assert named
    sources = [path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py")]
    assert [name for name in sorted(named) if not any(f"def {name}(" in source for source in sources)] == []


@pytest.mark.parametrize("document", ["README.md", "CHANGELOG.md"])
def test_commands_that_are_named_exist(document: str) -> None:
    text = (ROOT / document).read_text(encoding="utf-8")
    named = set(re.findall(r"(?:^|`)distill ([a-z]+)", text, flags=re.MULTILINE))
    assert named
    assert named <= set(COMMANDS)


def test_the_readme_names_every_section_of_a_recipe() -> None:
    rows = "".join(re.findall(r"^\| (`.*?) \|", README, flags=re.MULTILINE))
    assert {key for key in Recipe.model_fields if f"`{key}`" not in rows} == set()


CELLS = {
    ("nano", "student"): "nano-soft-t3-0",
    ("nano", "control"): "nano-control-0",
    ("nano_guide", "student"): "nano-hard-guide-0",
}
"""Run and model of the report: the run's files under results/runs."""


def test_the_results_are_those_of_the_run_files() -> None:
    folder = ROOT / "results" / "cifar10-nano"
    lines = (folder / "report.md").read_text(encoding="utf-8").splitlines()
    first = next(index for index, line in enumerate(lines) if line.startswith("|"))
    table = list(itertools.takewhile(lambda line: line.startswith("|"), lines[first:]))
    assert "\n".join(table) in README
    shown = {tuple(line.strip("| ").split(" | ")[:2]): line.strip("| ").split(" | ")[2] for line in table[2:]}
    rows = json.loads((folder / "report.json").read_text(encoding="utf-8"))["rows"]
    assert [f"{row['top1']:.2f}" for row in rows] == list(shown.values())
    for (run, model), cell in CELLS.items():
        path = ROOT / "results" / "runs" / cell
        (test,) = [line for line in read_metrics(path, "eval") if line["split"] == "test"]
        assert f"{test['student/top1']:.2f}" == shown[run, f"{model}, both heads"]
        assert read_status(path)["state"] == "finished"


@pytest.mark.parametrize(("title", "arm"), [("Distillation methods", "nano-"), ("Real runs on CIFAR-10", "laptop")])
def test_the_rows_of_arms_are_those_of_the_results(title: str, arm: str) -> None:
    section = README.split(f"## {title}\n")[1].split("\n## ")[0]
    shown = [line for line in section.splitlines() if line.startswith("|") and f"| `{arm}" in line]
    assert len(shown) >= 3
    assert set(shown) <= set((ROOT / "results" / "README.md").read_text(encoding="utf-8").splitlines())


def test_the_speeds_are_those_of_the_benchmark() -> None:
    folder = ROOT / "results" / "bench"
    section = README.split("## Speed\n")[1].split("\n## ")[0]
    shown = [line for line in section.splitlines() if line.startswith("|")]
    assert len(shown) > 10
    rows = json.loads((folder / "cpu.json").read_text(encoding="utf-8"))["rows"]
    assert set(shown) <= set(table(rows).splitlines())
    written = (folder / "cpu.md").read_text(encoding="utf-8")
    for row in rows:
        assert f"| {row['name']} | {row['arm_a']} over {row['arm_b']} | {row['ratio']:.3f} |" in written
        assert row["repetitions"] >= 5


def test_the_counts_are_those_of_the_reliability_run() -> None:
    """Of a promise that is counted in small and in large, the large count."""
    figures = json.loads((ROOT / "results" / "reliability.json").read_text(encoding="utf-8"))
    counts: dict[str, tuple[int, int]] = {}
    for line in (line for file in figures.values() for line in file["counts"]):
        earlier = counts.get(line["promise"], (0, 0))
        counts[line["promise"]] = max(earlier, (line["of"], line["done"]))
    section = README.split("## Reliability\n")[1].split("\n## ")[0]
    shown = re.findall(r"^\| (.+?) \| ([\d,]+) of ([\d,]+) \|$", section, flags=re.MULTILINE)
    assert sorted(shown) == sorted((promise, f"{done:,}", f"{of:,}") for promise, (of, done) in counts.items())
