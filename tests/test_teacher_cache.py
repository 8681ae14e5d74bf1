"""The teacher's logits, stored and replayed: never a wrong one, and the losses bit for bit."""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import distill.exports.folder
from distill import api, pipeline, run
from distill.data import BatchPlan, open_dataset
from distill.data.augment import Augmenter
from distill.data.packed import write_packed
from distill.data.sequential import SequentialDataset
from distill.errors import InputError, Interrupted
from distill.exports.folder import write_export
from distill.launching.processes import build_accelerator
from distill.pipeline import open_data
from distill.recipe import Recipe, from_mapping
from distill.students import build_student
from distill.teaching import cache as teacher_cache
from distill.teaching.cache import TeacherCache, open_cache
from distill.teaching.logit_file import LogitFile
from distill.teaching.teachers import build_teacher
from distill.trainer import Trainer
from teachers import Teacher, load_teacher
from tests.conftest import DEVICES, Toy, image_folder
from tests.students.helpers import student_options
from tests.test_resume import go
from tests.warm import launch

Mapping = dict[str, Any]
STEPS_AN_EPOCH = 6  # 96 training images in batches of 16, each of two micro-batches


@pytest.fixture(autouse=True)
def in_an_empty_folder_on_one_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        distill.exports.folder, "_compare_with_reloaded", lambda *args: None
    )  # tests/test_export.py has it
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # threads that wait for each other on a busy machine cost ten times what they save here
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often the teacher was run while a student learned, under 'training'."""
    calls: Counter[str] = Counter()
    fit, forward = Trainer.fit, Teacher.forward

    def counted_fit(trainer: Trainer, *arguments: Any) -> None:
        calls["now"] = 1
        try:
            fit(trainer, *arguments)
        finally:
            calls["now"] = 0

    def counted_forward(teacher: Teacher, images: Tensor) -> Tensor:
        calls["training"] += calls["now"]
        return forward(teacher, images)

    monkeypatch.setattr(Trainer, "fit", counted_fit)
    monkeypatch.setattr(Teacher, "forward", counted_forward)
    return calls


def cached(toy: Toy, steps: int = 8, **changes: Any) -> Recipe:
    train = {"max_steps": steps} | changes.pop("train", {})
    if not isinstance(changes.get("teacher"), list):
        changes["teacher"] = {"cache": True} | changes.get("teacher", {})
    return from_mapping(toy.mapping(train=train, **changes), default_name="toy")


def lines(path: Path) -> list[Mapping]:
    apart = ("time", "images_per_second", "data_wait", "teacher_cache/hits")
    return [{k: v for k, v in line.items() if k not in apart} for line in run.read_metrics(path, "train")]


def hits(path: Path) -> list[float]:
    return [line["teacher_cache/hits"] for line in run.read_metrics(path, "train")]


def export(path: Path) -> bytes:
    return (path / "export" / "model.safetensors").read_bytes()


def files() -> list[Path]:
    return sorted(teacher_cache.FOLDER.glob("*.logits"))


# Whole runs


def test_a_replay_has_the_losses_bit_for_bit_and_asks_no_teacher(
    toy: Toy, tmp_path: Path, asked: Counter[str], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("distill"), "propagate", True)
    recipe = cached(toy)
    with caplog.at_level(logging.INFO, "distill"):
        go(recipe, tmp_path / "recorded", None)
    assert asked["training"] == 16
    assert hits(tmp_path / "recorded") == [0.0] * 8
    (file,) = files()
    assert [message for message in caplog.messages if message.startswith("teacher cache")] == [
        f"teacher cache: allocating 0.0 MB for {file}",
        f"teacher cache: {file} has about 0 % of this run",
    ]
    assert f"allocating 0.0 MB for {file}" in (tmp_path / "recorded" / "train.log").read_text()
    assert file.stat().st_size == 2 * 96 * (4 + 2 * 4)
    assert sorted(child.name for child in file.parent.iterdir()) == [f"{file.stem}.json", file.name]

    caplog.clear()
    with caplog.at_level(logging.INFO, "distill"):
        go(recipe, tmp_path / "replayed", None)
    assert asked["training"] == 16
    assert hits(tmp_path / "replayed") == [1.0] * 8
    assert lines(tmp_path / "replayed") == lines(tmp_path / "recorded")
    assert export(tmp_path / "replayed") == export(tmp_path / "recorded")
    assert f"teacher cache: {file} has about 100 % of this run" in caplog.messages

    # Another student, batch size and loss. Its third step has two thirds of its samples there, its fourth none.
    other = cached(
        toy, 4, student={"attention": {"kind": "standard"}}, distill=[{"method": "soft", "weight": 1.0}],
        train={"batch_size": 48, "gradient_accumulation": 1}, label_weight=0.1,
    )  # fmt: skip
    go(other, tmp_path / "other", None)
    assert files() == [file]
    assert hits(tmp_path / "other") == [1.0, 1.0, pytest.approx(2 / 3), 0.0]
    assert asked["training"] == 16 + 2


def test_the_file_holds_the_teachers_logits_by_epoch_and_position(toy: Toy, tmp_path: Path) -> None:
    recipe = cached(toy, 12)
    go(recipe, tmp_path / "run", None)
    records = np.fromfile(files()[0], np.dtype([("check", "<u4"), ("logits", "<f2", (4,))])).reshape(2, 96)
    dataset = open_dataset(recipe.data, seed=recipe.seed, device=torch.device("cpu"))
    teacher = load_teacher(recipe.teachers[0], 4).double()
    for epoch in range(2):
        ((batch,),) = dataset.training_batches(BatchPlan(seed=recipe.seed, batch_size=96), epoch)
        expected = teacher(batch.images.double()).numpy()
        stored = records["logits"][epoch].astype(np.float64)
        assert np.abs(stored - expected).max() < np.abs(expected).max() * 2**-10
    assert (records["check"] != 0).all()


def test_an_ensemble_is_stored_as_a_whole(toy: Toy, tmp_path: Path, asked: Counter[str]) -> None:
    one = toy.mapping()["teacher"] | {"cache": True}
    recipe = cached(toy, 2, teacher=[one, one | {"mean": [0.5, 0.5, 0.5], "weight": 2.0}])
    for name in ("recorded", "replayed"):
        go(recipe, tmp_path / name, None)
    assert asked["training"] == 2 * 2 * 2
    assert lines(tmp_path / "replayed") == lines(tmp_path / "recorded")
    go(cached(toy, 2, teacher=[one, one | {"mean": [0.5, 0.5, 0.5], "weight": 2.1}]), tmp_path / "other", None)
    assert hits(tmp_path / "other") == [0.0, 0.0]


def test_streamed_images(toy: Toy, tmp_path: Path, asked: Counter[str]) -> None:
    image_folder(tmp_path / "images", "abcd", {"train": 8, "test": 2}, width=12, height=9)
    data = {"name": "folder", "root": str(tmp_path / "images"), "stream": True, "workers": 0, "validation": 0.0}
    recipe = cached(toy, 3, data=data | {"augment": {"random_resized_crop": {}, "mixup": 0.8}})
    for name in ("recorded", "replayed"):
        go(recipe, tmp_path / name, None)
    assert asked["training"] == 6
    assert hits(tmp_path / "replayed") == [1.0] * 3
    assert lines(tmp_path / "replayed") == lines(tmp_path / "recorded")


def test_where_the_only_method_has_ended_nothing_is_asked_for(toy: Toy, tmp_path: Path, asked: Counter[str]) -> None:
    weight = {"start": 1.0, "end": 0.0, "until": 3 / 18}
    go(cached(toy, STEPS_AN_EPOCH, distill=[{"method": "soft", "weight": weight}]), tmp_path / "run", None)
    assert asked["training"] == 2 * 3
    found = ["teacher_cache/hits" in line for line in run.read_metrics(tmp_path / "run", "train")]
    assert found == [True] * 3 + [False] * 3


def test_one_process_and_two(toy: Toy, tmp_path: Path) -> None:
    """Two replay what one recorded, and one what two recorded."""
    go(cached(toy, STEPS_AN_EPOCH), tmp_path / "one", None)
    arguments = ["train", toy.recipe, "--out", "two", "teacher.cache=true", "train.max_steps=9",
                 "train.gradient_accumulation=1"]  # fmt: skip
    done = launch(arguments, cwd=tmp_path, processes=2)
    assert done.wait() == [0, 0], done.output
    assert hits(tmp_path / "two") == [1.0] * STEPS_AN_EPOCH + [0.0] * 3
    go(cached(toy, 9, train={"batch_size": 32}), tmp_path / "again", None)
    assert hits(tmp_path / "again") == [1.0] * 4 + [0.5] + [0.0] * 4
    assert len(files()) == 1


# Runs that end early, or go on


class Crash(Exception):
    pass


def test_a_crashed_recording_goes_on_to_the_losses_of_an_undisturbed_one(
    toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: Counter[str]
) -> None:
    recipe = cached(toy, 12, train={"log_every": 2})
    step = Trainer.train_step

    def crash(trainer: Trainer, batches: Any) -> None:
        if trainer.progress.step == 9:  # what was logged at step 8 is in the file, the rest of it is lost
            raise Crash
        step(trainer, batches)

    monkeypatch.setattr(Trainer, "train_step", crash)
    with pytest.raises(Crash):
        go(recipe, tmp_path / "run", None)
    monkeypatch.setattr(Trainer, "train_step", step)
    assert asked["training"] == 2 * 9
    go(recipe, tmp_path / "run", None, resume="auto")
    assert asked["training"] == 2 * (9 + 4)
    assert hits(tmp_path / "run")[3:] == [1.0, 0.0, 0.0]
    shutil.rmtree(teacher_cache.FOLDER)
    go(recipe, tmp_path / "undisturbed", None)
    assert lines(tmp_path / "run") == lines(tmp_path / "undisturbed")
    assert export(tmp_path / "run") == export(tmp_path / "undisturbed")


def test_a_stop_between_two_log_lines_loses_nothing(toy: Toy, tmp_path: Path, asked: Counter[str]) -> None:
    recipe = cached(toy, 12, train={"log_every": 100})
    with pytest.raises(Interrupted):
        go(recipe, tmp_path / "run", 4)
    go(recipe, tmp_path / "run", None, resume="auto")
    go(recipe, tmp_path / "replayed", None)
    assert asked["training"] == 2 * 12
    assert export(tmp_path / "replayed") == export(tmp_path / "run")
    with pytest.raises(Interrupted):
        go(recipe, tmp_path / "stopped", 4)
    with pytest.raises(InputError, match=r"teacher\.cache: True -> False"):  # the rounding changes what is learned
        go(cached(toy, 12, teacher={"cache": False}, train={"log_every": 100}), tmp_path / "stopped", None, "auto")


def test_a_longer_run_lengthens_the_file(toy: Toy, tmp_path: Path) -> None:
    go(cached(toy, 6), tmp_path / "short", None)
    (file,) = files()
    before = file.read_bytes()
    go(cached(toy, 8), tmp_path / "long", None)
    assert files() == [file]
    assert file.stat().st_size == 2 * len(before)
    assert file.read_bytes()[: len(before)] == before
    assert hits(tmp_path / "long") == [1.0] * 6 + [0.0] * 2
    go(cached(toy, 6), tmp_path / "short-again", None)
    assert file.stat().st_size == 2 * len(before)
    assert hits(tmp_path / "short-again") == [1.0] * 6


def test_a_damaged_file_changes_nothing(
    toy: Toy, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("distill"), "propagate", True)
    recipe = cached(toy, 6)
    go(recipe, tmp_path / "recorded", None)
    (file,) = files()
    good = file.read_bytes()
    damaged = bytearray(good)
    for place in range(5, len(damaged), 97):
        damaged[place] ^= 1 << place % 8
    file.write_bytes(damaged)
    go(recipe, tmp_path / "again", None)
    assert 0.8 < np.mean(hits(tmp_path / "again")) < 1.0
    assert lines(tmp_path / "again") == lines(tmp_path / "recorded")
    assert file.read_bytes() == good
    assert sum("damaged, first seen in epoch 0" in message for message in caplog.messages) == 1


# What makes a miss


def changed(toy: Toy, tmp_path: Path, name: str) -> Iterator[Recipe]:
    """Recipes that differ from the toy in what its teacher is, or is shown."""
    if name == "weights":
        state = torch.load(toy.teacher)
        state["linear.bias"] += 1e-3
        torch.save(state, tmp_path / "teacher.pth")
        yield cached(toy, teacher={"weights": str(tmp_path / "teacher.pth")})
    elif name == "contract":
        yield cached(toy, teacher={"mean": [0.5, 0.5, 0.5]})
        yield cached(toy, teacher={"mean": [0.5, 0.5, 0.500001]})
        yield cached(toy, teacher={"size": 16})
        yield cached(toy, teacher={"size": 16, "interpolation": "bilinear"})
    elif name == "augmentation":
        changes = {"hflip": False, "mixup": 0.81, "cutmix": 0.0, "random_erasing": 0.24, "crop_padding": 2}
        for key, value in changes.items():
            yield cached(toy, data={"augment": toy.mapping()["data"]["augment"] | {key: value}})
    elif name == "seed":
        yield cached(toy, seed=1)
    elif name == "precision":
        yield cached(toy, train={"precision": "bf16"})
    elif name == "data":
        tensors = load_file(toy.root / "toy.safetensors")
        tensors["train.images"][5, 0, 0, 0] ^= 1
        write_packed(tmp_path / "toy.safetensors", name="toy", class_names=tuple("abcd"), tensors=tensors)
        yield cached(toy, data={"root": str(tmp_path)})
    elif name == "split":
        yield cached(toy, data={"validation": 0.0})
        yield cached(toy, data={"validation": 0.24})
        yield cached(toy, data={"validation": 0.0, "select_on": "test"})


def cache_of(recipe: Recipe, steps: int = 8) -> TeacherCache:
    """Not started yet."""
    accelerator = build_accelerator(recipe.train, Path())
    dataset = open_data(recipe, accelerator)
    teacher = build_teacher(recipe, dataset, accelerator)
    plan = BatchPlan(seed=recipe.seed, batch_size=recipe.train.batch_size)
    cache = open_cache(recipe, teacher, dataset, accelerator, steps=steps, plan=plan)
    assert cache is not None
    return cache


@DEVICES
def test_logits_are_replayed_without_waiting_for_the_device(toy: Toy, device: str) -> None:
    """From pinned memory on a GPU; all of a micro-batch, or a part of it beside new ones."""
    cache = cache_of(cached(toy))
    cache.start()
    computed = torch.randn(24, 4, generator=torch.Generator().manual_seed(0)).to(device)
    recorded = cache.logits(0, slice(0, 16), lambda: computed[:16])
    assert torch.equal(recorded, computed[:16].half().float())
    cache.flush()
    if device == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    try:
        replayed = cache.logits(0, slice(0, 16), lambda: computed[:16] + 1)
        partly = cache.logits(0, slice(8, 24), lambda: computed[8:] + 1)
    finally:
        if device == "cuda":
            torch.cuda.set_sync_debug_mode("default")
    assert replayed.device.type == device
    assert torch.equal(replayed, recorded)
    assert torch.equal(partly[:8], recorded[8:])
    assert torch.equal(partly[8:], (computed[16:] + 1).half().float())


@pytest.mark.parametrize("name", ["weights", "contract", "augmentation", "seed", "split", "precision", "data"])
def test_a_change_of_what_the_teacher_is_or_sees_is_another_key(toy: Toy, tmp_path: Path, name: str) -> None:
    keys = [cache_of(recipe).file.key for recipe in (cached(toy), *changed(toy, tmp_path, name))]
    assert len(keys) > 1
    assert len(set(keys)) == len(keys)
    assert keys[0] == cache_of(cached(toy)).file.key


def _edit(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    for key, value in changes.items():
        arguments = config["model_args"]
        sections = (arguments, arguments.get("attention", {}))
        section = next((section for section in sections if key in section), arguments)
        (config if key.startswith("label_") else section)[key] = value
    (folder / "config.json").write_text(json.dumps(config))


@pytest.fixture
def areas(toy: Toy, tmp_path: Path) -> Path:
    """An exported student with areas as teacher."""
    spec = student_options(
        model="vit_nano", patch_size=2, distillation_token=False,
        attention={"kind": "area", "max_area": [2, 2], "blocks": "all"},
    )  # fmt: skip
    student = build_student(
        spec, resolution=8, num_classes=4, channels=3, mean=(0.5, 0.5, 0.5), std=(0.2, 0.2, 0.2), seed=0
    )
    with torch.no_grad():
        student.model.head.weight.normal_(std=0.2)
    write_export(student.eval(), tmp_path / "areas", class_names=[*"abcd"], metadata={}, readme="")
    return tmp_path / "areas"


def _key_of_folder(toy: Toy, folder: Path) -> str:
    return cache_of(cached(toy, teacher={"model": f"local-dir:{folder}", "weights": None})).file.key


@pytest.mark.parametrize(
    "edit",
    [{"value_mode": "mean"}, {"max_area": [1, 2]}, {"top_k": 3}, {"key_mode": "max"},
     {"label_names": ["b", "a", "c", "d"]}],
)  # fmt: skip
def test_an_edited_folder_is_another_key(toy: Toy, areas: Path, edit: Mapping) -> None:
    """Settings that neither the weights nor the layers' descriptions show."""
    before = _key_of_folder(toy, areas)
    _edit(areas, **edit)
    assert _key_of_folder(toy, areas) != before


