"""The analysis of a real run: written by training and by `distill evaluate`, read by the report."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from distill.analysis import analyse
from distill.analysis.corruptions import CORRUPTIONS
from distill.analysis.record import _disagreements, _stratified, _take
from distill.data import open_dataset
from distill.errors import InputError
from distill.exports.folder import load_export
from distill.recipe import from_mapping
from distill.report.comparison import compare
from distill.report.sections import sections
from distill.run import read_recipe
from tests.conftest import Command, Toy
from tests.formulas import cifar_resnet_forward
from tests.warm import launch


@pytest.fixture(scope="module")
def finished(toy: Toy, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one epoch with its control."""
    folder = tmp_path_factory.mktemp("finished")
    recipe = folder / "toy.yaml"
    changes = {"train": {"epochs": 1, "keep_checkpoints": 1}, "control": True, "report": {"analysis": "full"}}
    recipe.write_text(yaml.safe_dump(toy.mapping(**changes)))
    done = launch(["train", recipe, "--out", "run"], cwd=folder)
    assert done.wait() == [0], done.output
    return folder / "run"


def test_a_run_leaves_what_its_report_needs(finished: Path) -> None:
    comparison = compare([finished])
    names = [section.name for section in sections(comparison)]
    expected = ["verdicts", "learning", "fidelity", "calibration", "classes", "robustness", "tokens", "cost", "made"]
    assert [name for name in names if name != "pictures"] == expected
    run = comparison.runs["run"]
    assert run.analysis is not None
    assert run.control is not None
    assert run.control.analysis is not None
    predictions, analysis = run.predictions, run.analysis
    says, teacher_says = (predictions.logits[name].argmax(1) for name in ("student.fused", "teacher"))
    assert ("pictures" in names) == bool((says != teacher_says).any())
    assert set(analysis.values["robustness"]["correct"]) == set(CORRUPTIONS)
    for counts in analysis.values["robustness"]["correct"].values():
        assert set(counts) == {"student.fused", "student.cls", "student.dist", "teacher"}
        assert {len(levels) for levels in counts.values()} == {6}
    # The images that were corrupted are those of the test set: the first count is what the predictions say.
    labels = torch.from_numpy(predictions.labels)
    places = _stratified(labels, analysis.values["robustness"]["images"])
    for name, logits in predictions.logits.items():
        right = (logits.argmax(1) == predictions.labels)[places].sum()
        assert abs(analysis.values["robustness"]["correct"]["JPEG"][name][0] - right) <= 1
    assert analysis.tensors["validation.teacher"].shape == analysis.tensors["validation.student.cls"].shape == (32, 4)
    assert analysis.values["costs"]["teacher"]["images_per_second"] > 0


def test_evaluate_writes_it_anew_and_an_old_run_does_without(finished: Path, tmp_path: Path, command: Command) -> None:
    path = tmp_path / "run"
    shutil.copytree(finished, path)
    for name in ("analysis.json", "analysis.safetensors"):
        (path / name).unlink()
        (path / "control" / name).unlink()
    assert "robustness" not in [section.name for section in sections(compare([path]))]
    assert command("evaluate", path).returncode == 0
    before, after = (json.loads((folder / "analysis.json").read_text()) for folder in (finished, path))
    assert before["robustness"] == after["robustness"]
    one, two = (load_file(folder / "analysis.safetensors") for folder in (finished, path))
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        assert torch.allclose(tensor.double(), two[name].double(), atol=1e-3), name


def test_a_dry_run_prints_the_flops_of_the_analysis(finished: Path, tmp_path: Path, command: Command) -> None:
    costs = json.loads((finished / "analysis.json").read_text())["costs"]
    result = command("train", finished / "recipe.yaml", "--dry-run")
    assert result.returncode == 0, result.stderr
    assert costs["teacher"]["flops"] == cifar_resnet_forward(20, num_classes=4)  # it takes images of 32 x 32
    assert f"FLOPs       {costs['student']['flops'] / 1e9:.4f} G " in result.stdout


def test_a_damaged_or_foreign_analysis_is_refused_by_name(finished: Path, tmp_path: Path) -> None:
    path = tmp_path / "run"
    shutil.copytree(finished, path)
    file = path / "analysis.safetensors"
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)
    with pytest.raises(InputError, match=r"analysis\.safetensors.*distill evaluate"):
        compare([path])
    shutil.copy(finished / "analysis.safetensors", file)
    status = json.loads((path / "status.json").read_text())
    (path / "status.json").write_text(json.dumps(status | {"data_digest": None}))
    values = json.loads((path / "analysis.json").read_text())
    (path / "analysis.json").write_text(json.dumps(values | {"data": "other"}))
    with pytest.raises(InputError, match=r"analysis\.json.*other data"):
        compare([path])


def test_a_full_disk_is_a_warning(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = from_mapping(read_recipe(finished).model_dump(), source="test")
    dataset = open_dataset(recipe.data, seed=0, device=torch.device("cpu"))
    student, _ = load_export(finished / "export")
    shutil.copytree(finished / "export", tmp_path / "export")

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("distill.analysis.record.write_tensors", full)
    warned: list[str] = []
    monkeypatch.setattr("distill.analysis.record._log.warning", lambda text, *values: warned.append(text % values))
    analyse(tmp_path, student, None, dataset, {"student.fused": torch.randn(50, 4)}, {})
    assert not (tmp_path / "analysis.json").exists()
    assert [text.split("analysis: ")[1] for text in warned] == [
        "cannot be written (No space left on device); the report does without it"
    ]


def test_strata_are_even_nested_and_whole() -> None:
    labels = torch.tensor([0] * 50 + [1] * 30 + [2] * 5)
    places = _stratified(labels, 30)
    assert torch.bincount(labels[places]).tolist() == [13, 12, 5]
    assert _stratified(labels, 12) == places[:12]
    assert sorted(_stratified(labels, 1000)) == list(range(85))


def test_pictures_are_the_surest_disagreements_of_every_kind() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 5, (200,), generator=generator)
    logits = {name: 3 * torch.randn(200, 5, generator=generator) for name in ("student.fused", "teacher")}
    places = _disagreements(logits, labels)
    says, teacher = (logits[name].argmax(1) for name in ("student.fused", "teacher"))
    assert len(places) == len(set(places)) == 60
    assert bool((says[places] != teacher[places]).all())
    kinds = [(int(teacher[place] == labels[place]), int(says[place] == labels[place])) for place in places[:9]]
    assert kinds == [(1, 0), (0, 1), (0, 0)] * 3
    both_sure = logits["student.fused"].softmax(1).amax(1) * logits["teacher"].softmax(1).amax(1)
    sure = both_sure[places[::3][:5]].tolist()
    assert sure == sorted(sure, reverse=True)
    assert _disagreements({"student.fused": logits["student.fused"]}, labels) == []


def test_images_come_as_they_are_in_the_file(toy: Toy) -> None:
    recipe = from_mapping(toy.mapping(), source="test")
    dataset = open_dataset(recipe.data, seed=0, device=torch.device("cpu"))
    images = load_file(toy.root / "toy.safetensors")["test.images"]
    assert torch.equal(_take(dataset, [0, 3, 17, 49]), images[[0, 3, 17, 49]])
    assert torch.equal(_take(dataset, [7]), images[[7]])
