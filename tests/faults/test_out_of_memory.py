"""Out of memory, simulated and real: the run fails with settings that fit, on which it then goes on."""

from __future__ import annotations

import os
import re
import resource
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from distill import run
from distill.errors import RunFailed
from distill.evaluation import predict
from distill.launching.processes import build_accelerator
from distill.launching.ranks import Ranks
from distill.launching.signals import StopRequest
from distill.pipeline import open_data
from distill.students import Student
from distill.trainer import Trainer
from tests.conftest import Counted, Toy
from tests.test_step_speed import toy_recipe
from tests.warm import launch


def allow(images: int, checkpointed: int = 0, rank: int | None = None) -> None:
    """Let the student run out of memory with more images than that (in evaluation too), or, where it recomputes
    activations, than `checkpointed`.
    """
    if rank is not None and rank != int(os.environ["RANK"]):
        return
    logits, checkpoint_gradients = Student.logits, Student.checkpoint_gradients
    allowed = {"images": images}

    def limited(student: Student, batch: torch.Tensor) -> Any:
        if len(batch) > allowed["images"]:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return logits(student, batch)

    def checkpointing(student: Student) -> None:
        checkpoint_gradients(student)
        allowed["images"] = max(images, checkpointed)

    Student.logits, Student.checkpoint_gradients = limited, checkpointing  # type: ignore[method-assign]


def limit_memory(mib: int) -> None:
    """Give training so many MiB more than the process has when it begins; what comes after it is not limited."""
    train_step, finish = Trainer.train_step, Trainer.finish
    before = resource.getrlimit(resource.RLIMIT_AS)

    def limited(trainer: Trainer, *args: Any) -> None:
        Trainer.train_step = train_step  # type: ignore[method-assign]
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + (mib << 20)
        resource.setrlimit(resource.RLIMIT_AS, (limit, before[1]))
        train_step(trainer, *args)

    def unlimited(trainer: Trainer, *args: Any) -> None:
        resource.setrlimit(resource.RLIMIT_AS, before)
        finish(trainer, *args)

    Trainer.train_step, Trainer.finish = limited, unlimited  # type: ignore[method-assign]


COMPARING = ("distill=[{method: hard, weight: 0.5}, {method: dist, weight: 1.0}]",)
UNPAIRED = ("data.augment.mixup=0", "data.augment.cutmix=0")
WIDE = ("student.patch_size=1", "train.batch_size=96")  # activations worth limiting
ACCUMULATION, CHECKPOINTING = "train.gradient_accumulation", "train.gradient_checkpointing"

# Processes, what is short, the recipe, and the settings that the message must name.
CASES: dict[str, tuple[int, Callable[[], None], tuple[str, ...], dict[str, str]]] = {
    "mixed in pairs": (1, partial(allow, 7), (), {ACCUMULATION: "4"}),
    "comparing samples": (1, partial(allow, 7), COMPARING, {ACCUMULATION: "4"}),
    "one at a time": (1, partial(allow, 1), UNPAIRED, {ACCUMULATION: "16"}),
    "not even two": (1, partial(allow, 1, 4), (), {CHECKPOINTING: "true", ACCUMULATION: "4"}),
    "not even one": (1, partial(allow, 0), UNPAIRED, {}),
    "one of two": (2, partial(allow, 3, 0, rank=1), (), {ACCUMULATION: "4"}),
    "both of two": (2, partial(allow, 4), (), {ACCUMULATION: "2"}),
    "for real": (1, partial(limit_memory, 150), WIDE, {ACCUMULATION: r"\d+"}),
}


