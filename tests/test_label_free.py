"""Runs without labels from their training to their report and export, and students that start from them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import yaml
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

import distill
import distill.exports.folder
from distill import run
from distill.data import Dataset, open_dataset
from distill.data.packed import write_packed
from distill.errors import InputError, Interrupted
from distill.exports.folder import load_export
from distill.recipe import Recipe, from_mapping
from distill.report.sections import sections
from distill.run import read_recipe
from distill.students import build_student
from distill.students.saved import read_export
from distill.teaching.earlier import directory_of
from tests.conftest import Command, Toy
from tests.students.helpers import student_options
from tests.test_resume import go
from tests.warm import launch

K, TEMPERATURE = 7, 0.1
WITHOUT_LABELS: dict[str, Any] = {
    "label_weight": 0.0,
    "distill": [{"method": "guide"}],
    "student": {"drop_path": 0.0},  # which depends on the number of processes
    "train": {"epochs": 2, "gradient_accumulation": 1},
    "evaluation": {"knn": {"k": K, "temperature": TEMPERATURE}},
}
DINO: dict[str, Any] = {
    "label_weight": 0.0,
    "distill": [{"method": "dino", "prototypes": 16, "hidden": 16, "bottleneck": 8}],
    "train": {"epochs": 1, "gradient_accumulation": 1, "ema": None},
    "evaluation": {"knn": {"k": K}},
}


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(distill.exports.folder, "_compare_with_reloaded", lambda *args: None)


@pytest.fixture(scope="module")
def finished(toy: Toy, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run without labels, by the real command, with its export compared in a fresh process."""
    folder = tmp_path_factory.mktemp("finished")
    recipe = folder / "toy.yaml"
    recipe.write_text(yaml.safe_dump(toy.mapping(**WITHOUT_LABELS, report={"analysis": "full"})))
    done = launch(["train", recipe, "--out", "run"], cwd=folder)
    assert done.wait() == [0], done.output
    assert "validation k-NN" in done.output
    assert "linear probe" in done.output
    return folder / "run"


def data_of(path: Path) -> Dataset:
    recipe = read_recipe(path)
    return open_dataset(recipe.data, seed=recipe.seed, device=torch.device("cpu"))


def features_of(model: Any, dataset: Dataset, split: Any) -> Tensor:
    images, _ = next(dataset.evaluation_batches(split, 0, 1000, 1000))
    student, _ = model
    with torch.inference_mode():
        return student.model(student.adapter(images)).double()


def votes_by_hand(features: Tensor, bank: Tensor, labels: list[int]) -> Tensor:
    votes = torch.zeros(len(features), 4, dtype=torch.float64)
    for row, one in enumerate(features):
        cosines = [float(one @ other / one.norm() / other.norm()) for other in bank]
        for index in sorted(range(len(bank)), key=lambda index: (-cosines[index], index))[:K]:
            votes[row, labels[index]] += math.exp(cosines[index] / TEMPERATURE)
    return votes


def evaluations(path: Path, split: str) -> list[dict[str, Any]]:
    return [line for line in run.read_metrics(path, "eval") if line["split"] == split]


def test_the_answers_are_the_votes_of_the_nearest_training_images(finished: Path) -> None:
    dataset, model = data_of(finished), load_export(finished / "export")
    bank, labels = features_of(model, dataset, "train"), dataset.labels("train").tolist()
    assert len(bank) == 96
    expected = votes_by_hand(features_of(model, dataset, "test"), bank, labels)
    shares = (expected / expected.sum(1, keepdim=True)).clamp(min=1e-6)
    saved = load_file(finished / "predictions.safetensors")
    assert set(saved) == {"labels", "student.fused", "teacher"}
    torch.testing.assert_close(saved["student.fused"].double().exp(), shares, rtol=1e-3, atol=1e-6)
    (test,) = evaluations(finished, "test")
    right = (expected.argmax(1) == dataset.labels("test")).float().mean()
    assert test["student/knn"] == pytest.approx(100 * float(right))
    assert 0 < test["student/linear"] <= 100
    directions = torch.nn.functional.normalize(features_of(model, dataset, "test"), dim=1)
    products = directions @ directions.T
    assert test["student/spread"] == pytest.approx(1 - float(products.mean()), abs=1e-5)
    assert not any(key.endswith("top1") and key != "teacher/top1" for key in test)
    assert run.read_status(finished)["metrics"]["student/linear"] == test["student/linear"]


