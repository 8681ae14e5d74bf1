"""results/README.md out of runs whose numbers are counted by hand."""

from __future__ import annotations

import json
import statistics
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from distill.errors import InputError
from distill.files.checksum import CHECKSUM
from distill.files.tensors import write_tensors
from distill.report.runs import read_run
from results import build, speed
from results.arms import PLAN, Goal, load_arm
from results.cells import difference, read_cells
from results.collect import collect
from tests.formulas import p_of_flipped_signs
from tests.results.conftest import SAMPLES, MakeCell


def rows(text: str) -> dict[str, list[str]]:
    """The tables' lines by their first cell, the first one of each; cells without their marks."""
    lines = [line for line in reversed(text.splitlines()) if line.startswith("| `")]
    return {line.split(" | ")[0].strip("|` "): [cell.strip("|` ") for cell in line.split(" | ")] for line in lines}


def section(text: str, title: str) -> str:
    return text.split(f". {title}\n")[1].split("\n## ")[0]


def right(run: Path, output: str = "student.fused") -> list[bool]:
    predictions = read_run(run).predictions
    pairs = zip(predictions.logits[output], predictions.labels, strict=True)
    return [max(range(10), key=logits.__getitem__) == label for logits, label in pairs]


def test_means_differences_and_tests_are_those_counted_by_hand(tmp_path: Path, make_cell: MakeCell) -> None:
    ours = [make_cell("nano-hard-guide", seed, 2.0) for seed in (0, 1, 2)]
    theirs = [make_cell("nano-control", seed, 1.0) for seed in (0, 1)]
    collect([tmp_path / "there"], tmp_path / "kept")
    texts = build.build(read_cells(tmp_path / "kept"))
    found = rows(section(texts["README.md"], "Does distillation help?"))
    top1 = [100 * sum(right(run)) / SAMPLES for run in ours]
    _, says, seeds, measured, validation, against, points, interval, p, adjusted, *others = found["nano-hard-guide"]
    over_seeds, common, minutes = others
    assert (seeds, against) == ("3 of 3", "nano-control")
    assert measured == f"{statistics.mean(top1):.2f} ± {statistics.stdev(top1):.2f}"
    assert validation == "44.00"  # 40 + 3 after the fourth epoch, and 1 for the moving average
    assert minutes == f"{40 / 60:.1f}"
    apart = [0] * SAMPLES
    for run, control in zip(ours, theirs, strict=False):
        apart = [sum_ + a - b for sum_, a, b in zip(apart, right(run), right(control), strict=True)]
    assert points == f"{100 * sum(apart) / (2 * SAMPLES):+.2f}"
    exact = p_of_flipped_signs(apart)
    assert p == ("< 0.001" if exact < 0.001 else f"{exact:.3g}")
    assert adjusted == p, "the only test of its table"
    low, high = (float(bound) for bound in interval.split(" to "))
    assert low < float(points) < high
    paired = stats.ttest_rel(top1[:2], [100 * sum(right(run)) / SAMPLES for run in theirs[:2]]).pvalue
    assert over_seeds == ("< 0.001" if paired < 0.001 else f"{paired:.3g}")
    assert common == "weights and batches"
    assert says.startswith("hard labels and guidance")
    assert found["nano-control"][2] == "2 of 3"
    assert found["nano-hard"][3:5] == found["nano-hard"][6:8] == ["not run", "not run"]
    assert "None of these has been run: `tiny-control`" in texts["README.md"]
    assert f"Teacher: local-dir:export, {100 * sum(right(ours[0], 'teacher')) / SAMPLES:.2f} %" in texts["README.md"]
    assert texts.keys() == {"README.md", *(f"plots/nano-{name}.svg" for name in ("methods", "attention", "both"))}


def test_one_seed_has_no_deviation_and_its_own_test(tmp_path: Path, make_cell: MakeCell) -> None:
    one, other = make_cell("nano-plain", 1, 2.0, weights="other"), make_cell("nano-area-4", 1, 1.5, batch="other")
    collect([tmp_path / "there"], tmp_path / "kept")
    cells = read_cells(tmp_path / "kept")
    found = difference(cells.rights("nano-area-4"), cells.rights("nano-plain"))
    assert found is not None
    a, b = right(other), right(one)
    only = sum(x and not y for x, y in zip(a, b, strict=True)), sum(y and not x for x, y in zip(a, b, strict=True))
    assert found.seeds == 1
    assert found.points == pytest.approx(100 * (only[0] - only[1]) / SAMPLES)
    assert found.p == pytest.approx(stats.binomtest(only[0], sum(only)).pvalue)
    row = rows(section(build.build(cells)["README.md"], "Does area attention help?"))["nano-area-4"]
    assert row[3] == f"{100 * sum(a) / SAMPLES:.2f}"
    assert row[9] == row[8], "the only test of its table"
    assert row[10:12] == ["", "neither"]


