"""The machine that is measured: what it is, and how fast it multiplies matrices."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from distill.bench.measure import Arm, seconds
from distill.cores import cores
from distill.launching.processes import set_threads
from distill.run import describe_environment

SIDE = {"cpu": 2048, "cuda": 8192}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Machine:
    """Where and on what the suites measure."""

    device: torch.device
    sizes: tuple[str, ...]
    """Students, as vit_<size>."""
    scratch: Path
    """A folder of their own."""
    repetitions: int = 5
    matrix_rates: dict[str, float] = field(default_factory=dict)
    """FLOP/s of a large matrix product, by precision."""

    @property
    def cores(self) -> int:
        return cores()

    @property
    def precisions(self) -> tuple[str, ...]:
        return tuple(DTYPES)

    @property
    def rounds(self) -> Mapping[str, int]:
        """How `interleave` times training steps and layers here. On CUDA the first steps compile and record graphs, and
        one by one they are too short for its events.
        """
        several = {"warm_up": 12, "times": 20} if self.device.type == "cuda" else {"warm_up": 1, "times": 1}
        return several | {"repetitions": self.repetitions}

    def describe(self) -> dict[str, Any]:
        """For the JSON."""
        threads = set_threads()
        environment = describe_environment(num_processes=1, precision=None, device=self.device, threads=threads)
        unwanted = ("command", "host", "processes", "precision")
        rates = {precision: rate / 1e9 for precision, rate in self.matrix_rates.items()}
        return {key: value for key, value in environment.items() if key not in unwanted} | {"matrix_gflops": rates}

    def measure_matrix_rates(self) -> None:
        """Fill in `matrix_rates`: the median of seven products in a row."""
        for precision in self.precisions:
            arm = self.matrix_product(precision)
            arm.run()
            times = sorted(seconds(arm.run, self.device) for _ in range(7))
            self.matrix_rates[precision] = arm.flops / times[3]

    def matrix_product(self, precision: str) -> Arm:
        """A large square one: the yardstick of every share of the machine's rate."""
        side, dtype = SIDE[self.device.type], DTYPES[precision]
        a, b = (torch.randn(side, side, device=self.device).to(dtype) for _ in range(2))
        return Arm(f"matrix product {precision}", lambda: a @ b, flops=2.0 * side**3)