def test_the_best_weights_by_neighbours_are_exported(finished: Path) -> None:
    lines = evaluations(finished, "validation")
    assert [(line["epoch"], line["weights"]) for line in lines] == [
        (1.0, "raw"), (1.0, "ema"), (2.0, "raw"), (2.0, "ema")
    ]  # fmt: skip
    best = max(lines, key=lambda line: line["student/knn"])  # the first of equals
    assert run.read_status(finished)["exported"] == {"step": best["step"], "weights": best["weights"]}
    assert not any("student/linear" in line for line in lines)
    dataset, model = data_of(finished), load_export(finished / "export")
    bank, labels = features_of(model, dataset, "train"), dataset.labels("train").tolist()
    votes = votes_by_hand(features_of(model, dataset, "validation"), bank, labels)
    right = (votes.argmax(1) == dataset.labels("validation")).double().mean()
    assert best["student/knn"] == pytest.approx(100 * float(right))
    metadata = read_export(finished / "export").metadata
    assert metadata["validation_knn"] == f"{best['student/knn']:.2f}"


def test_the_export_has_no_classifier_and_says_so(finished: Path, command: Command, tmp_path: Path) -> None:
    saved = read_export(finished / "export")
    assert (saved.config["num_classes"], saved.config["label_names"]) == (0, [])
    model = timm.create_model(f"local-dir:{finished / 'export'}", pretrained=True).eval()
    assert model(torch.zeros(2, 3, 8, 8)).shape == (2, 96)
    card = (finished / "export" / "README.md").read_text()
    assert yaml.safe_load(card.split("---")[1])["pipeline_tag"] == "image-feature-extraction"
    (test,) = evaluations(finished, "test")
    assert f"| student, k-NN | {test['student/knn']:.2f} |" in card
    assert "distill predict" not in card
    student = distill.load_student(finished / "export")
    assert student.labels == []
    with pytest.raises(InputError, match="trained without labels and has no classifier"):
        distill.predict(student, [Image.new("RGB", (8, 8))])
    Image.new("RGB", (8, 8)).save(tmp_path / "image.png")
    told = command("predict", finished / "export", tmp_path / "image.png")
    assert told.returncode == 2
    assert told.stderr.count("trained without labels and has no classifier") == 1
    with pytest.raises(InputError, match="--head cls: this student was trained without labels"):
        distill.export(finished, tmp_path / "cls", head="cls")
    with pytest.raises(InputError, match="--int8: without a classifier nothing tells what int8 loses"):
        distill.export(finished, tmp_path / "int8", int8=True)


@pytest.mark.soak
def test_onnx_gives_the_features(finished: Path, tmp_path: Path) -> None:
    runtime = pytest.importorskip("onnxruntime")
    distill.export(finished, tmp_path / "exported", onnx=True)
    session = runtime.InferenceSession(tmp_path / "exported" / "model.onnx")
    assert [output.name for output in session.get_outputs()] == ["features"]
    images = np.random.default_rng(0).random((3, 3, 8, 8), dtype=np.float32)
    student, _ = load_export(tmp_path / "exported")
    (found,) = session.run(None, {"images": images})
    with torch.inference_mode():
        expected = student.embedding(torch.from_numpy(images))
    torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-4, atol=1e-4)


