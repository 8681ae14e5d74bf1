"""The launch files under recipes/accelerate, read by accelerate's own loader and launcher."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DistributedType

FOLDER = Path(__file__).resolve().parents[1] / "recipes" / "accelerate"
EXPECTED = {
    "one_process": (DistributedType.NO, 1, 1, "no"),
    "single_gpu": (DistributedType.NO, 1, 1, "no"),
    "multi_gpu_bf16": (DistributedType.MULTI_GPU, 1, 8, "bf16"),
    "two_nodes": (DistributedType.MULTI_GPU, 2, 16, "bf16"),
}


def launched(name: str, *flags: str) -> Namespace:
    """The launcher's arguments after it has merged the file with the command line."""
    command = ["--config_file", str(FOLDER / f"{name}.yaml"), *flags, "distill/train.py", "recipe.yaml", "seed=1"]
    return _validate_launch_command(launch_command_parser().parse_args(command))[0]


def test_there_is_a_file_for_each_setting() -> None:
    assert {path.stem for path in FOLDER.iterdir()} == set(EXPECTED)


@pytest.mark.parametrize("name", EXPECTED)
def test_accelerate_reads_the_file(name: str) -> None:
    config = load_config_from_file(str(FOLDER / f"{name}.yaml"))
    found = config.distributed_type, config.num_machines, config.num_processes, config.mixed_precision
    assert found == EXPECTED[name]
    assert config.use_cpu is False


@pytest.mark.parametrize("name", EXPECTED)
def test_the_launcher_takes_the_file_as_it_is(name: str, caplog: pytest.LogCaptureFixture) -> None:
    kind, machines, processes, precision = EXPECTED[name]
    arguments = launched(name)
    assert arguments.multi_gpu == (kind is DistributedType.MULTI_GPU)
    assert (arguments.num_machines, arguments.num_processes, arguments.mixed_precision) == (
        machines,
        processes,
        precision,
    )
    assert caplog.text == "", "accelerate lists no defaults"
    assert arguments.training_script == "distill/train.py"
    assert arguments.training_script_args == ["recipe.yaml", "seed=1"]


def test_the_command_line_overrides_the_file() -> None:
    assert launched("multi_gpu_bf16", "--num_processes", "4").num_processes == 4
    assert launched("single_gpu", "--mixed_precision", "bf16").mixed_precision == "bf16"
    second = launched("two_nodes", "--main_process_ip", "10.0.0.1", "--machine_rank", "1", "--num_processes", "4")
    assert (second.machine_rank, second.main_process_ip, second.num_processes) == (1, "10.0.0.1", 4)
