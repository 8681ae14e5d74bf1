"""Out of memory, simulated and real: the run fails with settings that fit, on which it then goes on."""

from __future__ import annotations

import gc
import os
import re
import resource
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import distill.exports.folder
from distill import pipeline, run
from distill.errors import RunFailed
from distill.evaluation import predict
from distill.launching.processes import build_accelerator
from distill.launching.ranks import Ranks
from distill.pipeline import open_data
from distill.students import Student
from distill.trainer import Trainer
from tests.conftest import DEVICES, Counted, Toy
from tests.test_resume import go
from tests.test_step_speed import toy_recipe
from tests.warm import launch


def allow(images: int, rank: int | None = None) -> None:
    """Let the student run out of memory with more images than that, in evaluation too."""
    if rank is not None and rank != int(os.environ["RANK"]):
        return
    logits = Student.logits

    def limited(student: Student, batch: torch.Tensor) -> Any:
        if len(batch) > images:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return logits(student, batch)

    Student.logits = limited  # type: ignore[method-assign]


def limit_memory(mib: int) -> None:
    """Give training so many MiB more than the process has when it begins; what comes after it is not limited."""
    train_step, finish = Trainer.train_step, pipeline.finish
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

    Trainer.train_step, pipeline.finish = limited, unlimited  # type: ignore[method-assign, assignment]


COMPARING = ("distill=[{method: hard, weight: 0.5}, {method: dist, weight: 1.0}]",)
UNPAIRED = ("data.augment.mixup=0", "data.augment.cutmix=0")
WIDE = ("student.patch_size=1", "train.batch_size=96")  # activations worth limiting

# Processes, what is short, the recipe, and the values of train.gradient_accumulation that the messages name in turn.
CASES: dict[str, tuple[int, Callable[[], None], tuple[str, ...], list[int]]] = {
    "mixed in pairs": (1, partial(allow, 7), (), [2, 4]),
    "comparing samples": (1, partial(allow, 8), COMPARING, [2]),
    "one at a time": (1, partial(allow, 1), UNPAIRED, [2, 4, 8, 16]),
    "one of two": (2, partial(allow, 4, rank=1), (), [2]),
    "both of two": (2, partial(allow, 4), (), [2]),
    "for real": (1, partial(limit_memory, 150), WIDE, [2, 3, 4, 6, 8, 12, 16]),
}


@pytest.mark.soak
@pytest.mark.parametrize("names", [["mixed in pairs", "one of two"], list(CASES)], ids=["some", "all"])
def test_following_the_messages_ends_in_settings_that_fit(
    toy: Toy, tmp_path: Path, counted: Counted, names: list[str]
) -> None:
    done = 0
    for name in names:
        processes, short, recipe, advised = CASES[name]
        folder = tmp_path / name.replace(" ", "-")
        folder.mkdir()
        command = ["train", toy.recipe, "train.gradient_accumulation=1", "train.max_steps=3", *recipe, "--out", "run"]
        run_it = partial(launch, cwd=folder, processes=processes, before=short)
        launched = run_it(command)
        codes = launched.wait()
        for accumulation in advised:
            if codes == [0] * processes:
                break  # how little "for real" needs differs from machine to machine
            assert codes == [3] * processes, launched.output
            output, status = launched.output, run.read_status(folder / "run")
            message = output[output.index("failed: ") :].split("safe: ")[0]
            assert output.count("failed: ") == 1, output
            assert "out of memory" in message, output
            assert status["state"] == "failed", name
            assert message.splitlines()[-1] in status["reason"], name
            setting = f"train.gradient_accumulation={accumulation}"
            stays = f"train.batch_size stays {96 if recipe is WIDE else 16}."
            assert f"Set {setting}; {stays}" in message, message
            assert ("dist: comparing fewer samples" in message) == (recipe is COMPARING)
            launched = run_it([*command, setting, "--resume", "auto"])
            codes = launched.wait()
        assert codes == [0] * processes, launched.output
        assert run.is_finished(folder / "run")
        done += 1
    counted("following the message on memory ends in settings that fit", done=done, of=len(names))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ((), "Set train.gradient_checkpointing=true. "),
        (("train.gradient_checkpointing=true",), "Take a smaller student, teacher or data.resolution"),
    ],
)
def test_one_pair_at_a_time_is_the_least(toy: Toy, tmp_path: Path, changes: tuple[str, ...], expected: str) -> None:
    command = ["train", toy.recipe, "train.gradient_accumulation=8", *changes, "--dry-run"]
    launched = launch(command, cwd=tmp_path, before=partial(allow, 1))
    assert launched.wait() == [3], launched.output
    assert expected in launched.output


@DEVICES
def test_a_call_from_python_goes_on_with_the_setting_of_the_message(
    toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    """For real on a GPU, where networks become CUDA graphs."""
    monkeypatch.setattr(distill.exports.folder, "_compare_with_reloaded", lambda *args: None)
    wide = {"student": {"patch_size": 1}, "report": {"analysis": "none"}}
    train = {"batch_size": 96, "max_steps": 3, "gradient_accumulation": 1}
    with limited_here(device), pytest.raises(RunFailed, match="out of memory with 96 images") as failed:
        go(toy_recipe(toy, train=train, **wide), tmp_path / "run", None)
    accumulation = int(re.findall(r"Set train.gradient_accumulation=(\d+);", str(failed.value))[0])
    assert accumulation == 2
    assert run.read_status(tmp_path / "run")["state"] == "failed"
    train["gradient_accumulation"] = accumulation
    go(toy_recipe(toy, train=train, **wide), tmp_path / "run", None, resume="auto")
    assert run.is_finished(tmp_path / "run")


@contextmanager
def limited_here(device: str) -> Iterator[None]:
    """Too little memory for a step of 96 images: on a GPU for real, on a CPU simulated."""
    if device == "cpu":
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Student, "logits", Student.logits)  # taken back at the end
            allow(95)
            yield
        return
    gc.collect()
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + (96 << 20)) / total)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def both_in_turn() -> None:
    """Both run out of memory; process 0 has said so and ended before process 1 can."""
    allow(3)
    write = Ranks.write_exit_message

    def wait_and_write(ranks: Ranks, error: BaseException) -> None:
        if os.environ["RANK"] == "1":
            await_the_other(ranks)
        write(ranks, error)

    Ranks.write_exit_message = wait_and_write  # type: ignore[method-assign]


def await_the_other(ranks: Ranks) -> None:
    until = time.monotonic() + 60
    while not ranks.ended() and time.monotonic() < until:
        time.sleep(0.02)
    print("the other is gone")


def test_one_process_says_it_when_the_other_is_gone(toy: Toy, tmp_path: Path) -> None:
    """Without torchrun, what processes share ends with process 0."""
    command = ["train", toy.recipe, "train.gradient_accumulation=1", "--out", "run"]
    launched = launch(command, cwd=tmp_path, processes=2, before=both_in_turn)
    assert launched.wait() == [3, 3], launched.output
    assert "the other is gone" in launched.output
    assert launched.output.count("failed: ") == 1, launched.output
    assert "Set train.gradient_accumulation=2" in launched.output
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
