"""Run directories made of random logits, as a finished run leaves them."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from safetensors.numpy import save_file

SAMPLES, CLASSES = 40, 10
ALL_OUTPUTS = ("student.fused", "student.cls", "student.dist", "teacher")

MakeRun = Callable[..., Path]


def metrics_lines(epochs: int, *, select_on: str, ema: bool, teacher: bool) -> list[dict[str, Any]]:
    lines: list[dict[str, Any]] = [{"event": "preflight", "step": 0, "epoch": 0, "teacher/top1": 90.0}]
    for epoch in range(1, epochs + 1):
        for part in (0, 1):
            step = 2 * epoch - 1 + part
            lines.append(
                {"event": "train", "step": step, "epoch": step / 2, "loss": 2.0 / epoch + part, "loss/label": 1.0}
            )
        for weights in ("raw", "ema") if ema else ("raw",):
            line = {"event": "eval", "step": 2 * epoch, "epoch": epoch, "split": select_on, "weights": weights}
            lines.append(
                line | {"student/top1": 50.0 + epoch + (weights == "ema")} | ({"teacher/top1": 91.5} if teacher else {})
            )
    lines.append(
        {"event": "eval", "step": 99, "epoch": epochs, "split": "test", "weights": "raw", "student/top1": 12.0}
    )
    return lines


@pytest.fixture
def make_run(tmp_path: Path) -> MakeRun:
    def make(
        name: str = "run",
        *,
        outputs: Sequence[str] = ALL_OUTPUTS,
        seed: int = 0,
        labels_seed: int = 7,
        select_on: str = "validation",
        epochs: int = 4,
        ema: bool = False,
        control: bool = False,
        status: dict[str, Any] | None = None,
    ) -> Path:
        path = tmp_path / name
        path.mkdir(parents=True)
        draw = np.random.default_rng(seed)
        tensors = {key: draw.normal(size=(SAMPLES, CLASSES)).astype(np.float32) for key in outputs}
        labels = np.random.default_rng(labels_seed).integers(0, CLASSES, SAMPLES)
        save_file({"labels": labels, **tensors}, path / "predictions.safetensors")
        teacher = "teacher" in outputs
        parameters = {"student": 684_404} | ({"teacher": 853_018} if teacher else {})
        known = {"state": "finished", "parameters": parameters, "data_digest": "d1" * 32}
        (path / "status.json").write_text(json.dumps(known | (status or {})))
        (path / "resolved.yaml").write_text(yaml.safe_dump({"name": name, "data": {"select_on": select_on}}))
        (path / "environment.json").write_text(json.dumps({"torch": "2.9.0"}))
        lines = metrics_lines(epochs, select_on=select_on, ema=ema, teacher=teacher)
        (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        if control:
            heads = [key for key in outputs if key != "teacher"]
            make(f"{name}/control", outputs=heads, seed=seed + 100, labels_seed=labels_seed, select_on=select_on)
        return path

    return make
