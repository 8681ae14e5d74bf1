"""What the loop measures between two lines of metrics."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from torch import Tensor

T = TypeVar("T")


class MetricAccumulator:
    """Sums since the last line of metrics, kept on the device so that logging costs one synchronisation an interval."""

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        # When the device has done the step before; None where it is the host itself, which then is done already.
        self._step_done = torch.cuda.Event() if accelerator.device.type == "cuda" else None
        self.await_compilation()
        self.restart()

    def restart(self) -> None:
        self.names: tuple[str, ...] = ()
        self.sums: Tensor | None = None
        """Of the losses of the steps that were applied, also of those before a resumption, and the number of these."""
        self.skipped = 0
        """Steps that were left out because they were not finite."""
        self._micro_batches: list[Tensor] = []
        self.start_clock()

    def start_clock(self) -> None:
        self.steps = 0
        self.waited = 0.0
        self.began = time.perf_counter()

    def await_compilation(self) -> None:
        """On CUDA the augmentation may be compiled while the next batch is waited for: that is no waiting for data."""
        self._counts_waiting = self._step_done is None

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time spent within does not count against the images per second."""
        paused = time.perf_counter()
        yield
        self.began += time.perf_counter() - paused

    def timed(self, batches: Iterable[T]) -> Iterator[T]:
        """Yield the batches unchanged and accumulate the time spent waiting for the loader while the device is idle."""
        asked = time.perf_counter()
        for batch in batches:
            if self._counts_waiting and (self._step_done is None or self._step_done.query()):
                self.waited += time.perf_counter() - asked
            yield batch
            asked = time.perf_counter()

    def add(self, loss: Tensor, parts: Mapping[str, Tensor]) -> None:
        """A micro-batch: its loss and the parts of it, scalars on the device."""
        self.names = ("loss", *(f"loss/{name}" for name in parts))
        self._micro_batches.append(torch.stack([loss.detach(), *parts.values()]))

    def step(self, skipped: Tensor) -> None:
        """An optimizer step is under way. Where it is `skipped` (bool [], on the device), its loss is not summed: it
        need not be a number.
        """
        values = torch.stack(self._micro_batches).mean(0)
        values = torch.cat([values, values.new_ones(1)]).masked_fill(skipped, 0.0)
        self.sums = values if self.sums is None else self.sums + values
        self._micro_batches = []
        self.steps += 1
        if self._step_done is not None:
            self._step_done.record()
            self._counts_waiting = True

    def read(self, batch_size: int) -> dict[str, float]:
        """Means over all processes (none where all steps were skipped), images per second and the share of the time
        spent waiting for data; then starts anew.
        """
        assert self.sums is not None, "metrics are read after at least one step"
        *sums, applied = self.accelerator.reduce(self.sums, "mean").tolist()
        values = {name: total / applied for name, total in zip(self.names, sums, strict=True)} if applied else {}
        seconds = time.perf_counter() - self.began
        values["images_per_second"] = self.steps * batch_size / seconds
        values["data_wait"] = min(1.0, self.waited / seconds)
        if self.skipped:
            values["bad_steps"] = self.skipped
        self.restart()
        return values

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps, so that the next line of a resumed run is that of an undisturbed one: plain data,
        the same on all processes. Collective.
        """
        sums = [] if self.sums is None else self.accelerator.gather(self.sums[None]).tolist()
        return {"names": self.names, "sums": sums, "skipped": self.skipped}

    def resume(self, state: Mapping[str, Any]) -> None:
        """Take up what `state` gave; where the number of processes has changed, each takes their mean."""
        self.restart()
        if state["sums"]:
            sums = torch.tensor(state["sums"], device=self.accelerator.device)
            same = len(sums) == self.accelerator.num_processes
            self.sums = sums[self.accelerator.process_index] if same else sums.mean(0)
        self.names, self.skipped = tuple(state["names"]), state["skipped"]
