"""The line that a person pastes to go on."""

from __future__ import annotations

import os
import sys

import pytest

from distill.launching.launcher import training_command

RESUME = "r.yaml train.epochs=2 --resume 'my run'"
ACCELERATE = {"ACCELERATE_DYNAMO_BACKEND": "NO", "ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_USE_CPU": "False"}
TWO = {"TORCHELASTIC_RUN_ID": "none", "WORLD_SIZE": "2", "RANK": "1"}


@pytest.mark.parametrize(
    ("environment", "started", "command"),
    [
        ({}, ["/bin/distill", "train"], "distill train"),
        ({"ACCELERATE_USE_CPU": "true"}, ["/bin/distill", "train"], "ACCELERATE_USE_CPU=true distill train"),
        ({}, ["distill/train.py"], "distill train"),
        (ACCELERATE, ["distill/train.py"], "accelerate launch distill/train.py"),
        (ACCELERATE | {"ACCELERATE_USE_CPU": "True"}, ["distill/train.py"], "accelerate launch --cpu distill/train.py"),
        (
            ACCELERATE | TWO | {"ACCELERATE_MIXED_PRECISION": "bf16"},
            ["distill/train.py"],
            "accelerate launch --multi_gpu --num_processes 2 --mixed_precision bf16 distill/train.py",
        ),
        (
            TWO | {"ACCELERATE_USE_CPU": "true"},
            ["/bin/distill", "train"],
            "ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes 2 /bin/distill train",
        ),
    ],
)
def test_how_a_run_goes_on(
    environment: dict[str, str], started: list[str], command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in list(os.environ):
        if name.startswith(("ACCELERATE_", "TORCHELASTIC_")) or name in ("WORLD_SIZE", "RANK"):
            monkeypatch.delenv(name)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "argv", [*started, "r.yaml", "--out", "my run"])
    assert training_command(["r.yaml", "train.epochs=2", "--resume", "my run"]) == f"{command} {RESUME}"
