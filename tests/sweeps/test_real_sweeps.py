"""Sweeps of real runs: the toy recipe, with a teacher that is trained first, as processes side by side."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from distill.files.metrics import read_lines
from distill.run import read_status
from tests import warm
from tests.conftest import Toy
from tests.sweeps.forked import trials_are_forks

RATES = (3.0e-3, 1.0e-6)
STUDENT = {"model": "vit_nano", "patch_size": 4}
TRAIN = {"epochs": 1, "batch_size": 32, "precision": "fp32", "ema": None}


@pytest.fixture(scope="module")
def swept(toy: Toy, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A sweep of two learning rates and two seeds, and its output."""
    folder = tmp_path_factory.mktemp("swept")
    recipe = toy.mapping(train=TRAIN, student=STUDENT)
    teacher = {key: recipe[key] for key in ("data", "train", "report")} | {"student": {"model": "cifar_resnet20"}}
    recipe |= {"teacher": {"recipe": "teacher.yaml", "min_accuracy": 0.0}, "distill": [{"method": "hard"}]}
    sweep = {"base": "recipe.yaml", "keys": {"optim.lr": list(RATES), "seed": [0, 1]}, "parallel": 2}
    for name, content in (("recipe", recipe), ("teacher", teacher), ("sweep", sweep)):
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(content))
    launched = warm.launch(["sweep", "sweep.yaml", "--out", "out"], cwd=folder, before=trials_are_forks)
    assert launched.wait(280) == [0], launched.output
    return folder, launched.output


def found(folder: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((folder / "out" / "sweep.json").read_text())
    return values


def test_the_test_images_are_read_for_the_chosen_one_and_its_control_alone(swept: tuple[Path, str]) -> None:
    folder, _ = swept
    record = found(folder)
    assert [trial["state"] for trial in record["trials"]] == ["complete"] * 4
    chosen = record["chosen"]["paths"]
    assert len(chosen) == 2
    for trial in record["trials"]:
        path = folder / "out" / trial["path"]
        lines = [line for line in read_lines(path / "metrics.jsonl") if line["event"] == "eval"]
        splits = [line["split"] for line in lines]
        tested = trial["path"] in chosen
        assert splits.count("test") == int(tested)
        assert read_status(path)["state"] == ("finished" if tested else "trained")
        assert [(path / name).exists() for name in ("export", "predictions.safetensors", "control")] == [tested] * 3
        best = max(line["student/top1"] for line in lines if line["split"] == "validation")
        assert trial["validation"] == best


def test_seeds_end_in_mean_deviation_and_paired_tests(swept: tuple[Path, str]) -> None:
    folder, output = swept
    record, report = found(folder), json.loads((folder / "out" / "report.json").read_text())
    (student, control) = report["seeds"]["groups"]
    values = [row["top1"] for row in report["rows"] if row["model"] == "student" and row["head"] == "fused"]
    assert sorted(record["chosen"]["test"]["values"]) == sorted(values) == sorted(student["top1"])
    assert record["chosen"]["test"]["mean"] == pytest.approx(student["mean"])
    assert record["chosen"]["test_of_controls"]["deviation"] == pytest.approx(control["deviation"])
    assert len(report["seeds"]["tests"]) == 1
    assert "4 trials of recipe (grid): 4 complete." in output


def test_the_report_shows_what_was_tried(swept: tuple[Path, str]) -> None:
    folder, _ = swept
    html = (folder / "out" / "report.html").read_text()
    assert 'id="plot-sweep-coordinates"' in html
    assert 'id="table-sweep-trials"' in html
    report = json.loads((folder / "out" / "report.json").read_text())
    assert report["sweep"]["ranking"] == found(folder)["ranking"]
    assert report["sweep"]["validation_images"] == 32


def test_the_teacher_is_trained_once_while_the_others_wait(swept: tuple[Path, str]) -> None:
    folder, _ = swept
    (teacher,) = (folder / "runs").glob("*/*")
    assert read_status(teacher)["state"] == "finished"
    starts = [line for line in read_lines(teacher / "metrics.jsonl") if line["event"] in ("start", "resume")]
    assert [line["event"] for line in starts] == ["start"]
    weights = [read_status(path)["teacher_weights"] for path in (folder / "out" / "trials").iterdir()]
    assert len(weights) == 4
    assert weights == weights[:1] * 4


def test_a_finished_sweep_runs_nothing_again(swept: tuple[Path, str]) -> None:
    folder, _ = swept
    before = {path: path.stat().st_mtime_ns for path in folder.glob("out/trials/*/metrics.jsonl")}
    launched = warm.launch(["sweep", "sweep.yaml", "--out", "out"], cwd=folder, before=trials_are_forks)
    assert launched.wait() == [0]
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert "begins" not in launched.output


@pytest.mark.soak
def test_pilots_of_teachers_are_ranked_with_their_own_accuracy(toy: Toy, tmp_path: Path) -> None:
    recipe = toy.mapping(train=TRAIN | {"epochs": 2000}, student=STUDENT) | {"distill": [{"method": "hard"}]}
    (tmp_path / "work").mkdir()
    path = tmp_path / "work" / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    words = ["sweep", path, "--teachers", "cifar_resnet20,local-dir:net", "--minutes", "0.1", "--out", "out"]
    launched = warm.launch([*words, "train.checkpoint_every=10000"], cwd=path.parent)
    assert launched.wait(200) == [2]  # no such folder
    assert "net" in launched.output
    other = {"data": recipe["data"], "student": {"model": "cifar_resnet20"}, "train": TRAIN, "report": recipe["report"]}
    (path.parent / "other.yaml").write_text(yaml.safe_dump(other))
    words[3] = "cifar_resnet20,other.yaml"
    launched = warm.launch(words, cwd=path.parent, before=trials_are_forks)
    assert launched.wait(200) == [0], launched.output
    record = found(path.parent)
    assert [trial["note"] for trial in record["trials"]] == ["after 0.1 minutes"] * 2
    assert all(isinstance(trial["teacher"], float) for trial in record["trials"])
    assert all(rank["interval"][0] < rank["mean"] < rank["interval"][1] for rank in record["ranking"])
    assert "A teacher's own accuracy does not tell how much a student learns from it" in launched.output
    assert not list((path.parent / "out").glob("trials/*/export"))