def test_what_changes_no_answer_is_no_other_key(toy: Toy, areas: Path) -> None:
    before = _key_of_folder(toy, areas)
    _edit(areas, label_descriptions={"a": "the first"})
    assert _key_of_folder(toy, areas.rename(areas.with_name("moved"))) == before


def test_another_pooling_is_another_key(toy: Toy, tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = timm.create_model("test_resnet", num_classes=4)
    save_file({key: value.clone() for key, value in network.state_dict().items()}, tmp_path / "model.safetensors")
    inputs = {"input_size": [3, 64, 64], "mean": [0.5] * 3, "std": [0.2] * 3, "interpolation": "bilinear"}
    config = {"architecture": "test_resnet", "num_classes": 4, "model_args": {}, "pretrained_cfg": inputs}
    (tmp_path / "config.json").write_text(json.dumps(config))
    before = _key_of_folder(toy, tmp_path)
    _edit(tmp_path, global_pool="max")
    assert _key_of_folder(toy, tmp_path) != before


def test_the_digest_of_answers_is_of_the_network_not_of_the_machine(toy: Toy) -> None:
    teacher, images = load_teacher({"model": "cifar_resnet20", "weights": str(toy.teacher)}, 4), torch.rand(2, 3, 8, 8)
    answers, digest = teacher(images), teacher_cache.answers_digest(teacher, images)
    assert torch.equal(teacher(images), answers)  # it is not changed by it
    nearly = teacher.under(replace(teacher.contract, mean=tuple(value + 1e-12 for value in teacher.contract.mean)))
    assert teacher_cache.answers_digest(nearly, images) == digest
    other = teacher.under(replace(teacher.contract, mean=tuple(value + 1e-2 for value in teacher.contract.mean)))
    assert teacher_cache.answers_digest(other, images) != digest
    in_half = teacher.with_weights_in(torch.bfloat16)  # computes in float32 only within autocast
    assert len(teacher_cache.answers_digest(in_half, images)) == 64


def test_what_the_teacher_does_not_see_is_not_in_the_key(toy: Toy) -> None:
    others = [
        cached(toy, name="other", student={"model": "vit_micro"}, label_weight=0.1, optim={"lr": 1e-4}, control=True),
        cached(toy, train={"batch_size": 32, "gradient_accumulation": 1, "epochs": 50, "ema": None}),
        cached(toy, distill=[{"method": "hard"}], teacher={"min_accuracy": 0.1, "weight": 3.0}),
    ]
    assert {cache_of(recipe).file.key for recipe in others} == {cache_of(cached(toy)).file.key}


def test_the_number_of_threads_is_not_in_the_key(toy: Toy) -> None:
    augment = {"crop_padding": 0, "random_resized_crop": {}, "hflip": True, "random_erasing": 1.0, "mixup": 0.8}
    recipe = cached(toy, data={"resolution": 8, "augment": augment})
    keys = set()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        keys.add(cache_of(recipe).file.key)
    assert len(keys) == 1


def test_changed_code_of_the_augmentation_or_of_the_network_is_another_key(
    toy: Toy, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = cached(toy)
    keys = [cache_of(recipe).file.key]
    call = Augmenter.__call__

    def brighter(augmenter: Augmenter, *arguments: Any, **names: Any) -> tuple[Tensor, Tensor]:
        images, targets = call(augmenter, *arguments, **names)
        return (images * (1 + 2**-20)).clamp(0, 1), targets

    monkeypatch.setattr(Augmenter, "__call__", brighter)
    keys.append(cache_of(recipe).file.key)
    monkeypatch.undo()
    monkeypatch.setattr(torch.nn.Conv2d, "extra_repr", lambda self: f"{self.stride}, another padding")
    keys.append(cache_of(recipe).file.key)
    monkeypatch.undo()
    monkeypatch.setattr(teacher_cache, "__version__", "another")
    keys.append(cache_of(recipe).file.key)
    assert len(set(keys)) == 4


def test_another_teacher_is_never_a_hit(toy: Toy, tmp_path: Path) -> None:
    go(cached(toy, 2), tmp_path / "one", None)
    (recipe,) = changed(toy, tmp_path, "weights")
    go(recipe, tmp_path / "other", None)
    assert hits(tmp_path / "other") == [0.0] * 8
    assert len(files()) == 2
    one, other = files()
    shutil.copy(one, other)  # even where its file takes the other's place
    for name in ("first", "second"):
        go(cached(toy, 2), tmp_path / name, None)
        go(recipe, tmp_path / f"{name}-other", None)
    assert {len(set(hits(tmp_path / name))) for name in ("first", "second")} == {1}
    assert lines(tmp_path / "first-other") == lines(tmp_path / "second-other") == lines(tmp_path / "other")


# The file


CLASSES = 7


@pytest.fixture
def full(tmp_path: Path) -> tuple[LogitFile, np.ndarray]:
    """A file of 4 epochs of 100 samples with all records, and what is in them."""
    generator = np.random.default_rng(0)
    logits = generator.normal(0, 5, (4, 100, CLASSES)).astype(np.float16)
    file = LogitFile(tmp_path / "a" / "b.logits", "key", epochs=4, samples=100, classes=CLASSES)
    assert file.missing == file.size == 4 * 100 * (4 + 2 * CLASSES)
    file.make("of what")
    assert file.missing == 0
    file.open()
    assert not any(file.read(epoch, slice(0, 100))[1].any() for epoch in range(4))
    file.write([(epoch, start, logits[epoch, start : start + 25]) for epoch in range(4) for start in range(0, 100, 25)])
    return file, logits


def found_in(file: LogitFile, expected: np.ndarray) -> np.ndarray:
    """Which records are there, bool [epochs, samples]; those that are have the expected logits."""
    found = np.zeros(expected.shape[:2], bool)
    for epoch, logits in enumerate(expected):
        stored, found[epoch] = file.read(epoch, slice(0, len(logits)))
        assert (stored[found[epoch]] == logits[found[epoch]]).all()
    return found


def test_every_flipped_bit_and_every_torn_record_is_missing(full: tuple[LogitFile, np.ndarray]) -> None:
    file, logits = full
    assert found_in(file, logits).all()
    size = 4 + 2 * CLASSES
    good = file.path.read_bytes()
    generator = np.random.default_rng(1)
    for count in (1, 200):
        for trial in range(20):
            damaged = bytearray(good)
            places = generator.integers(0, len(good), count)
            for place in places:
                damaged[place] ^= 1 << generator.integers(0, 8)
            file.path.write_bytes(damaged)
            expected = np.array([damaged[i : i + size] == good[i : i + size] for i in range(0, len(good), size)])
            assert (found_in(file, logits) == expected.reshape(4, 100)).all(), (count, trial)
    for cut in range(1, size):  # the beginning or the end of a record that was being written when the machine stopped
        for torn in (good[:cut] + bytes(size - cut), bytes(cut) + good[cut:size]):
            file.path.write_bytes(torn + good[size:])
            assert found_in(file, logits).sum() == 399 or torn == good[:size]


def test_a_record_elsewhere_or_under_another_key_is_missing(full: tuple[LogitFile, np.ndarray]) -> None:
    file, logits = full
    size, good = 4 + 2 * CLASSES, file.path.read_bytes()
    epoch = 100 * size
    file.path.write_bytes(good[size:] + good[:size])  # all of them by one place
    assert not found_in(file, logits).any()
    file.path.write_bytes(good[epoch:] + good[:epoch])  # by one epoch
    assert not found_in(file, logits).any()
    file.path.write_bytes(good)
    assert found_in(file, logits).all()
    other = LogitFile(file.path, "another", epochs=4, samples=100, classes=CLASSES)
    other.open()
    assert not found_in(other, logits).any()


def test_a_file_that_vanishes_is_not_written_and_ends_nothing(
    full: tuple[LogitFile, np.ndarray], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("distill"), "propagate", True)
    file, logits = full
    file.path.unlink()
    for _ in range(2):
        file.write([(0, 0, logits[0])])
    assert not file.path.exists()
    assert sum("nothing more is stored" in message for message in caplog.messages) == 1
    elsewhere = LogitFile(file.path, "key", epochs=4, samples=100, classes=CLASSES)
    elsewhere.open()  # a machine that does not see it
    elsewhere.write([(0, 0, logits[0])])
    assert not elsewhere.read(0, slice(0, 100))[1].any()
    assert not file.path.exists()


def test_no_room_is_said_before_anything_is_made(toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(InputError, match=r"teacher-cache/\w+\.logits needs 2,304 bytes, and 1,000 are free"):
        go(cached(toy), tmp_path / "run", None)
    assert sorted(child.name for child in tmp_path.iterdir()) == []
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=2304))
    go(cached(toy), tmp_path / "run", None)
    assert files()[0].stat().st_size == 2304


def test_a_disk_that_fills_up_meanwhile_leaves_no_half_file(
    full: tuple[LogitFile, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fill_up(descriptor: int, start: int, size: int) -> None:
        os.ftruncate(descriptor, size // 2 + 1000)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", fill_up, raising=False)
    file, logits = full
    longer = LogitFile(file.path, "key", epochs=7, samples=100, classes=CLASSES)
    with pytest.raises(InputError, match=r"b\.logits of 12,600 bytes cannot be created \(No space left on device\)"):
        longer.make("")
    assert file.path.stat().st_size == file.size
    assert found_in(file, logits).all()
    file.path.unlink()
    with pytest.raises(InputError, match="No space left"):
        longer.make("")
    assert [child.name for child in file.path.parent.iterdir()] == ["b.json"]  # of the file that was there first


def test_a_folder_that_cannot_be_written_serves_what_it_has(
    full: tuple[LogitFile, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    file, logits = full
    again = LogitFile(file.path, "key", epochs=4, samples=100, classes=CLASSES)
    again.make("")
    again.open()
    assert found_in(again, logits).all()
    longer = LogitFile(file.path, "key", epochs=5, samples=100, classes=CLASSES)
    with pytest.raises(InputError, match=r"cannot be created \(Permission denied\)"):
        longer.make("")


# What is learned from


def test_a_micro_batch_that_is_partly_there_keeps_what_is_there(toy: Toy) -> None:
    cache = cache_of(cached(toy))
    before = torch.randn(4, 4)
    assert torch.equal(cache.logits(0, slice(0, 4), lambda: before), before.half().float())
    assert cache.file.read(0, slice(0, 4))[1].sum() == 0  # not started: nothing is kept
    cache.flush()
    cache.start()
    first, second = torch.randn(8, 4), torch.randn(8, 4)
    assert torch.equal(cache.logits(1, slice(4, 12), lambda: first), first.half().float())
    cache.flush()
    mixed = cache.logits(1, slice(0, 8), lambda: second)
    assert mixed.dtype == torch.float32
    assert torch.equal(mixed, torch.cat([second[:4], first[:4]]).half().float())
    cache.flush()
    assert torch.equal(cache.logits(1, slice(0, 8), lambda: pytest.fail("all there")), mixed)
    assert cache.take_hits() == (4 + 8) / (4 + 8 + 8 + 8)
    assert cache.recorded() == 12 / 128  # of 8 steps of 16


def test_logits_beyond_half_precision_are_its_largest(toy: Toy) -> None:
    cache = cache_of(cached(toy))
    cache.start()
    wild = torch.tensor([[1e6, -1e6, 65_519.0, 1e-9], [-1e9, float("-inf"), 65_504.0, 0.0]])
    expected = torch.tensor([[65_504.0, -65_504.0, 65_504.0, 0.0], [-65_504.0, -65_504.0, 65_504.0, 0.0]])
    assert torch.equal(cache.logits(0, slice(0, 2), lambda: wild), expected)
    cache.flush()
    assert torch.equal(cache.logits(0, slice(0, 2), lambda: pytest.fail("all there")), expected)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_rows_that_are_no_numbers_stay_that_and_are_not_stored(toy: Toy, value: float) -> None:
    cache = cache_of(cached(toy))
    cache.start()
    answers = torch.tensor([[1.0, 2.0, 3.0, 4.0], [value, 0.0, 1.0, 2.0], [0.0, 0.5, 0.0, 0.0]])
    assert cache.logits(0, slice(0, 3), lambda: answers).isnan().any(1).tolist() == [False, True, False]
    cache.flush()
    assert cache.file.read(0, slice(0, 3))[1].tolist() == [True, False, True]


def test_much_that_is_new_is_written_before_the_next_line_of_metrics(toy: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(teacher_cache, "PENDING_BYTES", 100)
    cache = cache_of(cached(toy))
    cache.start()
    for start in (0, 8):
        cache.logits(0, slice(start, start + 8), lambda: torch.ones(8, 4))
    assert cache.file.read(0, slice(0, 16))[1].all()


# What is refused, and the dry run


def test_recipes_that_cannot_have_a_cache(toy: Toy) -> None:
    with pytest.raises(InputError, match=r"teacher\.cache: without distillation there is nothing to store"):
        cached(toy, distill=[])
    plain = {"model": "cifar_resnet20"}
    with pytest.raises(InputError, match=r"teacher\.1\.cache: .* the same for all"):
        cached(toy, teacher=[plain | {"cache": True}, plain])


def test_data_in_their_readers_order_have_no_cache(toy: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
    sequential = SequentialDataset.__new__(SequentialDataset)
    monkeypatch.setattr(pipeline, "open_dataset", lambda *arguments, **names: sequential)
    recipe = cached(toy)
    accelerator = build_accelerator(recipe.train, Path())
    with pytest.raises(InputError, match=r"teacher\.cache: 'toy\.safetensors' is read in its reader's order"):
        open_data(recipe, accelerator)
    assert open_data(cached(toy, teacher={"cache": False}), accelerator) is sequential


def test_a_dry_run_says_the_size_and_makes_nothing(
    toy: Toy, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = cached(toy)
    api.dry_run(recipe)
    printed = " ".join(capsys.readouterr().out.split())
    assert "cache runs/teacher-cache/" in printed
    assert ".logits, 0.0 MB, of which 0.0 MB are missing" in printed
    assert list(tmp_path.iterdir()) == []
    first = float(printed.rsplit("loss ", 1)[1])
    go(recipe, tmp_path / "run", None)
    assert first == pytest.approx(lines(tmp_path / "run")[0]["loss"], abs=1e-4)
