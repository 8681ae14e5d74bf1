"""Run directories made of random logits, as a finished run leaves them."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.numpy import save_file

from distill.files.checksum import CHECKSUM
from distill.files.tensors import write_tensors

SAMPLES, CLASSES = 40, 10
ALL_OUTPUTS = ("student.fused", "student.cls", "student.dist", "teacher")
DIGEST = "d1" * 32
NAMES = [f"class {index}" for index in range(CLASSES)]

MakeRun = Callable[..., Path]


def metrics_lines(epochs: int, *, select_on: str, ema: bool, teacher: bool) -> list[dict[str, Any]]:
    lines: list[dict[str, Any]] = [{"event": "preflight", "step": 0, "epoch": 0, "teacher/top1": 90.0}]
    for epoch in range(1, epochs + 1):
        for part in (0, 1):
            step = 2 * epoch - 1 + part
            lines.append(
                {"event": "train", "step": step, "epoch": step / 2, "loss": 2.0 / epoch + part, "loss/label": 1.0}
                | {"loss/soft": 0.5, "lr": 0.001 / epoch, "images_per_second": 100.0, "time": 10.0 * step}
            )
        for weights in ("raw", "ema") if ema else ("raw",):
            line = {"event": "eval", "step": 2 * epoch, "epoch": epoch, "split": select_on, "weights": weights}
            lines.append(
                line
                | {
                    "student/top1": 50.0 + epoch + (weights == "ema"),
                    "student.cls/top1": 49.0,
                    "student.dist/top1": 48.0,
                }
                | ({"teacher/top1": 91.5} if teacher else {})
            )
    lines.append(
        {"event": "eval", "step": 99, "epoch": epochs, "split": "test", "weights": "raw", "student/top1": 12.0}
    )
    return lines


def write_analysis(
    path: Path, draw: np.random.Generator, outputs: Sequence[str], *, data: str = DIGEST, latency: float = 0.00321
) -> None:
    """As `distill.analysis` leaves it: four pictures, two of them with the attention of three blocks."""
    counted = [*outputs, *(["agreement"] if "teacher" in outputs else [])]
    correct = {
        name: {output: draw.integers(0, SAMPLES, 6).tolist() for output in counted}
        for name in ("blur", "gaussian noise")
    }
    costs = {"flops": 3e7, "bytes": 3_046_248, "images_per_second": 1234.5, "latency_seconds": latency, "batch": 64}
    values = {
        "format": "1",
        "data": data,
        "device": "cpu",
        "costs": {"student": costs}
        | ({"teacher": {**costs, "flops": 8e7, "latency_seconds": latency / 2}} if "teacher" in outputs else {}),
        "robustness": {"images": SAMPLES, "correct": correct},
        "tokens": {"token_cosines": [0.06, 0.5, 0.8, 0.93]},
    }
    tensors = {f"validation.{name}": torch.from_numpy(draw.normal(size=(30, CLASSES))).float() for name in outputs}
    tensors["validation.labels"] = torch.from_numpy(draw.integers(0, CLASSES, 30))
    if "teacher" in outputs:
        tensors["pictures.indices"] = torch.tensor([3, 1, 7, 5])
        tensors["pictures.images"] = torch.from_numpy(draw.integers(0, 256, (4, 3, 8, 8), dtype=np.uint8))
        tensors["attention.indices"] = torch.tensor([3, 1])
        tensors["attention.images"] = tensors["pictures.images"][:2].clone()
        tensors["attention.patches"] = torch.from_numpy(draw.random((3, 2, 2, 4, 4))).half()
        mask = torch.zeros(2, 2, 2, 4, 4, dtype=torch.bool)
        mask[..., 0, 0, :2] = True  # a box
        mask[..., 1, 1, 3] = mask[..., 1, 2, 0] = True  # a run that goes around the end of a row
        tensors["attention.areas.0"] = mask
    write_tensors(path / "analysis.safetensors", tensors, {"format": "1", "data": data, CHECKSUM: ""})
    (path / "analysis.json").write_text(json.dumps(values))


@pytest.fixture
def make_run(tmp_path: Path) -> MakeRun:
    return run_maker(tmp_path)


@pytest.fixture(scope="session")
def three_runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two seeds of one recipe with controls, and another recipe with a name that finds no place to break a line."""
    make = run_maker(tmp_path_factory.mktemp("runs"))
    return [
        make("one", control=True, analysis=True, strength=2.0, recipe={"seed": 0, "name": "a"}),
        make("two", control=True, analysis=True, strength=2.5, seed=1, recipe={"seed": 1, "name": "b"}),
        make("unbreakable-" + "x" * 80, analysis=True, seed=2, recipe={"optim": {"lr": 1}}),
    ]


def run_maker(folder: Path) -> MakeRun:
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
        analysis: bool = False,
        status: dict[str, Any] | None = None,
        recipe: dict[str, Any] | None = None,
        environment: dict[str, Any] | None = None,
        described: str | None = None,
        latency: float = 0.00321,
        strength: float = 0.0,
    ) -> Path:
        """`strength`: of the right class in the logits, over noise of deviation 1; `described`: the teacher in the
        preflight.
        """
        path = folder / name
        path.mkdir(parents=True)
        draw = np.random.default_rng(seed)
        labels = np.random.default_rng(labels_seed).integers(0, CLASSES, SAMPLES)
        tensors = {key: draw.normal(size=(SAMPLES, CLASSES)).astype(np.float32) for key in outputs}
        for logits in tensors.values():
            logits[np.arange(SAMPLES), labels] += strength
        save_file({"labels": labels, **tensors}, path / "predictions.safetensors")
        teacher = "teacher" in outputs
        parameters = {"student": 684_404} | ({"teacher": 853_018} if teacher else {})
        known = {"state": "finished", "parameters": parameters, "data_digest": DIGEST}
        (path / "status.json").write_text(json.dumps(known | (status or {})))
        resolved = {"name": name, "data": {"select_on": select_on}} | (recipe or {})
        (path / "resolved.yaml").write_text(yaml.safe_dump(resolved))
        (path / "environment.json").write_text(json.dumps({"torch": "2.9.0"} | (environment or {})))
        lines = metrics_lines(epochs, select_on=select_on, ema=ema, teacher=teacher)
        if described is not None:
            lines[0]["teacher"] = described
        (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        if analysis:
            write_analysis(path, draw, outputs, latency=latency)
            (path / "export").mkdir()
            (path / "export" / "config.json").write_text(json.dumps({"label_names": NAMES}))
        if control:
            heads = [key for key in outputs if key != "teacher"]
            make(
                f"{name}/control", outputs=heads, seed=seed + 100, labels_seed=labels_seed, select_on=select_on,
                analysis=analysis, strength=strength / 2,
            )  # fmt: skip
        return path

    return make