def test_the_report_shows_features_and_nothing_of_heads(finished: Path) -> None:
    report = distill.compare([finished], finished.parent / "report.html")
    names = {section.name for section in sections(report.comparison)}
    assert {"features", "learning", "classes"} <= names
    assert not {"calibration", "fidelity", "robustness"} & names
    data = json.loads((finished.parent / "report.json").read_text())
    (test,) = evaluations(finished, "test")
    student, pixels = data["features"]
    assert (student["model"], pixels["model"]) == ("student", "raw pixels")
    assert student["knn"] == test["student/knn"]
    assert student["linear"] == test["student/linear"]
    dataset = data_of(finished)
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (dataset.info.mean, dataset.info.std))
    flat = {
        split: ((next(dataset.evaluation_batches(split, 0, 1000, 1000))[0] - mean) / std).flatten(1).double()
        for split in ("train", "test")
    }
    votes = votes_by_hand(flat["test"], flat["train"], dataset.labels("train").tolist())
    assert pixels["knn"] == pytest.approx(100 * float((votes.argmax(1) == dataset.labels("test")).double().mean()))
    assert {curve["variant"] for curve in data["curves"]["knn"]} == {"validation", "validation, EMA"}
    html = (finished.parent / "report.html").read_text()
    assert "was trained without labels" in html
    assert f"a linear probe {test['student/linear']:.2f} %" in html
    assert "distillation token" not in html.lower()
    assert data["warnings"] == []


def test_the_pictures_are_of_the_nearest_training_images(finished: Path) -> None:
    tensors = load_file(finished / "analysis.safetensors")
    dataset, model = data_of(finished), load_export(finished / "export")
    bank = torch.nn.functional.normalize(features_of(model, dataset, "train"), dim=1)
    tested = torch.nn.functional.normalize(features_of(model, dataset, "test"), dim=1)
    images, labels = next(dataset.evaluation_batches("train", 0, 1000, 1000))
    indices = tensors["neighbours.indices"].tolist()
    saved = load_file(finished / "predictions.safetensors")
    right = saved["student.fused"].argmax(1) == saved["labels"]
    assert len(indices) == min(6, int(right.sum())) + min(6, int((~right).sum()))
    for place, index in enumerate(indices):
        cosines, nearest = (bank @ tested[index]).sort(descending=True)
        torch.testing.assert_close(tensors["nearest.cosines"][place].double(), cosines[:5], rtol=0, atol=1e-5)
        clear = (cosines[:5] - cosines[1:6] > 1e-5) & (torch.cat([torch.ones(1), cosines[:4] - cosines[1:5]]) > 1e-5)
        for rank in clear.nonzero()[:, 0].tolist():
            picture = (images[nearest[rank]] * 255).round().to(torch.uint8)
            assert torch.equal(tensors["nearest.images"][place, rank], picture)
            assert tensors["nearest.labels"][place, rank] == labels[nearest[rank]]


