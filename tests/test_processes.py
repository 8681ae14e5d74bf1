"""What the launcher decides and what the recipe does."""

from __future__ import annotations

import logging
import platform
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import PartialState

from distill import pipeline
from distill.errors import InputError, RunFailed
from distill.launching import processes
from distill.launching.processes import (
    bf16_instructions,
    build_accelerator,
    on_main,
    start_processes,
    with_precision,
)
from distill.recipe import from_mapping
from distill.recipe.schema import Train
from tests.conftest import Toy, environment
from tests.warm import launch


@pytest.fixture(autouse=True)
def anew() -> Iterator[None]:
    """What is asked and said once a process is asked and said in each test."""
    processes._bf16_or_fp32.cache_clear()
    yield
    processes._bf16_or_fp32.cache_clear()


@pytest.mark.parametrize(
    ("launched", "precision"), [(None, "fp32"), ("no", "fp32"), ("bf16", "bf16"), ("fp16", "fp16")]
)
def test_the_resolved_recipe_has_the_launched_precision(
    monkeypatch: pytest.MonkeyPatch, launched: str | None, precision: str
) -> None:
    monkeypatch.setattr(processes, "bf16_instructions", lambda: "avx512_bf16")
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    if launched is not None:
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", launched)
    assert with_precision(from_mapping({})).train.precision == precision
    assert with_precision(from_mapping({"train": {"precision": "bf16"}})).train.precision == "bf16"  # the recipe wins


def test_a_precision_that_no_recipe_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp8")
    with pytest.raises(InputError, match="--mixed_precision fp8"):
        with_precision(from_mapping({}))


@pytest.mark.parametrize(
    ("instructions", "precision", "said"),
    [("amx_bf16", "bf16", "bf16, with this CPU's amx_bf16 instructions"), (None, "fp32", "fp32 instead of bf16")],
)
@pytest.mark.parametrize("where", ["recipe", "launcher"])
def test_bf16_on_a_cpu_is_for_those_that_have_it(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    instructions: str | None,
    precision: str,
    said: str,
    where: str,
) -> None:
    monkeypatch.setattr(processes, "bf16_instructions", lambda: instructions)
    monkeypatch.setattr(logging.getLogger("distill"), "propagate", True)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16" if where == "launcher" else "no")
    recipe = from_mapping({"train": {"precision": "bf16"}} if where == "recipe" else {})
    with caplog.at_level("INFO", "distill"):
        assert with_precision(recipe).train.precision == precision
        assert with_precision(recipe).train.precision == precision
        assert with_precision(from_mapping({"train": {"precision": "fp32"}})).train.precision == "fp32"
    (record,) = [record for record in caplog.records if record.name == "distill"]
    assert said in record.getMessage()


@pytest.mark.parametrize(("native", "precision"), [(True, "bf16"), (False, "fp32")])
def test_a_gpu_has_bf16_whatever_its_cpu_has(monkeypatch: pytest.MonkeyPatch, native: bool, precision: str) -> None:
    """Unless it is an old one, which torch lets emulate it."""
    monkeypatch.setattr(processes, "bf16_instructions", lambda: "amx_bf16" if not native else None)
    monkeypatch.setattr(processes, "_emulates_bf16", processes._emulates_bf16.__wrapped__)  # without its memory
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation or native)
    monkeypatch.setattr(PartialState(), "device", torch.device("cuda"))
    assert with_precision(from_mapping({"train": {"precision": "bf16"}})).train.precision == precision


