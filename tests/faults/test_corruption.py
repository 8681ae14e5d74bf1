"""Every file with a known digest, damaged at random: it is refused by name before anything is done with it."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch

import distill.exports.folder
import teachers.sources
from distill.data.packed import open_packed
from distill.errors import InputError
from distill.evaluation import save_predictions
from distill.exports.folder import write_export
from distill.recipe import from_mapping, load
from distill.report.metrics import read_predictions
from distill.resumption import RunLocation, check_teacher
from distill.students import build_student
from distill.students.saved import read_export
from distill.teaching.logit_file import LogitFile
from distill.teaching.teachers import weights_digests
from teachers import ZOO, load_teacher
from tests.conftest import Counted, Toy
from tests.faults.damage import damage
from tests.warm import launch

COUNTS = [50, pytest.param(200, marks=pytest.mark.soak)]


class Kind(NamedTuple):
    """A kind of file: an intact folder with some, those that are damaged, and what reads them."""

    folder: Path
    files: list[str]
    read: Callable[[Path], object]


def an_export(folder: Path) -> Kind:
    spec = from_mapping({"student": {"model": "vit_nano", "patch_size": 4}, "data": {"resolution": 8}}).student
    student = build_student(spec, resolution=8, num_classes=4, channels=3, mean=(0.5,) * 3, std=(0.2,) * 3, seed=0)
    write_export(student, folder / "export", class_names=list("abcd"), metadata={"step": "3"}, readme="a card")
    return Kind(folder / "export", ["config.json", "model.safetensors"], read_export)


def a_packed_file(folder: Path, toy: Toy) -> Kind:
    (folder / "data").mkdir()
    shutil.copy(toy.root / "toy.safetensors", folder / "data")
    return Kind(folder / "data", ["toy.safetensors"], lambda place: open_packed(place / "toy.safetensors"))


def predictions(folder: Path) -> Kind:
    (folder / "run").mkdir()
    logits = {name: torch.randn(50, 4) for name in ("student.cls", "student.fused", "teacher")}
    save_predictions(
        folder / "run" / "predictions.safetensors", logits, torch.arange(50) % 4, {"data": "d" * 64, "run": "x"}
    )
    return Kind(
        folder / "run", ["predictions.safetensors"], lambda place: read_predictions(place / "predictions.safetensors")
    )


def zoo_weights(folder: Path, toy: Toy, monkeypatch: pytest.MonkeyPatch) -> Kind:
    """A local copy where torch.hub keeps them; the address answers nobody."""
    weights = folder / "hub" / "checkpoints" / "toy.pth"
    weights.parent.mkdir(parents=True)
    shutil.copy(toy.teacher, weights)
    entry = ZOO["cifar_resnet20"].model_copy(
        update={
            "url": "https://localhost:9/toy.pth",
            "sha256": hashlib.sha256(weights.read_bytes()).hexdigest(),
            "num_classes": 4,
        }
    )
    monkeypatch.setitem(teachers.sources.ZOO, "toy_teacher", entry)

    def read(place: Path) -> None:
        monkeypatch.setattr(torch.hub, "get_dir", lambda: str(place))
        load_teacher({"model": "toy_teacher"}, 4)

    return Kind(folder / "hub", ["checkpoints/toy.pth"], read)


def own_weights(folder: Path, toy: Toy) -> Kind:
    """A teacher's weights from the user, which have no hash but the one that the run wrote down when it began."""
    place = folder / "own"
    place.mkdir()
    shutil.copy(toy.teacher, place / "teacher.pth")

    def digests(place: Path) -> dict[str, str]:
        recipe = load(toy.recipe, [f"teacher.weights={place / 'teacher.pth'}"])
        return weights_digests(recipe, load_teacher(recipe.teachers[0], 4))

    ((_, digest),) = digests(place).items()

    def read(place: Path) -> None:
        # As the run's first launch leaves it.
        begun = {"state": "interrupted", "teacher_weights": {str(place / "teacher.pth"): digest}}
        (place / "status.json").write_text(json.dumps(begun))
        check_teacher(RunLocation(place, resumed=True), digests(place))

    return Kind(place, ["teacher.pth"], read)


@pytest.fixture
def kinds(toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Kind]:
    # What the export's own check finds is not the matter here, and it takes a process.
    monkeypatch.setattr(distill.exports.folder, "_compare_with_reloaded", lambda *_: None)
    intact = tmp_path / "intact"
    intact.mkdir()
    found = [
        an_export(intact),
        a_packed_file(intact, toy),
        predictions(intact),
        zoo_weights(intact, toy, monkeypatch),
        own_weights(intact, toy),
    ]
    for kind in found:
        kind.read(kind.folder)
    return found