@pytest.mark.parametrize(
    "names",
    [
        ["one of two", "not even two"],
        pytest.param(list(CASES), marks=pytest.mark.soak),
    ],
    ids=["some", "all"],
)
def test_the_advice_fits(toy: Toy, tmp_path: Path, counted: Counted, names: list[str]) -> None:
    done = 0
    for name in names:
        processes, short, recipe, expected = CASES[name]
        folder = tmp_path / name.replace(" ", "-")
        folder.mkdir()
        command = ["train", toy.recipe, "train.gradient_accumulation=1", "train.max_steps=3", *recipe, "--out", "run"]
        failed = launch(command, cwd=folder, processes=processes, before=short)
        assert failed.wait() == [3] * processes, failed.output
        output, status = failed.output, run.read_status(folder / "run")
        message = output[output.index("failed: ") :].split("safe: ")[0]
        assert output.count("failed: ") == 1, output
        assert "out of memory" in message, output
        assert status["state"] == "failed", name
        assert message.splitlines()[-1] in status["reason"], name
        settings = dict(re.findall(r"(train\.gradient_\w+)=(\w+)", message)) if expected else {}
        assert settings.keys() == expected.keys(), message
        assert all(re.fullmatch(value, settings[key]) for key, value in expected.items()), message
        assert ("dist: comparing fewer samples" in message) == (recipe is COMPARING)
        if expected:
            assert f"train.batch_size stays {96 if recipe is WIDE else 16}." in message
            followed = [f"{key}={value}" for key, value in settings.items()]
            resumed = launch([*command, *followed, "--resume", "auto"], cwd=folder, processes=processes, before=short)
            assert resumed.wait() == [0] * processes, resumed.output
            assert run.is_finished(folder / "run")
        done += 1
    counted("out of memory ends in settings that fit", done=done, of=len(names))


def one_then_the_other() -> None:
    """Only process 1 runs out of memory, and has said so when process 0 ends before it."""
    allow(3, 0, rank=1)
    destroy = torch.distributed.destroy_process_group

    def and_wait() -> None:
        destroy()
        ranks = StopRequest.current()._ranks
        assert ranks is not None
        await_the_other(ranks)

    if os.environ["RANK"] == "1":
        torch.distributed.destroy_process_group = and_wait


def both_in_turn() -> None:
    """Both run out of memory; process 0 has said so and ended before process 1 can."""
    allow(3)
    leave = Ranks.leave

    def wait_and_leave(ranks: Ranks, error: BaseException) -> None:
        if os.environ["RANK"] == "1":
            await_the_other(ranks)
        leave(ranks, error)

    Ranks.leave = wait_and_leave  # type: ignore[method-assign]


def await_the_other(ranks: Ranks) -> None:
    until = time.monotonic() + 60
    while not ranks.ended() and time.monotonic() < until:
        time.sleep(0.02)
    print("the other is gone")


@pytest.mark.parametrize("short", [one_then_the_other, both_in_turn])
def test_one_process_says_it_whoever_is_gone(toy: Toy, tmp_path: Path, short: Callable[[], None]) -> None:
    """Without torchrun, what processes share ends with process 0."""
    command = ["train", toy.recipe, "train.gradient_accumulation=1", "--out", "run"]
    launched = launch(command, cwd=tmp_path, processes=2, before=short)
    assert launched.wait() == [3, 3], launched.output
    assert "the other is gone" in launched.output
    assert launched.output.count("failed: ") == 1, launched.output
    assert "Set train.gradient_accumulation=4" in launched.output
    status = run.read_status(tmp_path / "run")
    assert status["state"] == "failed"
    assert "out of memory with 8 images" in status["reason"]


def test_evaluation_takes_fewer_images_at_a_time(toy: Toy) -> None:
    accelerator = build_accelerator(toy_recipe(toy).train, Path())
    dataset = open_data(toy_recipe(toy), accelerator)
    most, asked = 7, []

    def forward(images: torch.Tensor) -> list[torch.Tensor]:
        asked.append(len(images))
        if len(images) > most:
            raise RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory")
        return [images.flatten(1)[:, :4]]

    (outputs,) = predict(forward, dataset, "test", accelerator, batch_size=20)
    assert asked == [20, 10, 5, 5, 5, 5, *[5] * 4, 5, 5]
    expected = torch.cat([images for images, _ in dataset.evaluation_batches("test", 0, 50, 50)])
    assert torch.equal(outputs, expected.flatten(1)[:, :4])
    most = 0
    with pytest.raises(RunFailed, match="with one image at a time"):
        predict(forward, dataset, "test", accelerator, batch_size=20)


def test_a_dry_run_advises_too(toy: Toy, tmp_path: Path) -> None:
    launched = launch(
        ["train", toy.recipe, "train.gradient_accumulation=1", "--dry-run"], cwd=tmp_path, before=partial(allow, 8)
    )
    assert launched.wait() == [3], launched.output
    assert "Set train.gradient_accumulation=2; train.batch_size stays 16." in launched.output
