"""The page in a browser: it is quiet, draws, sorts, filters, fits a phone, and shows the numbers of report.json."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from distill.report.comparison import compare
from distill.report.document import write_report

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install .[test]")

MakeRun = Callable[..., Path]
LARGEST = 5_000_000


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None:
        pytest.skip("no chromium here: apt-get install chromium")
    with playwright.sync_playwright() as driver:
        running = driver.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield running
        running.close()


class Shown:
    """A page as a reader has it, with what it said on the console and asked of the network."""

    def __init__(self, browser: Any, html: Path, *, width: int = 1280, scheme: str = "light") -> None:
        self.complaints: list[str] = []
        self.requests: list[str] = []
        self.page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(html.as_uri())
        self.own = html.as_uri()

    @property
    def asked(self) -> list[str]:
        return [url for url in self.requests if url != self.own and not url.startswith("data:")]

    def text(self) -> str:
        """Visible, with everything unfolded as a reader can."""
        self.page.evaluate("for (const details of document.querySelectorAll('details')) details.open = true")
        return " ".join(self.page.inner_text("body").split())

    def too_wide(self) -> int:
        """Pixels by which the page is wider than its window."""
        return int(self.page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth"))


@pytest.fixture(scope="module")
def reported(three_runs: list[Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    html, _, data, *_ = write_report(compare(three_runs), tmp_path_factory.mktemp("report") / "report.html")
    return html, json.loads(data.read_text())


def test_on_paper_plots_stand_two_by_two(browser: Any, reported: tuple[Path, dict[str, Any]]) -> None:
    shown = Shown(browser, reported[0], width=794)  # A4 at 96 pixels an inch
    shown.page.emulate_media(media="print")
    assert shown.page.eval_on_selector("header", "top => top.getBoundingClientRect().bottom") < 1000  # of 1123
    widths = shown.page.evaluate("[...document.querySelectorAll('.part.plot > svg')].map(svg => svg.clientWidth)")
    assert len(widths) > 5
    assert min(widths) > 794 / 3
    wide = "[...document.querySelectorAll('body *')].filter(part => part.getBoundingClientRect().right > 794)"
    assert shown.page.evaluate(f"{wide}.map(part => part.outerHTML.slice(0, 80))") == []


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_is_quiet_asks_for_nothing_and_fits(
    browser: Any, reported: tuple[Path, dict[str, Any]], width: int, scheme: str
) -> None:
    html, _ = reported
    assert html.stat().st_size < LARGEST
    shown = Shown(browser, html, width=width, scheme=scheme)
    assert shown.too_wide() == 0
    shown.text()
    assert shown.too_wide() == 0
    background, ink = (
        sum(map(int, re.findall(r"\d+", shown.page.evaluate(f"getComputedStyle(document.body).{key}"))[:3]))
        for key in ("backgroundColor", "color")
    )
    assert (background > ink) == (scheme == "light")
    assert shown.asked == []
    assert shown.complaints == []


def test_every_plot_has_marks_that_answer_the_pointer(browser: Any, reported: tuple[Path, dict[str, Any]]) -> None:
    shown = Shown(browser, reported[0])
    shown.text()
    plots = shown.page.query_selector_all("figure.plot")
    assert len(plots) >= 14
    for plot in plots:
        tips = plot.eval_on_selector_all("[data-tip]", "marks => marks.map(mark => mark.dataset.tip)")
        assert tips, plot.inner_text()
        assert all(tips)
        box = plot.eval_on_selector(
            "[data-tip]", "mark => { mark.scrollIntoView({behavior: 'instant', block: 'center'}); "
            "const box = mark.getBoundingClientRect(); return [box.x + box.width / 2, box.y + box.height / 2]; }"
        )  # fmt: skip
        shown.page.mouse.move(*box)
        assert shown.page.inner_text("#tip") in tips


SORT = """table => [...table.querySelectorAll("thead button")].map((button, column) => [0, 1].map(() => {
  button.click();
  return [...table.tBodies[0].rows].map(row => row.children[column].dataset.key);
}))"""


def test_tables_sort_by_any_column(browser: Any, reported: tuple[Path, dict[str, Any]]) -> None:
    shown = Shown(browser, reported[0])
    tables = shown.page.query_selector_all("table.lines")
    assert len(tables) > 8
    for table in tables:
        before = table.eval_on_selector_all("tbody tr", "rows => rows.map(row => row.innerText).sort()")
        for once, twice in table.evaluate(SORT):
            for keys in (once, twice):
                filled = [key for key in keys if key]
                assert keys == filled + [""] * (len(keys) - len(filled))
            values = [float(key) if all(map(_is_number, filled)) else key for key in (key for key in once if key)]
            if values and isinstance(values[0], float):
                assert values in (sorted(values), sorted(values, reverse=True))
                assert [float(key) for key in twice if key] == values[::-1]
        after = table.eval_on_selector_all("tbody tr", "rows => rows.map(row => row.innerText).sort()")
        assert after == before
    assert shown.page.get_attribute("#table-models thead th:last-child", "aria-sort")


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def test_the_wall_of_pictures_can_be_filtered(browser: Any, reported: tuple[Path, dict[str, Any]]) -> None:
    html, data = reported
    shown = Shown(browser, html)
    shown.text()
    wall = shown.page.query_selector(".wall")
    assert wall.query_selector("output").inner_text() == "4 pictures"
    group = next(name for name in ("only the teacher is right", "neither is right") if data["pictures"][0][name])
    wall.query_selector("select").select_option(group)
    visible = [picture for picture in wall.query_selector_all(".picture") if picture.is_visible()]
    assert len(visible) == data["pictures"][0][group]
    assert {picture.get_attribute("data-group") for picture in visible} == {group}
    assert wall.query_selector("output").inner_text() == f"{len(visible)} pictures"
    assert not wall.query_selector(".more").is_visible()
    wall.query_selector("select").select_option("")
    wall.evaluate(
        "wall => { wall.dataset.first = 3; wall.querySelector('select').dispatchEvent(new Event('change')); }"
    )
    assert wall.query_selector("output").inner_text() == "3 of 4 pictures"
    wall.query_selector(".more").click()
    assert wall.query_selector("output").inner_text() == "4 pictures"


@pytest.mark.parametrize(("width", "most"), [(1280, 5_400), (390, 9_000)])
def test_the_page_begins_with_the_answer_and_is_short(
    browser: Any, reported: tuple[Path, dict[str, Any]], width: int, most: int
) -> None:
    html, data = reported
    shown = Shown(browser, html, width=width)
    assert shown.page.evaluate("document.documentElement.scrollHeight") < most
    top = " ".join(shown.page.inner_text("header").split())
    assert top.index(data["summary"]["asked"]) < top.index(data["summary"]["verdict"])
    for student in data["summary"]["students"]:
        assert all(f"{tile['value']} {tile['note']}".strip() in top for tile in student["tiles"])
    folds = shown.page.eval_on_selector_all("details.section", "all => all.map(details => details.open)")
    assert len(folds) > 8
    assert [index for index, is_open in enumerate(folds) if is_open] == [0, 1]
    assert all(says.is_visible() for says in shown.page.query_selector_all(".says"))
    shown.page.click("nav a[href='#made']")
    shown.page.wait_for_selector("#made details.section[open]")


def test_tables_that_scroll_say_so(browser: Any, reported: tuple[Path, dict[str, Any]]) -> None:
    shown = Shown(browser, reported[0], width=390)
    shown.text()
    shown.page.wait_for_function("document.querySelector('.wide:not([hidden])')")
    found = shown.page.evaluate(
        "[...document.querySelectorAll('.scroll')].map(place => [place.scrollWidth > place.clientWidth + 1, "
        "!place.previousElementSibling.hidden, place.tabIndex === 0])"
    )
    assert all(len(set(states)) == 1 for states in found), found
    assert {states[0] for states in found} == {True, False}


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (390, "dark")])
def test_axe_finds_nothing_serious(
    browser: Any, three_runs: list[Path], tmp_path: Path, width: int, scheme: str
) -> None:
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="no axe: pip install .[test]").Axe()
    html = write_report(compare(three_runs[:1]), tmp_path / "report.html")[0]
    shown = Shown(browser, html, width=width, scheme=scheme)
    shown.text()
    found = axe.run(shown.page, {"exclude": ["svg > g"]}).response["violations"]  # thousands of marks
    assert [(each["id"], each["nodes"][0]["html"]) for each in found if each["impact"] in ("serious", "critical")] == []


# What the page shows of a figure in report.json; figures of other names are counts, or points of a plot.
FORMS: dict[str, str] = {
    **dict.fromkeys(("top1", "topk", "agreement", "agreement_where_right", "agreement_where_wrong"), ".2f"),
    **dict.fromkeys(("clean", "mean", "deviation", "ece", "ece_fitted", "latency_ms", "megabytes"), ".2f"),
    **dict.fromkeys(("nll", "nll_fitted", "kl", "gflops"), ".4f"),
    **dict.fromkeys(("parameters", "same_mistakes", "other_mistakes", "corrected", "spoiled", "both", "neither"), ",d"),
    **dict.fromkeys(("only_first_right", "only_second_right", "student_only", "control_only", "test_images"), ",d"),
    "images_per_second": ",.1f",
    "temperature": ".3f",
    "points": "+.2f",
}


def _shown_figures(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """(name, text) of every figure in report.json that a reader must find on the page."""
    if isinstance(value, dict):
        for name, item in value.items():
            if name not in ("curves", "bins"):
                yield from _shown_figures(item, name)
    elif key == "accuracy" or (isinstance(value, list) and key not in ("top1_interval", "words", "top1")):
        for item in value if isinstance(value, list) else [value]:
            yield from _shown_figures(item)
    elif key == "top1_interval":
        yield key, "{:.2f} to {:.2f}".format(*value)
    elif key in ("words", "answer"):
        yield key, value
    elif key in FORMS and isinstance(value, int | float):
        yield key, format(value, FORMS[key])


def test_the_visible_text_holds_the_figures_of_the_json(browser: Any, reported: tuple[Path, dict[str, Any]]) -> None:
    html, data = reported
    text = Shown(browser, html).text()
    figures = list(_shown_figures(data))
    assert {key for key, _ in figures} >= set(FORMS) | {"top1_interval", "words", "answer"}
    assert [(key, figure) for key, figure in figures if figure not in text] == []
    for model in data["classes"]:
        assert [value for value in model["accuracy"].values() if value is not None and f"{value:.2f}" not in text] == []
    markdown = html.with_suffix(".md").read_text().replace("\\", "")
    assert [(key, figure) for key, figure in figures if figure.replace("<", "&lt;") not in markdown] == []


@pytest.mark.parametrize(
    "parts",
    [
        {"outputs": ("student.fused",)},
        {"outputs": ("student.fused", "teacher"), "analysis": True},
        {"outputs": ("student.fused", "student.cls", "student.dist"), "control": True},
        {"control": True},
    ],
)
def test_a_shorter_report_is_whole(browser: Any, make_run: MakeRun, tmp_path: Path, parts: dict[str, Any]) -> None:
    html = write_report(compare([make_run(**parts)]), tmp_path / "report.html")[0]
    shown = Shown(browser, html, width=390)
    assert shown.complaints == shown.asked == []
    assert shown.too_wide() == 0
    for section in shown.page.query_selector_all("main > section"):
        assert section.query_selector("table, figure.plot, .wall, .attention, details"), section.inner_text()
        assert section.query_selector(".says, #table-models")
    assert all(body.query_selector("tr") for body in shown.page.query_selector_all("tbody"))
    assert all(plot.query_selector("[data-tip]") for plot in shown.page.query_selector_all("figure.plot"))
