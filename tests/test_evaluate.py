"""`distill evaluate` on other data than the run's: the figures, the report, and what stays as it was."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from sklearn.metrics import balanced_accuracy_score

import distill
from distill.cli import main
from tests.conftest import Toy

CLASSES = ("b", "d")
"""Of the toy's four."""


@pytest.fixture(scope="module")
def trained(toy: Toy, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with a report."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("distill.exports.folder._compare_with_reloaded", lambda *args: None)
        path = tmp_path_factory.mktemp("evaluated") / "run"
        distill.train(toy.recipe, out=path, overrides=["train.max_steps=2", "control=false"])
    return path


@pytest.fixture
def run(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it, in the working directory."""
    monkeypatch.chdir(tmp_path)
    return shutil.copytree(trained, tmp_path / "run")


def write_images(folder: Path, labels: Sequence[str] = CLASSES, split: str = "") -> list[tuple[Path, str]]:
    """Five of each class, of the toy's kind; each with its class."""
    chance, files = np.random.default_rng(3), []
    for label in labels:
        (folder / split / label).mkdir(parents=True)
        for number in range(5):
            brightness = 60 * "abcd".find(label)
            pixels = (chance.integers(0, 64, (8, 8, 3)) + brightness).clip(0, 255).astype(np.uint8)
            files.append((folder / split / label / f"{number}.png", label))
            Image.fromarray(pixels).save(files[-1][0])
    return files


def content(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != ".lock"}


def by_hand(export: Path, files: list[tuple[Path, str]]) -> tuple[list[str], list[str]]:
    """Right classes and answers, by what `distill.predict` says of each file."""
    answers = distill.predict(export, [path for path, _ in files], top=1)
    return [label for _, label in files], [answer[0][0] for answer in answers]


@pytest.mark.parametrize(("of", "split"), [("run", ""), ("export", "test")])
def test_a_folder_of_some_of_the_classes(
    of: str, split: str, run: Path, toy: Toy, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = write_images(tmp_path / "photos", split=split)
    if split:  # not read
        (tmp_path / "photos" / "train" / "other").mkdir(parents=True)
    before = content(run)
    target = run if of == "run" else run / "export"
    assert main(["evaluate", str(target), "photos"]) == 0
    printed = capsys.readouterr().out
    assert content(run) == before
    right, answers = by_hand(run / "export", files)
    correct = sum(one == other for one, other in zip(right, answers, strict=True))
    (folder,) = (tmp_path / "evaluations").iterdir()
    assert folder.name.startswith("run-on-photos-")
    assert f"report   {folder.relative_to(tmp_path) / 'report.html'}" in printed
    assert f"{correct} of 10" in printed
    macro = f"{100 * balanced_accuracy_score(right, answers):.2f}"
    (line,) = [line for line in printed.splitlines() if "student.fused" in line and " of 10" in line]
    assert macro in line
    assert ("teacher" in printed) == (of == "run")
    figures = json.loads((folder / "report.json").read_text())
    (row,) = [row for row in figures["rows"] if row["model"] == "student" and row["head"] == "fused"]
    assert (row["top1_correct"], row["samples"]) == (correct, 10)
    (classes,) = [model for model in figures["classes"] if model["model"] == "student"]
    for label in "abcd":
        found = [one == other for one, other in zip(right, answers, strict=True) if one == label]
        assert classes["accuracy"][label] == (100 * np.mean(found) if found else None)
    # It is compared like a run, and is none in the list of runs.
    assert distill.compare([folder], tmp_path / "again.html").comparison.samples == 10
    assert main(["runs", "evaluations"]) == 2


def test_an_export_on_data_that_overrides_name(run: Path, toy: Toy) -> None:
    expected = distill.Run(run).predictions()
    found = distill.evaluate(
        run / "export", overrides=["data.name=toy.safetensors", f"data.root={toy.root}"], out="there"
    )
    for name in ("student.fused", "student.cls", "student.dist"):
        torch.testing.assert_close(torch.from_numpy(found.logits[name]), expected[name], rtol=0, atol=1e-5)
    assert found.labels.tolist() == expected["labels"].tolist()
    assert found.report == Path("there/report.html")
    assert found["student.fused"].macro == pytest.approx(
        100 * balanced_accuracy_score(expected["labels"], expected["student.fused"].argmax(1))
    )


def test_tensors_of_which_only_the_test_is_given(run: Path) -> None:
    images = torch.full((6, 3, 8, 8), 100, dtype=torch.uint8)
    images[::2] += torch.randint(0, 60, images[::2].shape, dtype=torch.uint8)
    data = {"test": (images, torch.arange(6) % 2), "classes": ["d", "a"]}
    found = distill.evaluate(run, data=data, out="there")
    assert found.images == {"a": 3, "b": 0, "c": 0, "d": 3}
    assert found.by_class("student.fused")["b"] is None
    assert found.labels.tolist() == [3, 0, 3, 0, 3, 0]
    data["classes"] = ["d", "a", "b"]  # of which the last one has no image
    assert distill.evaluate(run, data=data).images == {"a": 3, "b": 0, "c": 0, "d": 3}


def test_the_report_of_a_run_follows_its_figures(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Evaluated again with another teacher, of the same data; the analysis has tests of its own."""
    monkeypatch.setattr("distill.evaluate_command.analyse", lambda *args: None)
    torch.manual_seed(5)
    other = timm.create_model("cifar_resnet20", num_classes=4)
    torch.save(other.state_dict(), tmp_path / "other.pth")
    found = distill.evaluate(run, overrides=[f"teacher.weights={tmp_path / 'other.pth'}"])
    assert found.report == run / "report.html"
    rows = json.loads((run / "report.json").read_text())["rows"]
    assert {row["model"] for row in rows} == {"teacher", "student"}
    for row in rows:
        name = "teacher" if row["model"] == "teacher" else f"student.{row['head']}"
        assert row["top1_correct"] == found[name].top1_correct
        assert row["nll"] == found[name].nll
    before = content(run)
    assert distill.evaluate(run, out="there").report == Path("there/report.html")
    assert content(run) == before, "with a folder of its own, nothing of the run changes"


def test_without_the_teacher_where_it_cannot_be_had(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_images(tmp_path / "photos")
    found = distill.evaluate(run, data="photos", overrides=["teacher.weights=gone.pth"])
    assert "teacher" not in found
    assert "Without the teacher: " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["run", "unknown"],
            "unknown: 1 of its 2 classes are none of run's: dd (did you mean 'd'?). It knows a, b,",
        ),
        (["run/export"], "run/export: an export has no data of its own. Give a folder of images"),
        (["run", "nowhere"], "nowhere: no such folder; images to evaluate on are DIR/<class>/*.png"),
        (["run", "photos", "--out", "photos"], "--out photos: exists already"),
        (["photos"], "photos: neither a run (it has no resolved.yaml) nor an export"),
        (["runs/none"], "runs/none: no run, export or recipe there; as a teacher, nothing is called 'runs/none'"),
        (["run", "broken"], "broken/b/0.png: "),
        (["cifar_resnet20", "photos"], "cifar_resnet20: no student of a run or an export"),
        (["run", "data.name=folder", "data.root=photos", "data.test=0.4", "photos"], "was trained on images of this"),
    ],
)
def test_what_cannot_be_evaluated_is_one_message(
    arguments: list[str], message: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_images(tmp_path / "photos")
    write_images(tmp_path / "unknown", ("a", "dd"))
    write_images(tmp_path / "broken")
    (tmp_path / "broken" / "b" / "0.png").write_bytes(b"no image")
    before = content(run)
    assert main(["evaluate", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("error: ") == error.count("\n") == 1
    assert content(run) == before
    assert not (tmp_path / "evaluations").exists()


def test_a_run_that_changed_data_keeps_its_figures(
    run: Path, toy: Toy, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from distill.data.packed import write_packed

    images = torch.randint(0, 256, (40, 3, 8, 8), dtype=torch.uint8)
    tensors: dict[str, Any] = {"train.images": images, "test.images": images, "train.labels": torch.arange(40) % 4}
    tensors["test.labels"] = tensors["train.labels"]
    write_packed(tmp_path / "toy.safetensors", name="toy", class_names=tuple("abcd"), tensors=tensors)
    before = content(run)
    assert main(["evaluate", "run", "data.root=."]) == 0
    printed = capsys.readouterr().out
    assert "Other data than those of run: its own figures and its report stay as they are." in printed
    assert " of 40" in printed
    assert content(run) == before
