"""What a whole run leaves behind: its files, the weights it chose, the teacher it trained first."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import one_hot

import distill
import distill.exports.folder
import distill.training.accumulator
from distill import checkpoint, finishing, run
from distill.errors import InputError, Interrupted
from distill.evaluation import Classification
from distill.recipe import Recipe, from_mapping, load
from distill.report.runs import read_run
from distill.trainer import Trainer
from tests.conftest import Toy
from tests.test_resume import go, train_lines

Mapping = dict[str, Any]
PLAIN = {"label_weight": 1.0, "distill": []}


@pytest.fixture(autouse=True)
def in_an_empty_folder_without_the_fresh_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Teachers' runs stand in the working directory; tests/test_export.py is where the fresh process is tested."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(distill.exports.folder, "_compare_with_reloaded", lambda *args: None)


def short(toy: Toy, **changes: Any) -> Recipe:
    """The toy recipe for three steps, or as `changes` has it."""
    train = {"max_steps": 3, "keep_checkpoints": 2} | changes.pop("train", {})
    return from_mapping(toy.mapping(train=train, **changes), default_name="toy")


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def exported(path: Path) -> str:
    return sha256(path / "export" / "model.safetensors")


def events(path: Path) -> list[str]:
    return [json.loads(line)["event"] for line in (path / "metrics.jsonl").read_text().splitlines()]


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


# The recipe that a run saves


@pytest.mark.soak
def test_the_resolved_recipe_reproduces_the_run(toy: Toy, tmp_path: Path) -> None:
    overrides = ["train.max_steps=3", "control=true", "seed=5", "label_weight=0.3"]
    distill.train(toy.recipe, out=tmp_path / "run", overrides=overrides)
    go(load(tmp_path / "run" / "resolved.yaml"), tmp_path / "again", None)
    go(load(tmp_path / "run" / "control" / "resolved.yaml"), tmp_path / "alone", None)
    for one, other in (("run", "again"), ("run/control", "again/control"), ("run/control", "alone")):
        assert (tmp_path / one / "resolved.yaml").read_text() == (tmp_path / other / "resolved.yaml").read_text()
        assert train_lines(tmp_path / one) == train_lines(tmp_path / other)
        assert same(*(load_file(tmp_path / name / "predictions.safetensors") for name in (one, other)))
        assert exported(tmp_path / one) == exported(tmp_path / other)
    assert exported(tmp_path / "run") != exported(tmp_path / "run" / "control")
    assert (tmp_path / "run" / "recipe.yaml").read_text() == toy.recipe.read_text()
    for line in train_lines(tmp_path / "alone"):  # without a teacher the labels have the weight of the whole loss
        assert {key for key in line if key.startswith("loss")} == {"loss", "loss/label"}
        assert line["loss"] == pytest.approx((0.3 + 0.25 + 0.25) * line["loss/label"], abs=1e-6)
    assert "teacher" not in load_file(tmp_path / "alone" / "predictions.safetensors")


# Its other files


@pytest.fixture
def finished(toy: Toy, tmp_path: Path) -> Path:
    """Two epochs (12 steps) under weights that are all different."""
    weights = {"label_weight": 0.3, "distill": [{"method": "hard", "weight": 0.2}, {"method": "soft", "weight": 0.9}]}
    go(short(toy, **weights, train={"max_steps": 8, "epochs": 2}), tmp_path / "run", None)
    return tmp_path / "run"


def test_metrics(finished: Path) -> None:
    assert events(finished)[:4] == ["start", "preflight", "epoch", "train"]
    assert set(events(finished)) == {"start", "preflight", "epoch", "train", "eval", "checkpoint"}
    for line in map(json.loads, (finished / "metrics.jsonl").read_text().splitlines()):
        assert {"event", "step", "epoch", "time"} <= line.keys()
    (preflight,) = run.read_metrics(finished, "preflight")
    assert (preflight["split"], preflight["samples"]) == ("validation", 32)
    training = list(run.read_metrics(finished, "train"))
    assert [line["step"] for line in training] == list(range(1, 9))
    for line in training:
        parts = 0.3 * line["loss/label"] + 0.2 * line["loss/hard"] + 0.9 * line["loss/soft"]
        assert line["loss"] == pytest.approx(parts, abs=1e-6)
        assert line["images_per_second"] > 0
        assert line["epoch"] == pytest.approx(line["step"] / 6, abs=1e-4)
    chosen = [line for line in run.read_metrics(finished, "eval") if line["split"] == "validation"]
    assert [(line["step"], line["weights"]) for line in chosen] == [(6, "raw"), (6, "ema"), (8, "raw"), (8, "ema")]
    assert all(line["student/top1"] * 32 % 100 == 0 for line in chosen)  # percent of 32 images
    assert all(line["teacher/top1"] == preflight["teacher/top1"] for line in chosen)


def test_predictions_are_those_of_the_export_and_accuracies_are_percent(finished: Path, toy: Toy) -> None:
    found = load_file(finished / "predictions.safetensors")
    assert found.keys() == {"labels", "student.cls", "student.dist", "student.fused", "teacher"}
    data = load_file(toy.root / "toy.safetensors")
    assert torch.equal(found["labels"], data["test.labels"])
    assert all(found[key].dtype == torch.float32 and found[key].shape == (50, 4) for key in found if key != "labels")
    model = timm.create_model(f"local-dir:{finished / 'export'}", pretrained=True).eval()
    mean, std = (torch.tensor(model.pretrained_cfg[key]).view(1, 3, 1, 1) for key in ("mean", "std"))
    images = data["train.images"].double().div(255)
    assert model.pretrained_cfg["label_names"] == ["a", "b", "c", "d"]
    assert (mean.flatten() - images.mean((0, 2, 3))).abs().max() < 0.02  # of the training part alone
    with torch.no_grad():
        logits = model((data["test.images"].float() / 255 - mean) / std)
    torch.testing.assert_close(found["student.fused"], logits, rtol=0, atol=1e-5)
    torch.testing.assert_close(found["student.fused"], (found["student.cls"] + found["student.dist"]) / 2)
    (line,) = [line for line in run.read_metrics(finished, "eval") if line["split"] == "test"]
    answers = {name: found[name].argmax(1) for name in found if name != "labels"}
    keys = {
        "student.fused": "student",
        "student.cls": "student.cls",
        "student.dist": "student.dist",
        "teacher": "teacher",
    }
    for name, key in keys.items():
        assert line[f"{key}/top1"] == 100 * int((answers[name] == found["labels"]).sum()) / 50
        assert line[f"{key}/top5"] == 100  # of 4 classes
    assert line["agreement"] == 100 * int((answers["student.fused"] == answers["teacher"]).sum()) / 50


def test_environment_and_status(finished: Path, toy: Toy) -> None:
    environment = json.loads((finished / "environment.json").read_text())
    assert environment.keys() == {
        "command", "python", "platform", "host", "versions", "commit", "processes", "precision", "device",
        "device_name", "threads", "cores",
    }  # fmt: skip
    assert environment["versions"]["timm"] == timm.__version__
    status = run.read_status(finished)
    assert (status["state"], status["reason"], status["step"]) == ("finished", None, 8)
    assert status["parameters"]["teacher"] == sum(value.numel() for name, value in torch.load(
        toy.teacher, weights_only=True).items() if "running" not in name and "num_batches" not in name)  # fmt: skip
    assert 0 <= status["metrics"]["student/top1"] <= 100


def test_the_time_by_what_it_went_to(toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that goes only in these functions; an interrupted launch counts too."""
    now = 0.0
    monkeypatch.setattr(distill.training.accumulator.time, "perf_counter", lambda: now)

    def takes(seconds: float, where: object, name: str) -> None:
        function = getattr(where, name)

        def slow(*args: Any, **options: Any) -> Any:
            nonlocal now
            now += seconds
            return function(*args, **options)

        monkeypatch.setattr(where, name, slow)

    takes(2.0, Trainer, "train_step")
    takes(10.0, Classification, "__call__")
    takes(50.0, finishing, "export_selected")
    monkeypatch.setattr(finishing, "analyse", lambda *args, **options: None)
    takes(100.0, finishing, "analyse")
    train, report = {"max_steps": 8, "epochs": 2, "log_every": 5}, {"analysis": "full"}
    recipe, out = short(toy, train=train, report=report), tmp_path / "run"
    with pytest.raises(Interrupted):
        go(recipe, out, 7)
    go(recipe, out, None, resume="auto")
    expected = {"training": 16.0, "compilation": 0.0, "evaluation": 40.0, "analysis": 100.0}
    assert run.read_status(out)["seconds"] == expected
    assert read_run(out).seconds == expected, "what a report reads"


