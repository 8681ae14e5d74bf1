"""Means of losses, throughput and data waiting time between two lines of metrics."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from torch import Tensor

T = TypeVar("T")


class MetricAccumulator:
    """Sums since the last line of metrics, kept on the device: one synchronisation per logging interval."""

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        # Reached when the device has finished the previous step; None on a CPU, where steps are synchronous.
        self._step_done = torch.cuda.Event() if accelerator.device.type == "cuda" else None
        # Not before the first step: on CUDA the augmentation may be compiled while its batch is waited for.
        self._counts_waiting = self._step_done is None
        self._counted = time.perf_counter()
        self._paused_at: float | None = None
        self.restart()

    def restart(self) -> None:
        self.names: tuple[str, ...] = ()
        self.sums: Tensor | None = None
        """float32 [names + 1]: sums over applied steps since the last line, and their number; kept on resume."""
        self.skipped = 0
        """Number of non-finite steps."""
        self._micro_batches: list[Tensor] = []
        self.start_clock()

    def start_clock(self) -> None:
        self.steps = 0
        self.waited = 0.0
        self.began = time.perf_counter()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Exclude the time spent within from the throughput and from `take_seconds`."""
        self._paused_at = time.perf_counter()
        yield
        pause = time.perf_counter() - self._paused_at
        self._paused_at = None
        self.began += pause
        self._counted += pause

    def take_seconds(self) -> float:
        """The time since the last call, without pauses."""
        before, self._counted = self._counted, self._paused_at or time.perf_counter()
        return self._counted - before

    def timed(self, batches: Iterable[T]) -> Iterator[T]:
        """Yield the batches unchanged and accumulate the time spent waiting for the loader while the device is idle."""
        requested = time.perf_counter()
        for batch in batches:
            if self._counts_waiting and (self._step_done is None or self._step_done.query()):
                self.waited += time.perf_counter() - requested
            yield batch
            requested = time.perf_counter()

    def add(
        self, loss: Tensor, parts: Mapping[str, Tensor], measurements: Mapping[str, Tensor] = MappingProxyType({})
    ) -> None:
        """Add a micro-batch's loss, its parts and what methods measured, scalars on the device."""
        self.names = ("loss", *(f"loss/{name}" for name in parts), *measurements)
        self._micro_batches.append(torch.stack([loss.detach(), *parts.values(), *measurements.values()]))

    def step(self, skipped: Tensor) -> None:
        """Finish an optimizer step. The losses of a `skipped` one (bool [], on the device) are not summed."""
        values = torch.stack(self._micro_batches).mean(0)
        values = torch.cat([values, values.new_ones(1)]).masked_fill(skipped, 0.0)
        self.sums = values if self.sums is None else self.sums + values
        self._micro_batches = []
        self.steps += 1
        if self._step_done is not None:
            self._step_done.record()
            self._counts_waiting = True

    def read(self, batch_size: int) -> dict[str, float]:
        """Means over all processes (none if all steps were skipped), images per second and the fraction of time spent
        waiting for data; then reset. Collective.
        """
        assert self.sums is not None, "metrics are read after at least one step"
        *sums, applied = self.accelerator.reduce(self.sums, "mean").tolist()
        # NaN: a method that has ended.
        totals = {name: total for name, total in zip(self.names, sums, strict=True) if not math.isnan(total)}
        values = {name: total / applied for name, total in totals.items()} if applied else {}
        seconds = time.perf_counter() - self.began
        values["images_per_second"] = self.steps * batch_size / seconds
        values["data_wait"] = min(1.0, self.waited / seconds)
        if self.skipped:
            values["bad_steps"] = self.skipped
        self.restart()
        return values

    def state(self) -> dict[str, Any]:
        """Plain data for a checkpoint, the same on all processes: a resumed run logs the same next line. Collective."""
        sums = [] if self.sums is None else self.accelerator.gather(self.sums[None]).tolist()
        return {"names": self.names, "sums": sums, "skipped": self.skipped}

    def resume(self, state: Mapping[str, Any]) -> None:
        """Load what `state` returned; if the number of processes has changed, each takes the mean."""
        self.restart()
        if state["sums"]:
            sums = torch.tensor(state["sums"], device=self.accelerator.device)
            same = len(sums) == self.accelerator.num_processes
            self.sums = sums[self.accelerator.process_index] if same else sums.mean(0)
        self.names, self.skipped = tuple(state["names"]), state["skipped"]
