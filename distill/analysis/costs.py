"""What models cost on this machine: size, and speed as they answer in evaluation, in turns."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from distill.analysis.energy import EnergyMeter

Forward = Callable[[Tensor], object]

ROUNDS = 5
LARGEST_BATCH = {"cpu": 64, "cuda": 256}
WORK_OF_A_BATCH = {"cpu": 4e9, "cuda": 5e12}
"""FLOPs of the batch at which images per second are measured, at most; it has 8 images at least."""
ENERGY_SECONDS = 1.5
"""Of passes between two readings of the counter of energy."""
SINGLES = 5
"""Images one at a time in every round."""


def count_bytes(model: nn.Module) -> int:
    """Of the weights as they are in memory."""
    return sum(value.nbytes for value in model.state_dict().values())


def measure_speed(models: Mapping[str, Forward], flops: Mapping[str, int], image: Tensor) -> dict[str, dict[str, Any]]:
    """Images per second, and seconds for a single image, by model: medians of five rounds in which the models take
    turns, every second round backwards. float32, eager, images [1, C, H, W] on the device already.
    """
    device = image.device
    largest = int(WORK_OF_A_BATCH[device.type] / max(flops.values()))
    batch = image.expand(max(8, min(LARGEST_BATCH[device.type], largest)), -1, -1, -1).contiguous()
    rates: dict[str, list[float]] = {name: [] for name in models}
    latencies: dict[str, list[float]] = {name: [] for name in models}
    with torch.inference_mode():
        for turn in range(-1, ROUNDS):  # the first is a warm-up
            for name in list(models) if turn % 2 == 0 else reversed(list(models)):
                one_batch = _seconds(models[name], batch, 1)
                single = _seconds(models[name], image, SINGLES)
                if turn >= 0:
                    rates[name].append(len(batch) / one_batch)
                    latencies[name].append(single)
        joules = {name: _joules(forward, batch) for name, forward in models.items()}
    return {
        name: {
            "images_per_second": median(rates[name]),
            "latency_seconds": median(latencies[name]),
            "batch": len(batch),
            **({} if joules[name] is None else {"joules_per_image": joules[name]}),
        }
        for name in models
    }


def _joules(forward: Forward, batch: Tensor) -> float | None:
    """Of an image, over passes that last much longer than the counter takes to move (tens of milliseconds)."""
    meter, began, images = EnergyMeter(batch.device), time.perf_counter(), 0
    if meter.last is None:
        return None
    while time.perf_counter() - began < ENERGY_SECONDS:
        _seconds(forward, batch, 1)
        images += len(batch)
    energy = meter.take().get("energy")
    return None if energy is None else energy / images


def _seconds(forward: Forward, images: Tensor, times: int) -> float:
    """Median seconds of one of `times` passes, each waited for."""
    measured = []
    for _ in range(times):
        began = time.perf_counter()
        forward(images)
        if images.device.type == "cuda":
            torch.cuda.synchronize(images.device)
        measured.append(time.perf_counter() - began)
    return median(measured)