# Which weights are exported


def decide(monkeypatch: pytest.MonkeyPatch, correct: Callable[[str, int], bool]) -> None:
    """Let the split that selects find raw or averaged weights all correct or all wrong."""
    evaluate, predict = Trainer.evaluate, Classification.predict
    trainers: list[Trainer] = []

    def remember(self: Trainer, tracking: Any) -> None:
        trainers.append(self)
        evaluate(self, tracking)

    def answer(self: Classification, student: Any, split: Any) -> dict[str, Tensor]:
        trainer = trainers[-1]
        candidates = {id(trainer.student): "raw", id(trainer.ema and trainer.ema.module): "ema"}
        if (weights := candidates.get(id(student))) is None:  # the export, at the end
            return predict(self, student, split)
        labels = self.dataset.labels(split)
        answers = labels if correct(weights, trainer.progress.step) else (labels + 1) % 4
        return {name: one_hot(answers, 4).float() for name in ("student.cls", "student.fused")}

    monkeypatch.setattr(Trainer, "evaluate", remember)
    monkeypatch.setattr(Classification, "predict", answer)


@pytest.mark.parametrize("better", ["raw", "ema"])
def test_the_better_of_raw_and_averaged_weights_is_exported(
    toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, better: str
) -> None:
    decide(monkeypatch, lambda weights, step: weights == better and step == 6)
    out = tmp_path / "run"
    go(short(toy, train={"max_steps": 13, "keep_checkpoints": 1}), out, None)
    assert run.read_status(out)["exported"] == {"step": 6, "weights": better}
    assert [path.name for path in checkpoint.existing(out / "checkpoints")] == ["step_00000006", "step_00000013"]
    best = out / "checkpoints" / "best"
    states = {name: checkpoint.read_tensors(best, name) for name in ("model", "ema")}
    chosen = {f"model.{key}": value for key, value in load_file(out / "export" / "model.safetensors").items()}
    assert same(chosen, states["ema" if better == "ema" else "model"])
    assert not same(states["ema"], states["model"])
    with safe_open(out / "predictions.safetensors", "pt") as file:
        metadata = file.metadata()
    assert (metadata["step"], metadata["weights"], metadata["validation_top1"]) == ("6", better, "100.00")