def test_it_is_evaluated_again_and_compared_with_a_supervised_run(toy: Toy, finished: Path, tmp_path: Path) -> None:
    before = load_file(finished / "predictions.safetensors")
    metrics = distill.evaluate(finished)
    after = load_file(finished / "predictions.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in before)
    (test,) = evaluations(finished, "test")
    assert metrics["student.fused"].top1 == test["student/knn"]
    supervised = {
        "teacher": None,
        "distill": [],
        "label_weight": 1.0,
        "evaluation": {"knn": {"k": K, "temperature": TEMPERATURE}},
        "train": {"epochs": 1, "gradient_accumulation": 1},
    }
    other = distill.train(toy.mapping(**supervised), out=tmp_path / "supervised")
    for line in other.metrics("eval"):
        assert {"student/top1", "student/knn"} <= line.keys()
        assert "student/linear" not in line
    best = max(evaluations(other.path, "validation"), key=lambda line: line["student/top1"])
    assert other.status["exported"]["weights"] == best["weights"]
    report = distill.compare([finished, other], tmp_path / "both.html")
    (pair,) = [
        test
        for section in sections(report.comparison)
        if section.name == "verdicts"
        for test in section.data
        if test["first"] == "run: student, k-NN" and test["second"] == "supervised: student without teacher, both heads"
    ]
    labels = after["labels"]
    theirs = load_file(other.path / "predictions.safetensors")["student.fused"].argmax(1) == labels
    ours = after["student.fused"].argmax(1) == labels
    assert pair["only_first_right"] == int((ours & ~theirs).sum())
    assert pair["only_second_right"] == int((theirs & ~ours).sum())


def test_two_processes_measure_the_same(toy: Toy, finished: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "toy.yaml"
    recipe.write_text(yaml.safe_dump(toy.mapping(**WITHOUT_LABELS)))
    done = launch(["train", recipe, "--out", "two"], cwd=tmp_path, processes=2)
    assert done.wait() == [0, 0], done.output
    for split in ("validation", "test"):
        for one, two in zip(evaluations(finished, split), evaluations(tmp_path / "two", split), strict=True):
            for key in ("student/knn", "student/spread"):
                assert two[key] == pytest.approx(one[key], abs=1e-3)


def test_more_neighbours_than_training_images(toy: Toy, tmp_path: Path) -> None:
    recipe = toy.mapping(**WITHOUT_LABELS | {"evaluation": {"knn": {"k": 97}}})
    with pytest.raises(InputError, match=r"evaluation\.knn\.k: 97 neighbours, but the training split has 96 images"):
        distill.train(recipe, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_which_evaluation_a_recipe_has(toy: Toy) -> None:
    def evaluation(**changes: Any) -> dict[str, Any]:
        return from_mapping(toy.mapping(**changes)).evaluation.model_dump()

    defaults = {"knn": {"k": 20, "temperature": 0.07}, "linear": {"strengths": [1e-5, 1e-4, 1e-3, 1e-2, 1e-1]}}
    free = {"label_weight": 0.0, "distill": [{"method": "guide"}]}
    assert evaluation() == {"knn": None, "linear": None}
    assert evaluation(**free) == defaults
    assert evaluation(**free, evaluation={"linear": None, "knn": {"k": 3}}) == {
        "knn": {"k": 3, "temperature": 0.07},
        "linear": None,
    }
    assert evaluation(evaluation={"knn": {}}) == {"knn": defaults["knn"], "linear": None}
    resolved = from_mapping(toy.mapping(**free, evaluation={"linear": None}))
    assert from_mapping(yaml.safe_load(resolved.to_yaml())).evaluation == resolved.evaluation
    with pytest.raises(InputError, match=r"control: without labels and without the teacher nothing would be learned"):
        from_mapping(toy.mapping(**free, control=True))


# Students that start from such a run


def self_distilled(toy: Toy, **data: Any) -> dict[str, Any]:
    """The toy recipe with DINO alone."""
    recipe = toy.mapping(**DINO) | {"teacher": {"ema": {}}}
    views = [
        {"kind": "global", "count": 2, "size": 8, "scale": [0.5, 1.0]},
        {"kind": "local", "count": 1, "size": 4, "scale": [0.2, 0.5]},
    ]
    recipe["data"] |= {"augment": {}, "views": views, **data}
    return recipe


def test_collapsed_features_are_called_so(toy: Toy, tmp_path: Path) -> None:
    labels = {"train.labels": torch.arange(64) % 4, "test.labels": torch.arange(8) % 4}
    picture = torch.randint(0, 256, (1, 3, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    tensors = labels | {
        f"{split}.images": picture.repeat(size, 1, 1, 1) for split, size in (("train", 64), ("test", 8))
    }
    write_packed(tmp_path / "grey.safetensors", name="grey", class_names=("a", "b", "c", "d"), tensors=tensors)
    recipe = self_distilled(toy, name="grey.safetensors", root=str(tmp_path))
    (tmp_path / "toy.yaml").write_text(yaml.safe_dump(recipe))
    done = launch(["train", "toy.yaml", "--out", "run", "train.max_steps=2"], cwd=tmp_path, report=True)
    assert done.wait() == [0], done.output
    assert "the features collapsed: all images have the same ones" in done.output
    assert "Warning. run: the features collapsed" in " ".join(done.output.split())
    assert "run: the features collapsed" in (tmp_path / "run" / "report.html").read_text()
    (test,) = evaluations(tmp_path / "run", "test")
    assert test["student/spread"] == pytest.approx(0, abs=1e-6)
    assert test["student/knn"] == 25.0
    assert {"dino/teacher_entropy", "dino/kl"} <= next(run.read_metrics(tmp_path / "run", "train")).keys()


def pretraining(toy: Toy, tmp_path: Path, **changes: Any) -> Recipe:
    """A recipe of a supervised run, one step long, after two steps of DINO by pre.yaml."""
    first = self_distilled(toy)
    first["train"] |= {"max_steps": 2}
    (tmp_path / "pre.yaml").write_text(yaml.safe_dump(first))
    own = {"teacher": None, "distill": [], "label_weight": 1.0, "train": {"max_steps": 1}} | changes
    return from_mapping(toy.mapping(pretrain={"recipe": "pre.yaml"}, **own), default_name="fine")


def test_it_starts_from_the_pretraining_which_is_found_again(toy: Toy, tmp_path: Path) -> None:
    recipe = pretraining(toy, tmp_path)
    go(recipe, tmp_path / "one", None)
    (first,) = Path("runs/pretrain").iterdir()
    assert first.name.startswith("pre-")
    assert run.read_status(first)["state"] == "finished"
    assert not (first / "analysis.json").exists()
    weights = str(first / "export" / "model.safetensors")
    assert list(run.read_status(tmp_path / "one")["initial_weights"]) == [weights]
    before = {path: path.stat().st_mtime_ns for path in first.rglob("*")}
    go(recipe, tmp_path / "two", None)
    assert {path: path.stat().st_mtime_ns for path in first.rglob("*")} == before
    starts = [next(run.read_metrics(tmp_path / name, "start"))["initial_weights"] for name in ("one", "two")]
    alone = recipe.replace(pretrain=None, student=recipe.student.model_copy(update={"weights": str(first / "export")}))
    go(alone, tmp_path / "three", None)
    assert {next(run.read_metrics(tmp_path / "three", "start"))["initial_weights"], *starts} == {starts[0]}
    go(recipe.replace(pretrain=None), tmp_path / "scratch", None)
    assert next(run.read_metrics(tmp_path / "scratch", "start"))["initial_weights"] != starts[0]
    assert "pretrained_by: pre.yaml" in (tmp_path / "one" / "export" / "README.md").read_text().replace("\\", "")


def test_an_interrupted_pretraining_is_resumed_and_a_changed_one_refused(toy: Toy, tmp_path: Path) -> None:
    recipe, out = pretraining(toy, tmp_path, train={"max_steps": 2}), tmp_path / "run"
    with pytest.raises(Interrupted):
        go(recipe, out, 1)
    (first,) = Path("runs/pretrain").iterdir()
    assert (run.read_status(first)["state"], run.read_status(first)["step"]) == ("interrupted", 1)
    with pytest.raises(Interrupted):  # after one more step there, in its own first
        go(recipe, out, 2, resume="auto")
    assert run.read_status(first)["state"] == "finished"
    assert (run.read_status(out)["state"], run.read_status(out)["step"]) == ("interrupted", 1)
    status = json.loads((out / "status.json").read_text())
    ((path, digest),) = status["initial_weights"].items()
    (out / "status.json").write_text(json.dumps(status | {"initial_weights": {path: "0" * 64}}))
    with pytest.raises(InputError, match="these weights are not those that the student of"):
        go(recipe, out, None, resume="auto")
    (out / "status.json").write_text(json.dumps(status))
    go(recipe, out, None, resume="auto")
    go(recipe, tmp_path / "straight", None)
    one, other = (load_file(path / "export" / "model.safetensors") for path in (out, tmp_path / "straight"))
    assert all(torch.equal(one[name], other[name]) for name in other)
    assert digest == run.read_status(tmp_path / "straight")["initial_weights"][path]


def test_the_control_starts_from_the_same_weights(toy: Toy, tmp_path: Path) -> None:
    mapping = toy.mapping()
    taught = {"teacher": mapping["teacher"], "distill": [{"method": "soft"}], "control": True}
    recipe = pretraining(toy, tmp_path, **taught)
    go(recipe, tmp_path / "run", None)
    starts = [next(run.read_metrics(path, "start")) for path in (tmp_path / "run", tmp_path / "run" / "control")]
    assert starts[0]["initial_weights"] == starts[1]["initial_weights"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"student": {"model": "vit_tiny"}},
            r"pre\.yaml trains a student of model vit_nano, and student\.model is vit_tiny",
        ),
        ({"student": {"stem": "conv"}}, r"pre\.yaml trains a student of stem patch, and student\.stem is conv"),
        ({"data": {"name": "digits"}}, r"pre\.yaml trains on toy\.safetensors, the student on digits"),
        ({"data": {"test": 0.5}}, r"pre\.yaml holds out other test images"),
        ({"student": {"weights": "export"}}, r"pretrain: the student starts from .*, or from student\.weights"),
        ({"student": {"pretrained": True}}, r"pretrain: the student starts from .*, or from student\.pretrained"),
        ({"pretrain": {"recipe": None}}, r"pretrain\.recipe: name the recipe"),
    ],
)
def test_pretraining_that_does_not_fit(toy: Toy, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    valid = pretraining(toy, tmp_path)
    raw = yaml.safe_load(valid.to_yaml())
    for key, value in changes.items():
        raw[key] |= value

    def find() -> None:
        recipe = from_mapping(raw)
        assert recipe.pretrain is not None
        directory_of(recipe, recipe.pretrain)

    with pytest.raises(InputError, match=message):
        find()


@pytest.mark.parametrize("token", [True, False])
@pytest.mark.parametrize("resolution", [8, 16])
def test_weights_without_a_classifier_get_new_heads(finished: Path, token: bool, resolution: int) -> None:
    keys = {"model": "vit_nano", "patch_size": 4, "attention": {"kind": "area", "max_area": 2, "blocks": [0, 1]}}

    def build(weights: str | None) -> dict[str, Tensor]:
        spec = student_options(**keys, weights=weights, distillation_token=token)
        student = build_student(
            spec, resolution=resolution, num_classes=4, channels=3, mean=(0.5,) * 3, std=(0.5,) * 3, seed=5
        )
        assert len(student.heads) == 1 + token
        return student.model.state_dict()

    random, started = build(None), build(str(finished / "export"))
    with safe_open(finished / "export" / "model.safetensors", "pt") as file:
        saved = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (a handle, no mapping)
    new = {"head.weight", "head.bias"} | ({"head_dist.weight", "head_dist.bias", "dist_token"} if token else set())
    assert started.keys() == saved.keys() | new
    for name in new:
        assert torch.equal(started[name], random[name]), name
    for name in saved.keys() - {"pos_embed"}:
        assert torch.equal(started[name], saved[name]), name
    positions, own = started["pos_embed"], saved["pos_embed"]
    torch.testing.assert_close(positions[:, 0], own[:, 0])
    if token:
        torch.testing.assert_close(positions[:, 1], random["pos_embed"][:, 1])
    patches = positions[:, 1 + token :]
    if resolution == 8:
        assert torch.equal(patches, own[:, 1:])
    else:
        grid = own[:, 1:].reshape(1, 2, 2, -1).permute(0, 3, 1, 2)
        larger = torch.nn.functional.interpolate(grid, (4, 4), mode="bicubic", antialias=True)
        torch.testing.assert_close(patches, larger.permute(0, 2, 3, 1).reshape(1, 16, -1))
