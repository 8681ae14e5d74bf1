"""The written report: three files with the same numbers, whole or not at all."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from distill.errors import InputError
from distill.report.comparison import compare
from distill.report.document import write_report
from distill.report.sections import calibration
from distill.report.sections.learning import draw

MakeRun = Callable[..., Path]


VOID = ("meta", "link", "img", "input", "br")


class Page(HTMLParser):
    """Visible text, ids and addresses of a page; void elements aside, every tag must close."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.text: list[str] = []
        self.ids: list[str] = []
        self.addresses: list[str] = []
        self.open: list[str] = []
        self.feed(source)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.ids += [value or "" for key, value in attrs if key == "id"]
        self.addresses += [value or "" for key, value in attrs if key in ("src", "href", "xlink:href", "data")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not {"style", "script"} & set(self.open):
            self.text.append(data)


def test_the_files_hold_the_same_numbers(make_run: MakeRun, tmp_path: Path) -> None:
    comparison = compare([make_run(control=True, ema=True)])
    html = tmp_path / "new" / "report.html"
    names = ["report.html", "report.md", "report.json", "report-top1.svg", "report-loss.svg"]
    assert write_report(comparison, html) == [html.parent / name for name in names]
    assert sorted(path.name for path in html.parent.iterdir()) == sorted(names)
    for name in names[3:]:
        assert f"]({name})" in html.with_suffix(".md").read_text()
        assert ElementTree.parse(html.parent / name).getroot().tag.endswith("svg")
    data = json.loads(html.with_suffix(".json").read_text())
    page, markdown = " ".join(Page(html.read_text()).text), html.with_suffix(".md").read_text()
    assert len(data["rows"]) == 7
    assert data["test_images"] == 40
    lines = [line for line in markdown.partition("| model ")[2].splitlines() if line.startswith("|")][2:9]
    for row, line in zip(data["rows"], lines, strict=True):
        assert row["top1"] == 100 * row["top1_correct"] / 40
        for shown in (f"{row['top1']:.2f}", f"{row['topk']:.2f}", f"{row['nll']:.4f}", f"{row['parameters']:,}"):
            assert shown in line
            assert shown in page
    assert {(curve["model"], curve["variant"]) for curve in data["curves"]["top1"]} == {
        ("student", "validation"),
        ("student", "validation, EMA"),
        ("control", "validation"),
    }
    assert "the student was best after epoch 4 of 4 (55.00 %, moving average) and was still rising" in page
    assert "the control was best after epoch 4 of 4 (54.00 %) and was still rising" in page


def test_the_page_is_one_file_and_well_formed(make_run: MakeRun, tmp_path: Path) -> None:
    html = write_report(compare([make_run(control=True)]), tmp_path / "report.html")[0]
    source = html.read_text()
    page = Page(source)
    assert page.open == []
    assert len(page.ids) == len(set(page.ids))
    assert page.addresses
    assert all(address.startswith("data:") or address[1:] in page.ids for address in page.addresses)
    assert not re.search(r"url\((?!#)|@import", source)
    used = set(re.findall(r"url\(#([^)]*)\)", source))
    assert used
    assert used <= set(page.ids)


def test_names_are_escaped(make_run: MakeRun, tmp_path: Path) -> None:
    runs = [make_run("<script>alert(1)<"), make_run("a|b $x$ _c", seed=1)]
    html, markdown, *_ = write_report(compare(runs), tmp_path / "report.html")
    assert html.read_text().count("<script") == 1
    assert "&lt;script&gt;alert(1)&lt;" in html.read_text()
    assert "a\\|b $x$ _c" in markdown.read_text()
    assert "<script" not in markdown.read_text()


def test_choosing_on_the_test_set_stands_before_the_table(make_run: MakeRun, tmp_path: Path) -> None:
    html, markdown, data, *_ = write_report(compare([make_run(select_on="test")]), tmp_path / "report.html")
    for text, table in ((html.read_text(), "<table"), (markdown.read_text(), "| model")):
        assert 0 < text.index("chosen on the test set") < text.index(table)
    assert len(json.loads(data.read_text())["warnings"]) == 1


def test_a_bare_run_gives_a_shorter_page(make_run: MakeRun, tmp_path: Path) -> None:
    path = make_run(outputs=("student.fused",))
    for name in ("metrics.jsonl", "environment.json", "resolved.yaml"):
        (path / name).unlink()
    (path / "status.json").write_text('{"state": "finished"}')
    source = write_report(compare([path]), tmp_path / "report.html")[0].read_text()
    page = Page(source)
    assert page.open == []
    text = " ".join(page.text)
    for present in ("Calibration", "Classes"):
        assert present in text
    for absent in (
        "Learning",
        "Fidelity",
        "Pair by",
        "Robust",
        "Pictures",
        "Tokens",
        "Cost",
        "How it",
        "The control",
        "Warning",
    ):
        assert absent not in text


def test_the_report_replaces_an_older_one_and_refuses_other_names(make_run: MakeRun, tmp_path: Path) -> None:
    comparison = compare([make_run()])
    html = tmp_path / "report.html"
    html.write_text("older")
    write_report(comparison, html)
    assert html.read_text() != "older"
    (tmp_path / "folder.html").mkdir()
    for bad in ("report.md", "report", "folder.html"):
        with pytest.raises(InputError, match=r"ends in \.html"):
            write_report(comparison, tmp_path / bad)


def test_a_failed_write_leaves_the_older_report(
    make_run: MakeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    html = tmp_path / "report.html"
    html.write_text("older")
    before = sorted(tmp_path.iterdir())
    comparison = compare([make_run()])

    def full(*_: object, **__: object) -> int:
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="no space"):
        write_report(comparison, html)
    assert html.read_text() == "older"
    assert sorted(path for path in tmp_path.iterdir() if path.name != "run") == before


def test_an_impossible_label_is_null_in_json(make_run: MakeRun, tmp_path: Path) -> None:
    path = make_run()
    tensors = load_file(path / "predictions.safetensors")
    tensors["teacher"][0] = -np.inf
    tensors["teacher"][0, (tensors["labels"][0] + 1) % 10] = 0
    save_file(tensors, path / "predictions.safetensors")
    data = json.loads(write_report(compare([path]), tmp_path / "report.html")[2].read_text())
    assert data["rows"][0]["nll"] is None


def test_every_curve_is_drawn_at_its_points(make_run: MakeRun) -> None:
    comparison = compare([make_run(control=True, ema=True), make_run("second", seed=3, epochs=1)])
    loss, top1 = (draw(comparison, kind).axes for kind in ("loss", "top1"))
    expected = [curve.values for curve in comparison.curves["loss"]]
    assert [tuple(line.get_ydata()) for line in loss.get_lines()] == expected
    drawn = {line.get_label(): line for line in top1.get_lines()}
    assert tuple(drawn["student of run (validation)"].get_ydata()) == (51, 52, 53, 54)
    assert tuple(drawn["student of run (validation, EMA)"].get_ydata()) == (52, 53, 54, 55)
    assert tuple(drawn["control of run (validation)"].get_ydata()) == (51, 52, 53, 54)
    teachers = {line.get_label(): set(line.get_ydata()) for line in top1.get_lines() if line.get_linestyle() == "--"}
    assert teachers == {
        f"{row.run}: teacher (test)": {row.metrics.top1} for row in comparison.rows if row.model == "teacher"
    }
    # One epoch is one point, and a line without a marker would not show it.
    assert drawn["student of second (validation)"].get_marker() not in ("", "None", None)
    same_model = drawn["student of run (validation)"], drawn["student of run (validation, EMA)"]
    assert same_model[0].get_color() == same_model[1].get_color()
    assert drawn["control of run (validation)"].get_color() != same_model[0].get_color()


@pytest.mark.parametrize("epochs", [4, 60])
def test_every_point_says_what_it_is(make_run: MakeRun, epochs: int) -> None:
    """Also where there are so many that their marks are not drawn."""
    root = ElementTree.fromstring(str(draw(compare([make_run(epochs=epochs)]), "loss").to_svg("loss", "Training loss")))
    tips = [element.get("data-tip") for element in root.iter() if element.get("data-tip")]
    assert tips == [f"student, epoch {epoch}: {2 / epoch + 0.5:.4g}" for epoch in range(1, epochs + 1)]


def test_the_drawing_is_deterministic_scales_and_takes_the_ink_of_the_page(make_run: MakeRun) -> None:
    comparison = compare([make_run("$a$_b")])
    svg = draw(comparison, "loss").to_svg("loss", "Training loss")
    assert svg == draw(comparison, "loss").to_svg("loss", "Training loss")
    root = ElementTree.fromstring(str(svg))
    assert "viewBox" in root.attrib
    assert "width" not in root.attrib
    assert "currentColor" in svg
    assert {"epoch", "training loss"} <= {element.text for element in root.iter("text")}


def test_nothing_is_fitted_on_images_that_a_teacher_may_know(make_run: MakeRun) -> None:
    section = calibration.build(compare([make_run(analysis=True, control=True)]))
    assert section is not None
    temperatures = {line["model"]: line["temperature"] for line in section.data}
    assert temperatures.pop("teacher") is None
    assert len(temperatures) == 6
    assert None not in temperatures.values()
