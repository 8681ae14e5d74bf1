"""A teacher without a classifier teaches by its feature maps, and everything about its accuracy is absent."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import timm
import torch
import torchvision
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from torch import nn

import distill
import teachers.sources
from distill import run
from distill.errors import InputError
from distill.inputs import IMAGENET_MEAN, IMAGENET_STD, InputContract
from teachers import Teacher, check_features, load_teacher
from tests.conftest import Toy
from tests.test_resume import trace, train_lines
from tests.warm import launch

MAPS = "distill=[{method: guide}, {method: similarity}]"


def weights_without_head(toy: Toy, path: Path) -> Path:
    weights = torch.load(toy.teacher, weights_only=True)
    torch.save({key: value for key, value in weights.items() if not key.startswith("linear.")}, path)
    return path


def arguments(toy: Toy, weights: Path, *others: str) -> list[object]:
    return ["train", toy.recipe, f"teacher.weights={weights}", "teacher.min_accuracy=null", *others, "--out", "run"]


def test_a_run_with_its_resumption_report_and_evaluation(toy: Toy, tmp_path: Path) -> None:
    command = arguments(toy, weights_without_head(toy, tmp_path / "w.pth"), MAPS, "--resume", "auto")
    folders = [tmp_path / "undisturbed", tmp_path / "interrupted"]
    for folder in folders:
        folder.mkdir()
    (folders[1] / "interruptions").write_text("7 0 0")
    for folder, code in ((folders[0], 0), (folders[1], 75), (folders[1], 0)):
        launched = launch(command, cwd=folder, before=trace)
        assert launched.wait() == [code], launched.output
        (folder / "interruptions").unlink(missing_ok=True)
    one, two = (folder / "run" for folder in folders)
    assert train_lines(one) == train_lines(two)
    assert {"loss/guide", "loss/similarity"} <= train_lines(one)[0].keys()
    exports = [(path / "export" / "model.safetensors").read_bytes() for path in (one, two)]
    assert exports[0] == exports[1]

    (preflight,) = run.read_metrics(one, "preflight")
    assert "no classifier" in preflight["teacher"]
    keys = {key for line in (one / "metrics.jsonl").read_text().splitlines() for key in json.loads(line)}
    assert "student/top1" in keys
    assert not keys & {"teacher/top1", "teacher/nll", "agreement"}
    outputs = {"labels", "student.cls", "student.dist", "student.fused"}
    assert load_file(one / "predictions.safetensors").keys() == outputs
    assert run.read_status(one)["parameters"]["teacher"] > 0
    card = (one / "export" / "README.md").read_text()
    assert "distilled from cifar" in card
    assert "| teacher" not in card

    for arguments_ in (["evaluate", "run"], ["compare", "run", "--out", "report.html"]):
        launched = launch(arguments_, cwd=folders[0])
        assert launched.wait() == [0], launched.output
    assert load_file(one / "predictions.safetensors").keys() == outputs
    assert "teacher" in json.loads((one / "analysis.json").read_text())["costs"]
    report = json.loads((folders[0] / "report.json").read_text())
    assert {row["model"] for row in report["rows"]} == {"student"}


def test_the_licence_is_said_and_goes_into_card_and_report(toy: Toy, tmp_path: Path) -> None:
    """Weights of the Hub by their name; a file of their shape stands in for the download."""
    name = "convnextv2_atto.fcmae"
    torch.manual_seed(0)
    torch.save(timm.create_model(name).state_dict(), tmp_path / "w.pth")
    recipe = tmp_path / "r.yaml"
    teacher = {"model": name, "weights": str(tmp_path / "w.pth"), "size": 32}
    methods = [{"method": method} for method in ("guide", "fitnet", "similarity", "relational")]
    raw = toy.mapping(distill=methods, control=True, train={"max_steps": 2})
    recipe.write_text(json.dumps(raw | {"teacher": teacher}))
    done = launch(["train", recipe, "--out", "run"], cwd=tmp_path, report=True)
    assert done.wait() == [0], done.output
    said = " ".join(done.output.split())
    assert said.count("the licence of its weights, cc-by-nc-4.0, excludes commercial use") == 1
    exports = [path / "export" / "README.md" for path in (tmp_path / "run", tmp_path / "run" / "control")]
    own, control = (ModelCard(path.read_text()) for path in exports)
    assert (own.data.base_model, control.data.base_model) == (f"timm/{name}", None)
    assert f"The licence of its teacher's weights: cc-by-nc-4.0 (timm/{name})." in own.text.replace("\\", "")
    assert "licence of its teacher's" not in control.text
    report = (tmp_path / "run" / "report.md").read_text().replace("\\", "")
    for fact in ("teacher's licence | cc-by-nc-4.0", f"teacher's weights are those of | timm/{name}"):
        assert fact in report
    assert "teacher/top1" not in (tmp_path / "run" / "metrics.jsonl").read_text()


@pytest.mark.parametrize(
    ("spoil", "changes", "message"),
    [
        (None, ["distill=[{method: guide}, {method: hard}, {method: dkd}]"],
         "distill: no logits to learn from for hard, dkd: teacher cifar_resnet20 has no classifier."),
        (None, [MAPS, "teacher.min_accuracy=0.5"], "teacher.min_accuracy: cifar_resnet20 has no classifier"),
        (None, [MAPS, "teacher.min_accuracy=0.0"], "teacher.min_accuracy: cifar_resnet20 has no classifier"),
        (None, [MAPS, "teacher.classes=[d, c, b, a]"], "teacher.classes: cifar_resnet20 has no classifier, so"),
        (None, [MAPS, "teacher.cache=true"], "only logits are stored; set teacher.cache to false"),
        (float("nan"), [MAPS], "teacher cifar_resnet20: its weights are not all numbers: conv1.weight (432 of"),
        (1e30, [MAPS], "teacher cifar_resnet20: its outputs are not finite on 100.00% of 32 images"),
        (0.0, [MAPS], "teacher cifar_resnet20: its outputs are the same on all 32 images"),
    ],
)  # fmt: skip
def test_what_is_refused_before_anything_is_written(
    toy: Toy, tmp_path: Path, spoil: float | None, changes: list[str], message: str
) -> None:
    path = weights_without_head(toy, tmp_path / "w.pth")
    if spoil is not None:
        weights = torch.load(path, weights_only=True)
        torch.save({key: value * spoil if value.is_floating_point() else value for key, value in weights.items()}, path)
    (tmp_path / "here").mkdir()
    launched = launch(arguments(toy, path, *changes), cwd=tmp_path / "here")
    assert launched.wait() == [2], launched.output
    assert message in " ".join(launched.output.split())
    assert list((tmp_path / "here").iterdir()) == []


def test_an_accuracy_that_there_is_not(toy: Toy, tmp_path: Path) -> None:
    weights = weights_without_head(toy, tmp_path / "w.pth")
    launched = launch(["evaluate", toy.recipe, f"teacher.weights={weights}"], cwd=tmp_path)
    assert launched.wait() == [2], launched.output
    assert "has no classifier, so it has no accuracy" in " ".join(launched.output.split())


def test_timms_weights_without_a_classifier(monkeypatch: pytest.MonkeyPatch) -> None:
    """As timm's configuration of them says."""
    monkeypatch.setattr(teachers.sources, "_pretrained", lambda name, url: timm.create_model(name))
    teacher = load_teacher({"model": "convnext_tiny.dinov3_lvd1689m"}, 7)
    assert teacher.num_classes == 0
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert teacher(images).shape == (2, 768)
    assert [shape[0] for shape in teacher.map_shapes(32).values()] == [96, 192, 384, 768]
    with pytest.raises(InputError, match=r"dinov3_lvd1689m: has no classifier and cannot be part of an ensemble"):
        load_teacher([{"model": "convnext_tiny.dinov3_lvd1689m"}] * 2, 7)


