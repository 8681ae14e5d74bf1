"""Figures on pages are those of the files in results/."""

from __future__ import annotations

import json
import re

import pytest

from distill.bench.measure import table
from distill.errors import InputError
from distill.run import read_metrics, read_status
from results import pages
from results.pages import ROOT, filled


def test_all_pages_are_filled_from_the_files() -> None:
    texts = {page: page.read_text(encoding="utf-8") for page in pages.pages()}
    assert [str(page.relative_to(ROOT)) for page, text in texts.items() if filled(text) != text] == []
    kinds = {kind for text in texts.values() for _, kind, *_ in pages.BLOCK.findall(text)}
    assert kinds == set(pages.KINDS)


def test_what_a_block_holds() -> None:
    text = "before\n<!-- filled: arms nano-guide nano-control -->\nold\n<!-- end -->\nafter\n"
    lines = filled(text).splitlines()
    assert [lines[0], lines[-2], lines[-1]] == ["before", "<!-- end -->", "after"]
    assert [line.split("|")[1].strip() for line in lines[4:6]] == ["`nano-guide`", "`nano-control`"]
    students = filled("<!-- filled: arms students-area students-plain -->\n<!-- end -->\n").splitlines()
    assert students[1].startswith("| arm |  | parameters | GFLOPs | images/s |")  # the columns of its own table
    assert [line.split("|")[1].strip() for line in students[3:5]] == ["`students-area`", "`students-plain`"]
    rows = filled("<!-- filled: bench cpu startup* -->\n<!-- end -->\n").splitlines()[3:-1]
    assert rows
    assert all(row.startswith("| startup, ") for row in rows)
    measured = filled("<!-- filled: goals laptop tiny-hard-guide -->\n<!-- end -->\n")
    assert "`laptop`" in measured
    assert "not run" not in measured
    with pytest.raises(InputError, match="no arm 'nano-unheard'"):
        filled("<!-- filled: arms nano-unheard -->\n<!-- end -->\n")
    with pytest.raises(InputError, match="figures -->: unknown; one of arms, goals"):
        filled("<!-- filled: figures -->\n<!-- end -->\n")


CELLS = {
    ("nano", "student"): "nano-soft-t3-0",
    ("nano", "control"): "nano-control-0",
    ("nano_guide", "student"): "nano-hard-guide-0",
}
"""Run and model of the report: the run's files under results/runs."""


def test_the_report_is_that_of_the_run_files() -> None:
    first = pages.report(["cifar10-nano"]).splitlines()
    shown = {tuple(line.strip("| ").split(" | ")[:2]): line.strip("| ").split(" | ")[2] for line in first[2:]}
    rows = json.loads((ROOT / "results" / "cifar10-nano" / "report.json").read_text(encoding="utf-8"))["rows"]
    assert [f"{row['top1']:.2f}" for row in rows] == list(shown.values())
    for (run, model), cell in CELLS.items():
        path = ROOT / "results" / "runs" / cell
        (test,) = [line for line in read_metrics(path, "eval") if line["split"] == "test"]
        assert f"{test['student/top1']:.2f}" == shown[run, f"{model}, both heads"]
        assert read_status(path)["state"] == "finished"


def test_the_benchmark_is_that_of_its_table() -> None:
    folder = ROOT / "results" / "bench"
    rows = json.loads((folder / "cpu.json").read_text(encoding="utf-8"))["rows"]
    written = (folder / "cpu.md").read_text(encoding="utf-8")
    for row in rows:
        assert f"| {row['name']} | {row['arm_a']} over {row['arm_b']} | {row['ratio']:.3f} |" in written
        assert row["repetitions"] >= 5
    shown = re.findall(r"^\|.*\|$", pages.bench(["cpu", "*"]), flags=re.MULTILINE)
    assert shown == table(rows).splitlines()


def test_the_large_count_of_a_promise_is_shown() -> None:
    figures = json.loads((ROOT / "results" / "reliability.json").read_text(encoding="utf-8"))
    lines = [line for file in figures.values() for line in file["counts"]]
    shown = re.findall(r"^\| (.+?) \| ([\d,]+) of ([\d,]+) \|$", pages.reliability([]), flags=re.MULTILINE)
    assert {promise for promise, *_ in shown} == {line["promise"] for line in lines}
    for promise, done, of in shown:
        counts = [(line["of"], line["done"]) for line in lines if line["promise"] == promise]
        assert (int(of.replace(",", "")), int(done.replace(",", ""))) == max(counts)
