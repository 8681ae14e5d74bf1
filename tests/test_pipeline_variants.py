"""Whole runs of other kinds: other students, teachers, data and ways of training, in two or three steps each."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file

import distill.exports.folder
from distill import run
from distill.data.packed import write_packed
from distill.recipe import from_mapping
from tests.conftest import Toy, some
from tests.test_resume import go

HEADS = {"student.cls", "student.dist", "student.fused"}
PLAIN_VIT = {"model": "vit_nano", "patch_size": 4, "drop_path": 0.0}


@pytest.fixture(autouse=True)
def without_the_fresh_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distill.exports.folder, "_compare_with_reloaded", lambda *args: None)


def finish(toy: Toy, out: Path, **changes: Any) -> list[dict[str, float]]:
    """Run the toy recipe with `changes` to its end, two steps unless they say more; returns its lines of training."""
    raw = toy.mapping()
    train = raw["train"] | {"max_steps": 2, "ema": None, "gradient_accumulation": 1} | changes.pop("train", {})
    for section in ("student", "teacher"):
        raw[section] = changes.pop(section, raw[section])
    raw["data"] |= changes.pop("data", {})
    go(from_mapping(raw | {"train": train} | changes, default_name="toy"), out, None)
    assert run.read_status(out)["state"] == "finished"
    lines = list(run.read_metrics(out, "train"))
    assert len(lines) == train["max_steps"]
    assert all(np.isfinite(line["loss"]) for line in lines)
    return lines


def losses(lines: list[dict[str, float]]) -> list[float]:
    return [line[key] for line in lines for key in ("loss", "loss/label", "loss/hard", "loss/soft")]


# Teachers


def test_an_ensemble(toy: Toy, tmp_path: Path) -> None:
    weights = tmp_path / "other.pth"
    torch.manual_seed(1)
    torch.save(timm.create_model("cifar_resnet20", num_classes=4).state_dict(), weights)
    one = toy.mapping()["teacher"]
    two = one | {"weights": str(weights), "weight": 3.0, "size": 16}
    finish(toy, tmp_path / "both", teacher=[one, two])
    parts = []
    for name, teacher in (("one", one), ("two", two)):
        finish(toy, tmp_path / name, teacher=teacher, train={"max_steps": 1})
        parts.append(load_file(tmp_path / name / "predictions.safetensors")["teacher"].double().softmax(1))
    together = load_file(tmp_path / "both" / "predictions.safetensors")["teacher"].double().softmax(1)
    torch.testing.assert_close(together, (parts[0] + 3 * parts[1]) / 4, rtol=0, atol=1e-6)
    status, (preflight,) = run.read_status(tmp_path / "both"), run.read_metrics(tmp_path / "both", "preflight")
    assert status["parameters"]["teacher"] == 2 * run.read_status(tmp_path / "one")["parameters"]["teacher"]
    assert "ensemble of 2: 0.25 x" in preflight["teacher"]


# Students


def exported_answers(out: Path, images: torch.Tensor) -> torch.Tensor:
    model = timm.create_model(f"local-dir:{out / 'export'}", pretrained=True).eval()
    config = model.pretrained_cfg
    mean, std = (torch.tensor(config[key]).view(1, -1, 1, 1) for key in ("mean", "std"))
    size = config["input_size"][-1]
    resized = torch.nn.functional.interpolate(images, (size, size), mode="bicubic").clamp(0, 1)
    with torch.no_grad():
        return model((resized - mean) / std)


@pytest.mark.parametrize(
    ("student", "resolution", "heads"),
    [
        ({"model": "cifar_resnet20"}, 8, {"student.cls", "student.fused"}),
        ({"model": "vit_tiny_patch16_224", "drop_path": 0.1}, 32, {"student.cls", "student.fused"}),
        ({"model": "levit_128s"}, 32, HEADS),
        ({"model": "deit_tiny_distilled_patch16_224"}, 32, HEADS),
    ],
    ids=lambda value: value["model"] if isinstance(value, dict) else None,
)
def test_students_of_timm(toy: Toy, tmp_path: Path, student: dict[str, Any], resolution: int, heads: set[str]) -> None:
    out = tmp_path / "run"
    lines = finish(toy, out, student=student, data={"resolution": resolution}, train={"ema": 0.5})
    assert all(line.keys() >= {"loss/label", "loss/hard", "loss/soft"} for line in lines)
    found = load_file(out / "predictions.safetensors")
    assert found.keys() == heads | {"labels", "teacher"}
    if "student.dist" in heads:
        assert not torch.equal(found["student.cls"], found["student.dist"])
    images = load_file(toy.root / "toy.safetensors")["test.images"].float() / 255
    torch.testing.assert_close(found["student.fused"], exported_answers(out, images), rtol=0, atol=1e-5)


# Data


def test_greyscale_data_with_a_teacher_of_colour(toy: Toy, tmp_path: Path) -> None:
    colour = load_file(toy.root / "toy.safetensors")
    grey = {key: value[:, :1].contiguous() if "images" in key else value for key, value in colour.items()}
    write_packed(tmp_path / "grey.safetensors", name="grey", class_names=("a", "b", "c", "d"), tensors=grey)
    finish(toy, tmp_path / "run", data={"name": "grey.safetensors", "root": str(tmp_path)})
    model = timm.create_model(f"local-dir:{tmp_path / 'run' / 'export'}", pretrained=True)
    assert tuple(model.pretrained_cfg["input_size"]) == (1, 8, 8)
    # The teacher sees the same channel three times, as if the images had been saved in colour.
    repeated = {key: value.repeat(1, 3, 1, 1) if "images" in key else value for key, value in grey.items()}
    write_packed(tmp_path / "three.safetensors", name="three", class_names=("a", "b", "c", "d"), tensors=repeated)
    finish(toy, tmp_path / "again", data={"name": "three.safetensors", "root": str(tmp_path)}, train={"max_steps": 1})
    one, three = (load_file(tmp_path / name / "predictions.safetensors")["teacher"] for name in ("run", "again"))
    torch.testing.assert_close(one, three, rtol=0, atol=1e-5)


def test_a_streamed_image_folder(toy: Toy, tmp_path: Path) -> None:
    images = load_file(toy.root / "toy.safetensors")
    for split in ("train", "test"):
        for index in range(40 if split == "train" else 13):
            label = int(images[f"{split}.labels"][index])
            file = tmp_path / "set" / split / "abcd"[label] / f"{index:03}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(images[f"{split}.images"][index].permute(1, 2, 0).numpy()).save(file)
    data = {"name": "folder", "root": str(tmp_path / "set"), "stream": True, "workers": 1}
    streamed = finish(toy, tmp_path / "stream", data=data, train={"max_steps": 3, "batch_size": 8})
    assert not list((tmp_path / "set").glob("*.safetensors")), "nothing is packed"
    labels = load_file(tmp_path / "stream" / "predictions.safetensors")["labels"].tolist()
    assert labels == sorted(images["test.labels"][:13].tolist())
    assert len({line["loss"] for line in streamed}) == 3


# Training


def test_accumulation_and_checkpointing_change_no_loss(toy: Toy, tmp_path: Path) -> None:
    ways = [{}, {"gradient_accumulation": 4}, {"gradient_checkpointing": True}]
    found = [
        losses(finish(toy, tmp_path / str(index), student=PLAIN_VIT, train={"max_steps": 8, **way}))
        for index, way in enumerate(ways)
    ]
    assert found[1] == pytest.approx(found[0], abs=1e-5)
    assert found[2] == pytest.approx(found[0], abs=1e-5)
    assert len(set(found[0])) > 8


def test_checkpointing_changes_no_batch_statistics(toy: Toy, tmp_path: Path) -> None:
    weights = []
    for on in (False, True):
        train = {"max_steps": 2, "gradient_checkpointing": on, "log_gradient_share": on, "ema": None}
        finish(toy, tmp_path / str(on), student={"model": "resnet18"}, distill=[], teacher=None, train=train)
        weights.append(load_file(tmp_path / str(on) / "export" / "model.safetensors"))
    assert weights[0].keys() == weights[1].keys()
    for name, tensor in weights[0].items():
        torch.testing.assert_close(weights[1][name], tensor, rtol=1e-4, atol=1e-5, msg=name)


def test_checkpointing_draws_the_same_paths_to_drop(toy: Toy, tmp_path: Path) -> None:
    student = toy.mapping()["student"] | {"drop_path": 0.5}
    found = [
        losses(finish(toy, tmp_path / str(on), student=student, train={"max_steps": 3, "gradient_checkpointing": on}))
        for on in (False, True)
    ]
    assert found[1] == pytest.approx(found[0], abs=1e-5)


def test_layer_decay_slows_the_lower_layers(toy: Toy, tmp_path: Path) -> None:
    optim = {"name": "adamw", "lr": 1e-3, "warmup_epochs": 0, "weight_decay": 0.0, "clip_grad": None}
    moved = {}
    for decay in (None, 0.1):
        out = tmp_path / str(decay)
        (line,) = finish(toy, out, optim=optim | {"layer_decay": decay}, train={"max_steps": 1})
        assert line["lr"] == pytest.approx(1e-3), "the log has the peak, not a layer's"
        weights = load_file(out / "export" / "model.safetensors")
        moved[decay] = {name: weights[name] for name in ("patch_embed.proj.bias", "head.bias")}
    # AdamW's first step moves each weight by its learning rate: 1e-3 at the head, and 0.1 ** 7 of it below 6 blocks.
    assert moved[None]["head.bias"].abs().max() == pytest.approx(1e-3, rel=1e-3)
    assert moved[0.1]["head.bias"].abs().max() == pytest.approx(1e-3, rel=1e-3)
    assert moved[None]["patch_embed.proj.bias"].sub(moved[0.1]["patch_embed.proj.bias"]).abs().max() == pytest.approx(
        1e-3, rel=1e-2
    )


# What goes wrong


class Watch:
    """Looks at the run from outside after each step; fails at the one it is told to."""

    def __init__(self, path: Path, fail_at: int) -> None:
        self.path, self.left, self.states = path, fail_at, []  # type: ignore[var-annotated]

    def reason(self) -> None:
        self.states.append(run.read_status(self.path)["state"])
        # A record lock keeps out other processes, not the one that holds it.
        take = "import fcntl, sys; fcntl.lockf(open(sys.argv[1], 'r+'), fcntl.LOCK_EX | fcntl.LOCK_NB)"
        taken = subprocess.run([sys.executable, "-c", take, self.path / ".lock"], capture_output=True, check=False)
        assert taken.returncode != 0
        self.left -= 1
        if not self.left:
            raise RuntimeError("out of luck")


def test_a_failed_run_says_why_and_starts_again_without_a_checkpoint(toy: Toy, tmp_path: Path) -> None:
    recipe, out = from_mapping(toy.mapping(train={"max_steps": 3}), default_name="toy"), tmp_path / "run"
    watch = Watch(out, fail_at=2)
    with pytest.raises(RuntimeError, match="out of luck"):
        go(recipe, out, watch)
    assert watch.states == ["running", "running"]
    status = run.read_status(out)
    assert (status["state"], status["reason"]) == ("failed", "RuntimeError: out of luck")
    run.check_free(out)
    go(recipe, out, None, resume="auto")
    assert (run.read_status(out)["state"], run.read_status(out)["reason"]) == ("finished", None)
    assert len(list(run.read_metrics(out, "start"))) == 1
    assert [line["step"] for line in run.read_metrics(out, "train")] == [1, 2, 3]


# Trackers


def test_tensorboard_gets_all_that_the_metrics_have(toy: Toy, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    out = tmp_path / "run"
    finish(toy, out, train={"trackers": ["tensorboard"], "ema": 0.9, "max_steps": 7}, control=True)
    scalars: dict[str, list[tuple[int, float]]] = {}
    texts: dict[str, list[str]] = {}
    for folder in {path.parent for path in (out / "toy").rglob("events.out.tfevents.*")}:
        events = EventAccumulator(str(folder)).Reload()
        for tag in events.Tags()["scalars"]:
            scalars.setdefault(tag, []).extend((event.step, event.value) for event in events.Scalars(tag))
        for tag in events.Tags()["tensors"]:
            found = [event.tensor_proto.string_val[0].decode() for event in events.Tensors(tag)]
            texts.setdefault(tag.removesuffix("/text_summary"), []).extend(found)
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert {line["event"] for line in lines} == {
        "start",
        "preflight",
        "epoch",
        "train",
        "eval",
        "checkpoint",
        "control",
    }
    for line in lines:
        event, split, weights = line["event"], line.get("split"), line.get("weights")
        prefix = {"train": "", "eval": "test/" if split == "test" else f"{weights}/"}.get(event, f"{event}/")
        for key in line.keys() - {"event", "step", "epoch", "time"}:
            if isinstance(line[key], str):
                assert line[key] in texts[f"{prefix}{key}"]
            else:
                values = [value for _, value in scalars[f"{prefix}{key}"]]
                assert any(value == pytest.approx(line[key]) for value in values), (prefix, key)
    # The best step may be an earlier one; W&B drops what is logged for a step before the last.
    assert [step for step, _ in scalars["test/student/top1"]] == [7]
    assert max(step for step, _ in scalars["epoch"]) == 7


@pytest.mark.parametrize(
    ("every", "steps", "expected"),
    some(
        [
            (100, 8, [6, 8]),
            (7, None, [6, 7, 14]),
            (100, None, [6, 12, 18]),
            (4, None, [4, 8, 12, 16]),
            (1, 3, [1, 2, 3]),
        ],
        0,
        1,
    ),
)
def test_every_epoch_has_a_line_of_metrics(
    toy: Toy, tmp_path: Path, every: int, steps: int | None, expected: list[int]
) -> None:
    """Of three epochs of six steps; with the shares of the gradients, which are measured for a line."""
    train = toy.mapping()["train"] | {"log_every": every, "max_steps": steps, "log_gradient_share": True}
    go(from_mapping(toy.mapping(train=train), default_name="toy"), tmp_path / "run", None)
    lines = list(run.read_metrics(tmp_path / "run", "train"))
    assert [line["step"] for line in lines] == expected
    assert all("gradient_share/soft" in line for line in lines)