def test_a_block_with_costs_has_what_was_measured_of_them(tmp_path: Path, make_cell: MakeCell) -> None:
    runs = [make_cell(name, 0, strength) for name, strength in (("students-plain", 1.0), ("students-focal", 2.0))]
    collect([tmp_path / "there"], tmp_path / "kept")
    text = section(build.build(read_cells(tmp_path / "kept"))["README.md"], "Which attention, which student?")
    plain, focal = (rows(text)[name] for name in ("students-plain", "students-focal"))
    epochs = load_arm("students-focal", 0).train.epochs
    costs = json.loads((build.SPEED / "students.json").read_text())["arms"]["students-focal"]
    assert focal[2:6] == ["1.28 M", f"{costs['gflops']:.3f}", f"{costs['images_per_second']:.0f}", f"{epochs:g}"]
    assert float(focal[6]) == pytest.approx(epochs * 45_000 / costs["images_per_second"] / 60, abs=0.5)
    for row, run in zip((plain, focal), runs, strict=True):
        predictions = read_run(run).predictions
        ours, theirs = (predictions.logits[name].argmax(1) for name in ("student.fused", "teacher"))
        assert row[9] == f"{100 * float((ours == theirs).mean()):.2f}"
    assert focal[8] == f"{100 * sum(right(runs[1])) / SAMPLES:.2f}"
    assert focal[10:12] == ["students-plain", f"{100 * (sum(right(runs[1])) - sum(right(runs[0]))) / SAMPLES:+.2f}"]
    assert rows(text)["students-refiner"][8:10] == ["not run", "not run"]


def test_a_block_of_features_has_what_their_tests_measured(tmp_path: Path, make_cell: MakeCell) -> None:
    for seed, knn in ((0, 40.0), (1, 42.0)):
        status = make_cell("ssl-dino", seed) / "status.json"
        metrics = {"student/knn": knn, "student/linear": 50.5}
        status.write_text(json.dumps(json.loads(status.read_text()) | {"metrics": metrics}))
    guided_run = make_cell("ssl-dino-guide", 0, 2.0)
    costs = {"flops": 3e7, "bytes": 3_046_248, "images_per_second": 1234.5, "latency_seconds": 0.002, "batch": 64}
    pixels = {"images": SAMPLES, "correct": 102}
    analysis = {"format": "1", "data": "d" * 64, "device": "cpu", "costs": {"student": costs}, "pixels": pixels}
    (guided_run / "analysis.json").write_text(json.dumps(analysis))
    write_tensors(guided_run / "analysis.safetensors", {}, {"format": "1", "data": "d" * 64, CHECKSUM: ""})
    collect([tmp_path / "there"], tmp_path / "kept")
    text = section(build.build(read_cells(tmp_path / "kept"))["README.md"], "What do images without labels teach?")
    found = rows(text)["ssl-dino"]
    epochs = f"{load_arm('ssl-dino', 0).train.epochs:g}"
    assert found[2:8] == [epochs, "2 of 3", "41.00 ± 1.41", "50.50 ± 0.00", "", "none"]
    assert rows(text)["ssl-finetune"][4:9] == ["not run"] * 3 + ["ssl-supervised", "not run"]
    guided = rows(text)["ssl-dino-guide"]
    answers = [right(tmp_path / "there" / f"run-{arm}-0") for arm in ("ssl-dino-guide", "ssl-dino")]
    assert guided[7:9] == ["ssl-dino", f"{100 * (sum(answers[0]) - sum(answers[1])) / SAMPLES:+.2f}"]
    assert f"| raw pixels | of {SAMPLES} test images |  |  | {100 * 102 / SAMPLES:.2f} |" in text


def test_the_speed_of_arms_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    assert speed.main(["laptop", "--repetitions", "2"], to=tmp_path) == 0
    measured = json.loads((tmp_path / "laptop.json").read_text())
    assert measured["machine"]["threads"] == 1
    ours, growing = measured["arms"]["laptop"], measured["arms"]["laptop-growing"]
    assert ours["parameters"] == growing["parameters"] > 600_000
    assert growing["images_per_second"] > ours["images_per_second"] > 0  # the first steps of growing images are small


