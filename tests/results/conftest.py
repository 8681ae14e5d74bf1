"""Finished runs of the arms, made of random logits, as the real command leaves them on somebody's machine."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from distill.files.checksum import CHECKSUM
from distill.files.tensors import write_tensors
from results.arms import load_arm

SAMPLES, CLASSES, EPOCHS = 200, 10, 4
TEACHER_SHA = "ab" * 32
HOME = "/home/somebody/project"
MakeCell = Callable[..., Path]


@pytest.fixture
def make_cell(tmp_path: Path) -> MakeCell:
    """A finished run of an arm under a seed, `strength` of the right class in its logits, at tmp_path/there/<path>."""

    def make(name: str, seed: int, strength: float = 1.0, *, path: str | None = None, **events: Any) -> Path:
        folder = tmp_path / "there" / (path or f"run-{name}-{seed}")
        (folder / "checkpoints").mkdir(parents=True)
        given = [f"data.root={HOME}/data"]
        recipe = load_arm(name, seed, given)
        if recipe.teachers and recipe.teachers[0].model is not None:
            recipe = load_arm(name, seed, [*given, f"teacher.weights={HOME}/w/teacher.th"])
        (folder / "resolved.yaml").write_text(recipe.to_yaml())
        labels = np.random.default_rng(0).integers(0, CLASSES, SAMPLES)
        draw = np.random.default_rng([seed, *map(ord, name)])
        outputs = {head: draw.normal(size=(SAMPLES, CLASSES)) for head in ("student.cls", "student.dist")}
        for logits in outputs.values():
            logits[np.arange(SAMPLES), labels] += strength
        outputs["student.fused"] = (outputs["student.cls"] + outputs["student.dist"]) / 2
        if recipe.teachers:
            outputs["teacher"] = np.random.default_rng(1).normal(size=(SAMPLES, CLASSES))
            outputs["teacher"][np.arange(SAMPLES), labels] += 3
        tensors = {key: torch.from_numpy(value).float() for key, value in outputs.items()}
        labelled = {"labels": torch.from_numpy(labels), **tensors}
        write_tensors(folder / "predictions.safetensors", labelled, {"data": "d" * 64, CHECKSUM: ""})
        status = {
            "state": "finished", "reason": None, "step": 10 * EPOCHS, "epoch": EPOCHS, "data_digest": "d" * 64,
            "teacher_weights": {f"{HOME}/w/teacher.th": "12" * 32}, "parameters": {"student": 684_404},
            "exported": {"step": 10 * EPOCHS, "weights": "ema"}, "metrics": {"student/top1": 12.5},
        }  # fmt: skip
        (folder / "status.json").write_text(json.dumps(status))
        environment = {
            "command": ["distill/train.py", f"{HOME}/x.yaml", f"data.root={HOME}/data"], "host": "myhost",
            "platform": "Linux-6.1-myhost", "python": "3.11.7", "device": "cpu", "device_name": "A CPU",
            "precision": "bf16", "threads": 1, "commit": "c" * 40,
        }  # fmt: skip
        (folder / "environment.json").write_text(json.dumps(environment))
        lines = metrics_lines(bool(recipe.teachers), **events)
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        return folder

    return make


def metrics_lines(
    taught: bool, *, epochs: int = EPOCHS, weights: str = "aa", batch: str = "bb"
) -> list[dict[str, Any]]:
    """Ten steps an epoch, one a second."""
    lines: list[dict[str, Any]] = [{"event": "start", "step": 0, "epoch": 0, "initial_weights": weights, "steps": 40}]
    if taught:
        described = f"local-dir:{HOME}/runs/t/export: 0.27 M parameters"
        lines.append({"event": "preflight", "step": 0, "epoch": 0, "teacher": described, "teacher_sha256": TEACHER_SHA})
    for epoch in range(epochs):
        lines.append({"event": "epoch", "step": 10 * epoch, "epoch": epoch, "batch": f"{batch}{epoch}"})
        for part in (5, 10):
            step = 10 * epoch + part
            lines.append({"event": "train", "step": step, "epoch": step / 10, "loss": float(part), "lr": 1e-3})
        for kind in ("raw", "ema"):
            accuracy = 40.0 + epoch + (kind == "ema")
            lines.append(
                {"event": "eval", "step": 10 * epoch + 10, "epoch": epoch + 1, "split": "validation", "weights": kind}
                | {"student/top1": accuracy}
            )
        lines.append({"event": "checkpoint", "step": 10 * epoch + 10, "epoch": epoch + 1, "path": "checkpoints/x"})
    lines.append({"event": "eval", "step": 10 * epochs, "epoch": epochs, "split": "test", "student/top1": 12.345678})
    timed = [line | {"time": 1000.0 + line["step"]} for line in lines]
    return [*timed, {"event": "control", "step": 10 * epochs, "epoch": epochs, "time": 9000.0}]