def contents(folder: Path) -> dict[Path, bytes]:
    """Of all files but the status that tells them from others, and the lock."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name not in ("status.json", ".lock")]
    return {path: path.read_bytes() for path in files}


@pytest.mark.parametrize("count", COUNTS)
def test_damage_is_found_before_use(count: int, kinds: list[Kind], tmp_path: Path, counted: Counted) -> None:
    chance, detected, missed = random.Random(0), 0, []
    for number in range(count):
        kind = kinds[number % len(kinds)]
        place = tmp_path / "damaged"
        shutil.copytree(kind.folder, place)
        file = place / chance.choice(kind.files)
        done = damage(file, chance)
        before = contents(place)
        try:
            kind.read(place)
        except InputError as error:
            detected += file.name in str(error)
        else:
            missed.append(done)
        assert contents(place) == before, done
        shutil.rmtree(place)
    assert not missed, missed
    counted("damaged files with a digest found", done=detected, of=count)


@pytest.mark.parametrize("count", COUNTS)
def test_damaged_records_of_a_teacher_cache_count_as_missing(count: int, tmp_path: Path, counted: Counted) -> None:
    chance, path = random.Random(0), tmp_path / "cache.logits"
    key = hashlib.sha256(b"what the logits depend on").hexdigest()
    shape = {"epochs": 2, "samples": 32, "classes": 4}
    logits = np.random.default_rng(0).normal(size=(2, 32, 4)).astype(np.float16)

    def opened() -> LogitFile:
        file = LogitFile(path, key, **shape)
        file.make("{}")
        file.open()
        return file

    opened().write((epoch, 0, logits[epoch]) for epoch in range(2))
    assert all(opened().read(epoch, slice(0, 32))[1].all() for epoch in range(2))
    intact, detected = path.read_bytes(), 0
    for _ in range(count):
        done = damage(path, chance)
        is_longer = path.exists() and len(path.read_bytes()) > len(intact)
        lost = 0
        for epoch in range(2):
            rows, found = opened().read(epoch, slice(0, 32))
            assert np.array_equal(rows[found], logits[epoch][found]), done
            lost += int((~found).sum())
        # What stands behind the last record is nobody's.
        detected += lost > 0 or is_longer
        path.write_bytes(intact)
    counted("damaged teacher caches found", done=detected, of=count)


TEACHER_RECIPE = """
name: trained-first
data: {{name: toy.safetensors, root: {root}, validation: 0.25, resolution: 8}}
student: {{model: vit_nano, patch_size: 4, distillation_token: false}}
train: {{epochs: 1, batch_size: 16, precision: fp32, max_steps: 1}}
"""


@pytest.mark.parametrize("trained", [False, pytest.param(True, marks=pytest.mark.soak)])
def test_a_resumed_run_refuses_other_files_than_it_began_with(trained: bool, toy: Toy, tmp_path: Path) -> None:
    shutil.copy(toy.root / "toy.safetensors", tmp_path)
    shutil.copy(toy.teacher, tmp_path / "teacher.pth")
    (tmp_path / "first.yaml").write_text(TEACHER_RECIPE.format(root=tmp_path))
    recipe = toy.mapping(teacher={"weights": "teacher.pth"})
    if trained:
        recipe["teacher"] = {"recipe": "first.yaml", "min_accuracy": 0.0}
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    arguments = ["train", "recipe.yaml", f"data.root={tmp_path}", "train.max_steps=4", "--out", "run"]
    if trained:
        first = launch([*arguments[:-1], "earlier"], cwd=tmp_path)
        assert first.wait() == [0], first.output
    begun = launch([*arguments, "train.max_minutes=0.0001"], cwd=tmp_path)
    assert begun.wait() == [75], begun.output
    teacher = next((tmp_path / "runs").rglob("export/model.safetensors")) if trained else tmp_path / "teacher.pth"
    for file in (teacher, tmp_path / "toy.safetensors"):
        intact, before = file.read_bytes(), contents(tmp_path / "run")
        content = bytearray(intact)
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
        again = launch([*arguments, "--resume", "auto"], cwd=tmp_path)
        assert again.wait() == [2], again.output
        assert str(file.name) in again.output
        assert "Traceback" not in again.output
        assert contents(tmp_path / "run") == before
        file.write_bytes(intact)
    last = launch([*arguments, "--resume", "auto"], cwd=tmp_path)
    assert last.wait() == [0], last.output
