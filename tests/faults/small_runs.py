"""Real runs of a second, and whether two of them ended alike."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import torch

from distill import checkpoint, run
from tests.conftest import Toy
from tests.faults.warm import Warm

SMALL = (
    "train.epochs=3", "train.batch_size=48", "train.gradient_accumulation=1", "train.keep_checkpoints=1",
    "teacher=null", "distill=[]",
)  # fmt: skip


def start(
    warm: Warm, toy: Toy, cwd: Path, *overrides: str, out: object = "run", **request: Any
) -> subprocess.CompletedProcess[str]:
    cwd.mkdir(exist_ok=True)
    return warm.run("train", toy.recipe, *SMALL, *overrides, "--out", out, "--resume", "auto", cwd=cwd, **request)


def described(out: Path) -> dict[str, Any]:
    """All that a finished run leaves, without times."""
    times = ("time", "images_per_second", "data_wait")
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    status = run.read_status(out)
    last = out / "checkpoints" / "last"
    return {
        "names": sorted(str(path.relative_to(out)) for path in out.rglob("*")),
        "links": [os.readlink(out / "checkpoints" / name) for name in ("last", "best")],
        "metrics": [
            {key: value for key, value in line.items() if key not in times}
            for line in lines
            if line["event"] != "resume"
        ],
        "status": {key: value for key, value in status.items() if key not in ("updated", "metrics", "seconds")},
        "files": [
            (out / name).read_bytes() for name in ("export/model.safetensors", "predictions.safetensors")
        ] + [(last / f"{stem}.safetensors").read_bytes() for stem in ("model", "ema")],
        "optimizer": [
            torch.as_tensor(value).tolist()
            for state in checkpoint.read_optimizer(last)["state"].values()
            for value in state.values()
        ],
    }  # fmt: skip


def same_end(cwd: Path, undisturbed: Path) -> None:
    found, expected = described(cwd / "run"), described(undisturbed / "run")
    for key in expected:
        assert found[key] == expected[key], (cwd, key)