def test_a_difference_turned_round_is_the_same_one(tmp_path: Path, make_cell: MakeCell) -> None:
    for seed in (0, 1):
        make_cell("nano-hard", seed, 2.0)
        make_cell("nano-plain", seed, 1.0)
    collect([tmp_path / "there"], tmp_path / "kept")
    cells = read_cells(tmp_path / "kept")
    hard, plain = cells.rights("nano-hard"), cells.rights("nano-plain")
    one, other = difference(hard, plain), difference(plain, hard)
    assert one is not None
    assert other is not None
    assert (one.points, one.p, one.seeds) == (-other.points, other.p, 2)
    assert one.points > 0


def test_goals(tmp_path: Path, make_cell: MakeCell) -> None:
    for seed in (0, 1):
        make_cell("nano-hard-guide", seed, 3.0)
        make_cell("nano-control", seed, 0.5)
    collect([tmp_path / "there"], tmp_path / "kept")
    cells = read_cells(tmp_path / "kept")
    name, control = "nano-hard-guide", "nano-control"
    mean = float(np.mean(cells.top1(name)))

    def met(**wanted: float | str) -> str:
        return build._measured(cells, Goal(says="", arm=name, **wanted))[1]  # type: ignore[arg-type]

    assert met(top1=mean) == met(top1=mean, minutes=1) == met(against=control, points=1.0, p=0.01) == "yes"
    assert met(top1=mean + 0.01) == met(top1=mean, minutes=0.5) == met(against=control, points=90.0) == "no"
    assert met(against="nano-plain") == "not run"
    teacher = difference(cells.rights(name), cells.rights_of_teacher(name))
    assert teacher is not None
    runs = [tmp_path / "there" / f"run-{name}-{seed}" for seed in (0, 1)]
    by_hand = [sum(right(run)) - sum(right(run, "teacher")) for run in runs]
    assert teacher.points == pytest.approx(100 * sum(by_hand) / (2 * SAMPLES))
    assert met(against="teacher") == ("yes" if teacher.points > 0 else "no")
    assert build._measured(cells, Goal(says="", arm="laptop", top1=80.0)) == ("not run", "not run")


def test_building_twice_gives_the_same_bytes_and_old_plots_go(tmp_path: Path, make_cell: MakeCell) -> None:
    for seed in (0, 1):
        make_cell("nano-hard", seed)
    collect([tmp_path / "there"], tmp_path / "kept")
    written = []
    for name in ("one", "two"):
        (tmp_path / name / "plots").mkdir(parents=True)
        (tmp_path / name / "plots" / "old.svg").touch()
        assert build.main(runs=tmp_path / "kept", to=tmp_path / name) == 0
        files = [path for path in sorted((tmp_path / name).rglob("*")) if path.is_file()]
        written.append({path.relative_to(tmp_path / name): path.read_bytes() for path in files})
    assert written[0] == written[1]
    assert {str(path) for path in written[0]} == {"README.md", "plots/nano-methods.svg"}


def test_nothing_run_says_so_and_leaves_no_cell_empty(tmp_path: Path) -> None:
    (tmp_path / "kept").mkdir()
    texts = build.build(read_cells(tmp_path / "kept"))
    assert texts.keys() == {"README.md"}
    blocks = [block for question in PLAN.questions for block in question.blocks]
    assert texts["README.md"].count("None of these has been run: ") == len(blocks)
    goals = [line for line in texts["README.md"].splitlines() if line.endswith("| not run | not run |")]
    assert len(goals) == sum(len(block.goals) for block in blocks)


def test_a_run_that_is_not_what_its_name_says_is_refused(tmp_path: Path, make_cell: MakeCell) -> None:
    make_cell("nano-hard", 0)
    collect([tmp_path / "there"], tmp_path / "kept")
    (tmp_path / "kept" / "nano-hard-0").rename(tmp_path / "kept" / "nano-hard-1")
    with pytest.raises(InputError, match="nano-hard-1: its recipe is not"):
        read_cells(tmp_path / "kept")
    (tmp_path / "kept" / "nano-hard-1").rename(tmp_path / "kept" / "nano-gone-0")
    with pytest.raises(InputError, match=r"no cells .*: nano-gone-0"):
        read_cells(tmp_path / "kept")


def test_what_is_committed_is_what_the_runs_give() -> None:
    assert build.build(read_cells(build.HERE / "runs"))["README.md"] == (build.HERE / "README.md").read_text("utf-8")