def test_without_validation_the_last_weights_are_exported(toy: Toy, tmp_path: Path) -> None:
    out = tmp_path / "run"
    go(short(toy, data={"validation": 0}, train={"max_steps": 9, "ema": None}), out, None)
    (preflight,) = run.read_metrics(out, "preflight")
    assert (preflight["split"], preflight["samples"]) == ("train", 128)
    assert [line["split"] for line in run.read_metrics(out, "eval")] == ["test"]
    assert run.read_status(out)["exported"] == {"step": 9, "weights": "raw"}
    assert not (out / "checkpoints" / "best").exists()
    last = checkpoint.read_tensors(out / "checkpoints" / "last", "model")
    assert same({f"model.{key}": value for key, value in load_file(out / "export/model.safetensors").items()}, last)


def test_selection_on_the_test_set_is_done_and_said(toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from distill.report.comparison import compare

    decide(monkeypatch, lambda weights, step: step == 8)
    out = tmp_path / "run"
    go(short(toy, data={"validation": 0, "select_on": "test"}, train={"max_steps": 9, "ema": None}), out, None)
    assert [(line["step"], line["split"]) for line in run.read_metrics(out, "eval")][:-1] == [(8, "test"), (9, "test")]
    assert run.read_status(out)["exported"] == {"step": 8, "weights": "raw"}
    assert "chosen on the test set" in compare([out]).warnings[0]


# A teacher that comes as a recipe


@pytest.fixture
def with_recipe(toy: Toy, tmp_path: Path) -> Recipe:
    """The toy recipe with a teacher that is to be trained for two steps first."""
    data = toy.mapping()["data"] | {"augment": {}, "validation": 0.5}
    teacher = {"data": data | {"root": "elsewhere"}, "student": {"model": "cifar_resnet20"}, **PLAIN}
    teacher["train"] = {"epochs": 1, "batch_size": 16, "max_steps": 2, "log_every": 1}
    (tmp_path / "cnn.yaml").write_text(yaml.safe_dump(teacher))
    taught = {"recipe": "cnn.yaml", "model": None, "weights": None}
    return short(toy, teacher=taught, train={"max_steps": 1}, report={"analysis": "full"})


def teachers_runs() -> list[Path]:
    return sorted(Path("runs/teachers").glob("cnn-*"))


def test_a_teachers_recipe_is_trained_once_and_again_when_it_changes(with_recipe: Recipe, tmp_path: Path) -> None:
    go(with_recipe, tmp_path / "one", None)
    (trained,) = teachers_runs()
    assert run.read_status(trained)["state"] == "finished"
    assert (trained / "recipe.yaml").read_text() == (tmp_path / "cnn.yaml").read_text()
    assert (tmp_path / "one" / "analysis.json").exists()
    assert not (trained / "analysis.json").exists(), "no report shows it"
    before = {path: path.stat().st_mtime_ns for path in trained.rglob("*")}
    go(with_recipe, tmp_path / "two", None)
    assert {path: path.stat().st_mtime_ns for path in trained.rglob("*")} == before
    one, two = (next(run.read_metrics(tmp_path / name, "preflight")) for name in ("one", "two"))
    assert one["teacher_sha256"] == two["teacher_sha256"]
    assert same(
        load_file(tmp_path / "one/predictions.safetensors"), load_file(tmp_path / "two/predictions.safetensors")
    )
    own, seen = (load_file(path / "predictions.safetensors") for path in (trained, tmp_path / "one"))
    torch.testing.assert_close(own["student.fused"], seen["teacher"], rtol=0, atol=1e-5)

    text = (tmp_path / "cnn.yaml").read_text()
    (tmp_path / "cnn.yaml").write_text(text.replace("log_every: 1", "log_every: 2"))
    go(with_recipe, tmp_path / "three", None)
    assert teachers_runs() == [trained], "how often it logs changes nothing that it learns"
    (tmp_path / "cnn.yaml").write_text(text.replace("max_steps: 2", "max_steps: 3"))
    go(with_recipe, tmp_path / "four", None)
    assert len(teachers_runs()) == 2
    assert next(run.read_metrics(tmp_path / "four", "preflight"))["teacher_sha256"] != one["teacher_sha256"]


def test_an_interrupted_teacher_is_resumed(with_recipe: Recipe, tmp_path: Path) -> None:
    out = tmp_path / "run"
    with pytest.raises(Interrupted):
        go(with_recipe, out, 1)
    (teacher,) = teachers_runs()
    assert (run.read_status(teacher)["state"], run.read_status(teacher)["step"]) == ("interrupted", 1)
    assert run.read_status(out)["state"] == "interrupted"
    go(with_recipe, out, None, resume="auto")
    assert events(teacher).count("start") == events(teacher).count("resume") == 1
    assert [line["step"] for line in run.read_metrics(teacher, "train")] == [1, 2]
    assert run.read_status(out)["state"] == run.read_status(teacher)["state"] == "finished"


def test_a_teachers_recipe_of_other_data_is_refused(with_recipe: Recipe, tmp_path: Path) -> None:
    text = (tmp_path / "cnn.yaml").read_text()
    (tmp_path / "cnn.yaml").write_text(text.replace("name: toy.safetensors", "name: digits"))
    with pytest.raises(InputError, match=r"cnn\.yaml trains on digits, the student on toy\.safetensors"):
        go(with_recipe, tmp_path / "run", None)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cnn.yaml"]


def test_evaluations_every_so_many_epochs_and_a_run_without_analysis(toy: Toy, tmp_path: Path) -> None:
    recipe = toy.mapping(train={"evaluate_every": 2, "ema": None}, report={"analysis": "none"})
    out = distill.train(recipe, out=tmp_path / "run").path
    lines = [line for line in run.read_metrics(out, "eval") if line["split"] == "validation"]
    assert [line["epoch"] for line in lines] == [2.0, 3.0]
    assert [path.name for path in checkpoint.existing(out / "checkpoints")] == [
        f"step_{6 * epoch:08d}" for epoch in (1, 2, 3)
    ], "at every epoch"
    assert not list(out.glob("analysis.*"))
    assert (out / "report.html").exists()


def test_the_test_accuracy_is_known_before_the_analysis(
    toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known: list[str] = []
    monkeypatch.setattr(finishing, "analyse", lambda path, *_, **options: known.extend(events(path)))
    distill.train(short(toy, report={"analysis": "full"}), out=tmp_path / "run")
    assert known[-1] == "eval"
    assert events(tmp_path / "run").count("eval") == known.count("eval")
