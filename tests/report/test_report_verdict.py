"""The rules of the verdict, and the figures that it and the tiles are made of."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest

from distill.report.comparison import compare
from distill.report.standing import Difference, Shown, Standing, standings
from distill.report.statistics import bootstrap_over_seeds, mcnemar
from distill.report.summary import summarise, tiles
from distill.report.verdict import CONCLUSIONS, Cost, cost, sentence, times, verdict
from tests.report.conftest import MakeRun

DOCS = Path(__file__).resolve().parents[2] / "docs"
STUDENT = Standing(
    name="nano",
    seeds=1,
    role="student",
    network="vit_nano",
    teacher="cifar_resnet20",
    by_neighbours=False,
    top1=71.39,
    interval=(70.5, 72.27),
    against_teacher=None,
    against_control=None,
    parameters=684_404,
    megabytes=2.75,
    latency_ms=4.23,
    machine="AMD EPYC",
    ratios={},
)
POINTS = {"better": 1.5, "worse": -20.34, "equal": 0.2, "open": -0.6}
RATIOS: dict[str, dict[str, float]] = {
    "less": {"parameters": 0.5, "latency_ms": 1.05},
    "same": {"parameters": 1.05, "latency_ms": 0.95},
    "more": {"parameters": 2.5, "latency_ms": 3.2},
    "mixed": {"parameters": 0.32, "latency_ms": 14.2},
    "unknown": {"gflops": 2.0},
}


def difference(shown: Shown) -> Difference:
    points = POINTS[shown]
    return Difference(points, points - 1, points + 1, 0.01, shown, 91.73)


@pytest.mark.parametrize(
    ("shown", "costs", "expected"),
    [
        ("worse", "more", "costs 2.5x the parameters and 3.2x the time of its teacher cifar_resnet20 for -20.34 "
         "points: not worth it."),
        ("worse", "less", "costs 0.5x the parameters and 1.05x the time of its teacher cifar_resnet20 for -20.34 "
         "points: worth it only where size counts more than 20.34 points."),
        ("worse", "mixed", "costs 0.32x the parameters and 14x the time of its teacher cifar_resnet20 for -20.34 "
         "points: worth it only where size counts more than 20.34 points and time."),
        ("better", "more", "for +1.50 points: worth it where accuracy counts more than size and time."),
        ("better", "same", "for +1.50 points: worth it."),
        ("equal", "less", "for an accuracy equal within 1 point (+0.20): worth it."),
        ("equal", "more", "for an accuracy equal within 1 point (+0.20): not worth it."),
        ("open", "less", "for an accuracy with no difference shown (-0.60 points): promising, and a larger test set "
         "would have to show it."),
        ("open", "unknown", "The student of nano has an accuracy with no difference shown (-0.60 points) beside its "
         "teacher cifar_resnet20: undecided."),
    ],
)  # fmt: skip
def test_the_sentence_weighs_accuracy_against_costs(shown: Shown, costs: str, expected: str) -> None:
    told = sentence(replace(STUDENT, against_teacher=difference(shown), ratios=RATIOS[costs]))
    assert told.startswith("The student of nano ")
    assert told.endswith(expected)


def test_there_is_a_rule_for_every_case_and_the_docs_have_it() -> None:
    assert CONCLUSIONS.keys() == {(shown, costs) for shown in get_args(Shown) for costs in get_args(Cost)}
    assert {name: cost(ratios) for name, ratios in RATIOS.items()} == {name: name for name in RATIOS}
    assert cost({"parameters": 1.1, "latency_ms": 1 / 1.1}) == "same"
    text = next(DOCS.rglob("report.md")).read_text(encoding="utf-8")
    lines = {
        row[0]: row[1:] for row in re.findall(r"^\| (\w+) \| (.+?) \| (.+?) \| (.+?) \| (.+?) \| (.+?) \|$", text, re.M)
    }
    for shown in get_args(Shown):
        for written, costs in zip(lines[shown], ("less", "same", "mixed", "more", "unknown"), strict=True):
            rule = CONCLUSIONS[shown, costs].partition(" {")[0]
            assert written.startswith(rule.removesuffix(" where")) or written == "the same"
    assert [times(ratio) for ratio in (0.024, 0.5, 1.0, 2.54, 14.2)] == ["0.024x", "0.5x", "1.00x", "2.5x", "14x"]


@pytest.mark.parametrize(
    ("shown", "beside", "alone"),
    [
        ("better", "; distillation itself gained 1.50 points", "distillation gained 1.50 points over training without "
         "a teacher: worth it."),
        ("worse", "; distillation itself lost 20.34 points", "distillation is not worth it."),
        ("equal", "equal within 1 point (+0.20 points).", "distillation is not worth it."),
        ("open", "; no gain over training without a teacher is shown (-0.60 points).", "distillation is not worth it."),
    ],
)  # fmt: skip
def test_the_control_tells_what_the_teacher_gave(shown: Shown, beside: str, alone: str) -> None:
    student = replace(STUDENT, against_control=difference(shown))
    assert sentence(student).startswith("The student of nano: ")
    assert sentence(student).endswith(alone)
    assert beside in sentence(replace(student, against_teacher=difference("worse"), ratios=RATIOS["more"]))


def test_without_either_there_is_nothing_to_judge_by() -> None:
    assert sentence(STUDENT).endswith("without a teacher's answers or a control there is nothing to judge that by.")
    assert sentence(replace(STUDENT, role="control")) == (
        "The control of nano: it gives 71.39 % of the test images the right class."
    )
    assert "by neighbours" in sentence(replace(STUDENT, by_neighbours=True))
    assert verdict([replace(STUDENT, name="a", seeds=3), STUDENT]).startswith(
        "Most accurate of 2: the student of a (3 seeds): it gives"
    )


def test_the_tiles_say_what_is_not_known() -> None:
    bare = replace(STUDENT, parameters=None, megabytes=None, latency_ms=None, machine=None)
    assert [tile.value for tile in tiles(bare)] == ["71.39 %", "not known", "not known", "not measured"]
    full = replace(
        STUDENT, against_teacher=difference("worse"), against_control=difference("better"), ratios=RATIOS["more"]
    )
    assert [(tile.name, tile.value, tile.note) for tile in tiles(full)] == [
        ("accuracy", "71.39 %", "95 % interval 70.50 to 72.27; teacher 91.73 %"),
        ("gain over control", "+1.50 points", "a gain; 95 % interval +0.50 to +2.50, p = 0.01; control 91.73 %"),
        ("size", "2.75 MB", "684,404 parameters, 2.5x its teacher's"),
        ("latency", "4.23 ms", "one image on AMD EPYC, 3.2x its teacher's"),
    ]


def test_figures_are_those_of_the_rows(three_runs: list[Path]) -> None:
    comparison = compare(three_runs)
    seeds, other = sorted(standings(comparison), key=lambda student: -student.seeds)
    assert (seeds.called, seeds.seeds, other.seeds) == ("one (2 seeds)", 2, 1)
    rows = [comparison.row(name, "student") for name in ("one", "two")]
    controls = [comparison.row(name, "control") for name in ("one", "two")]
    assert seeds.top1 == pytest.approx(np.mean([row.metrics.top1 for row in rows if row]))
    rights = [[row.logits.argmax(1) == comparison.labels for row in of if row] for of in (rows, controls)]
    assert seeds.against_control is not None
    assert (seeds.against_control.low, seeds.against_control.high) == bootstrap_over_seeds(
        list(zip(*rights, strict=True))
    )
    assert seeds.against_control.points == pytest.approx(100 * (np.mean(rights[0]) - np.mean(rights[1])))
    student, teacher = comparison.row(other.name, "student"), comparison.teacher_of(other.name)
    assert student is not None
    assert teacher is not None
    test = mcnemar("", "", *(row.logits.argmax(1) == comparison.labels for row in (student, teacher)))
    assert other.against_teacher is not None
    assert (other.against_teacher.points, other.against_teacher.p) == (test.points, test.p)
    assert other.against_control is None
    assert other.ratios["parameters"] == 684_404 / 853_018


def test_the_top_says_what_was_asked_of_what(make_run: MakeRun) -> None:
    recipe: dict[str, Any] = {
        "name": "shoes-nano",
        "data": {"name": "folder", "root": "photos/shoes"},
        "teacher": {"model": "cifar_resnet20"},
        "student": {"model": "vit_nano"},
        "distill": [{"method": "hard"}, {"method": "guide"}],
        "train": {"epochs": 6},
    }
    status = {"data_sizes": {"train": 900, "validation": 100, "test": 40}}
    environment = {"device": "cpu", "device_name": "AMD EPYC", "threads": 2, "processes": 1}
    run = make_run(recipe=recipe, status=status, environment=environment, analysis=True)
    found = summarise(compare([run]))
    assert found.title == "shoes-nano"
    assert found.asked == (
        "Can the student take the place of its teacher cifar_resnet20, and did the teacher help it? "
        "run: vit_nano by hard and guide in 6 epochs."
    )
    assert found.facts == {
        "date": "trained 1970-01-01",
        "data": "shoes, 900 training images, 100 validation images, 40 test images, 10 classes",
        "machine": "AMD EPYC, 2 threads",
    }
