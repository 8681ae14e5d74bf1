"""What the loop measures between two lines of metrics."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from accelerate import Accelerator
from torch import Tensor


class Window:
    """Sums since the last line of metrics, kept on the device so that logging costs one synchronisation an interval."""

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self.restart()

    def restart(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.micro_batches = 0
        self.steps = 0
        self.began = time.perf_counter()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time spent within does not count against the images per second."""
        paused = time.perf_counter()
        yield
        self.began += time.perf_counter() - paused

    def add(self, loss: Tensor, parts: Mapping[str, Tensor]) -> None:
        for key, value in {"loss": loss, **{f"loss/{name}": part for name, part in parts.items()}}.items():
            self.sums[key] = self.sums.get(key, torch.zeros_like(value)) + value.detach()
        self.micro_batches += 1

    def read(self, batch_size: int) -> dict[str, float]:
        """Means over all processes, and images per second; then starts anew."""
        means = self.accelerator.reduce(torch.stack(list(self.sums.values())) / self.micro_batches, "mean")
        values = dict(zip(self.sums, means.tolist(), strict=True))
        values["images_per_second"] = self.steps * batch_size / (time.perf_counter() - self.began)
        self.restart()
        return values