@pytest.mark.parametrize(
    ("machine", "answers", "found"),
    [
        ("x86_64", {"_is_amx_tile_supported": True, "_is_avx512_bf16_supported": True}, "amx"),
        ("x86_64", {"_is_amx_tile_supported": False, "_is_avx512_bf16_supported": True}, "avx512_bf16"),
        ("x86_64", {"_is_amx_tile_supported": False, "_is_avx512_bf16_supported": False}, None),
        ("x86_64", {"get_capabilities": {"avx512_f": True, "avx512_bf16": False}}, None),
        ("x86_64", {"get_capabilities": {"avx512_f": True, "avx512_bf16": True}}, "avx512_bf16"),
        ("aarch64", {"get_capabilities": {"neon": True, "bf16": True}}, "bf16"),
    ],
)
def test_the_probe_knows_older_and_newer_torch(
    monkeypatch: pytest.MonkeyPatch, machine: str, answers: dict[str, object], found: str | None
) -> None:
    monkeypatch.setattr(platform, "machine", lambda: machine)
    functions = {name: lambda value=value: value for name, value in answers.items()}
    monkeypatch.setattr(torch, "cpu", SimpleNamespace(**functions))
    assert bf16_instructions() == found


@pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="no /proc/cpuinfo to compare with")
def test_the_probe_agrees_with_the_kernel() -> None:
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    flags = next((line.split(":")[1].split() for line in lines if line.startswith(("flags", "Features"))), [])
    assert (bf16_instructions() is not None) == bool({"avx512_bf16", "amx_bf16", "bf16"} & set(flags))


def test_freed_memory_stays_with_the_process() -> None:
    code = """
import resource, torch
from distill.launching.processes import start_processes
start_processes()
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        torch.ones(16 << 20)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults(), faults()
print(faults())
"""
    result = subprocess.run(
        [sys.executable, "-c", code], env=environment(), capture_output=True, text=True, timeout=60, check=True
    )
    pages = (64 << 20) // resource.getpagesize()
    assert int(result.stdout) < pages  # each of the five touches as many anew if the memory was given back


@pytest.mark.parametrize("name", ["FSDP", "DEEPSPEED", "MEGATRON_LM"])
def test_a_launch_with_shards_is_refused(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(f"ACCELERATE_USE_{name}", "true")
    with pytest.raises(InputError, match=f"{name} is configured, .*--multi_gpu"):
        start_processes()


def test_what_is_compiled_is_not_the_launchers_affair(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "EAGER")
    layer = build_accelerator(Train(), tmp_path).prepare(torch.nn.Linear(2, 2))
    assert type(layer) is torch.nn.Linear


def fail_on_main() -> None:
    """Two failures of the main process alone, then a collective operation that needs both."""
    rank = start_processes().process_index

    def unforeseen() -> None:
        raise ZeroDivisionError("of nothing")

    def foreseen() -> None:
        raise InputError("data.root: empty")

    for action in (unforeseen, foreseen):
        try:
            on_main(action)
        except (ZeroDivisionError, RunFailed, InputError) as error:
            print(f"{rank}: {type(error).__name__}: {error}")
    print(f"{rank}: {on_main(lambda: 'alive')}")
    raise SystemExit(0)


def test_a_failure_of_the_main_process_is_one_of_all(tmp_path: Path) -> None:
    launched = launch([], cwd=tmp_path, processes=2, before=fail_on_main)
    assert launched.wait() == [0, 0], launched.output
    said = sorted(line for line in launched.output.splitlines() if line.startswith(("0: ", "1: ")))
    assert said == [
        "0: InputError: data.root: empty",
        "0: ZeroDivisionError: of nothing",
        "0: alive",
        "1: InputError: data.root: empty",
        "1: RunFailed: process 0: ZeroDivisionError: of nothing",
        "1: alive",
    ]


def fail_while_locating() -> None:
    def unforeseen(*_: object) -> None:
        raise ZeroDivisionError("of nothing")

    pipeline.locate = unforeseen  # type: ignore[assignment]


def test_a_run_ends_on_all_processes_where_the_main_one_fails(toy: Toy, tmp_path: Path) -> None:
    launched = launch(["train", toy.recipe], cwd=tmp_path, processes=2, before=fail_while_locating)
    assert launched.wait() == [3, 3], launched.output
    assert launched.output.count("ZeroDivisionError: of nothing") == 1, "one process speaks"