def test_a_module_held_in_python(toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distill.exports.folder._compare_with_reloaded", lambda *args: None)
    held = (timm.create_model("cifar_resnet20", num_classes=0), distill.Contract((0.5,) * 3, (0.25,) * 3, 8))
    changes = {"teacher": None, "distill": [{"method": "guide"}], "train": {"max_steps": 2}}
    finished = distill.train(toy.mapping(**changes), out=tmp_path / "run", teacher=held)
    (preflight,) = finished.metrics("preflight")
    assert "no classifier" in preflight["teacher"]
    assert "teacher" not in load_file(finished.path / "predictions.safetensors")


def test_a_head_that_nothing_can_take_off_is_missed(tmp_path: Path) -> None:
    network = torchvision.models.squeezenet1_1(num_classes=5)
    weights = {key: value for key, value in network.state_dict().items() if not key.startswith("classifier.")}
    torch.save(weights, tmp_path / "w.pth")
    with pytest.raises(InputError, match=r"2 missing: classifier\.1\.weight, classifier\.1\.bias"):
        load_teacher({"model": "torchvision/squeezenet1_1", "weights": str(tmp_path / "w.pth")}, 5)


def test_features_that_the_network_does_not_pool() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU())
    teacher = Teacher("conv", network, InputContract(IMAGENET_MEAN, IMAGENET_STD, 8), 0)
    images = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(teacher(images), network(teacher.adapter(images)).mean((2, 3)).detach())
    check_features(teacher, teacher(images))
    with pytest.raises(InputError, match=r"not finite on 50\.00% of 2 images"):
        check_features(teacher, torch.tensor([[0.0, float("inf")], [1.0, 2.0]]))
    with pytest.raises(InputError, match="the same on all 3 images"):
        check_features(teacher, torch.tensor([[1.0, 2.0]]).expand(3, -1))
