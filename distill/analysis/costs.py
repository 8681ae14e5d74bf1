"""What models cost on this machine: size, and speed as they answer in evaluation, in turns."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Mapping
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from distill.flops import count_flops

ROUNDS = 5
LARGEST_BATCH = {"cpu": 64, "cuda": 256}
WORK_OF_A_BATCH = {"cpu": 4e9, "cuda": 5e12}
"""FLOPs of the batch at which images per second are measured, at most; it has 8 images at least."""
SINGLES = 5
"""Images one at a time in every round."""


def measure_costs(models: Mapping[str, nn.Module], image: Tensor) -> dict[str, dict[str, Any]]:
    """By model: FLOPs of an image, bytes of its weights in memory, images per second, seconds for a single image.

    Speeds are medians of five rounds in which the models take turns, every second round backwards; float32, eager. The
    image, [1, C, H, W], is on their device already.
    """
    device = image.device
    flops = {name: count_flops(model, image) for name, model in models.items()}
    largest = int(WORK_OF_A_BATCH[device.type] / max(flops.values()))
    batch = image.expand(max(8, min(LARGEST_BATCH[device.type], largest)), -1, -1, -1).contiguous()
    rates: dict[str, list[float]] = defaultdict(list)
    latencies: dict[str, list[float]] = defaultdict(list)
    with torch.inference_mode():
        for turn in range(-1, ROUNDS):  # the first is a warm-up
            for name in list(models) if turn % 2 == 0 else reversed(list(models)):
                one_batch = _seconds(models[name], batch, 1)
                single = _seconds(models[name], image, SINGLES)
                if turn >= 0:
                    rates[name].append(len(batch) / one_batch)
                    latencies[name].append(single)
    return {
        name: {
            "flops": flops[name],
            "bytes": sum(value.nbytes for value in model.state_dict().values()),
            "images_per_second": median(rates[name]),
            "latency_seconds": median(latencies[name]),
            "batch": len(batch),
        }
        for name, model in models.items()
    }


def _seconds(model: nn.Module, images: Tensor, times: int) -> float:
    """Median seconds of one of `times` passes, each waited for."""
    measured = []
    for _ in range(times):
        began = time.perf_counter()
        model(images)
        if images.device.type == "cuda":
            torch.cuda.synchronize(images.device)
        measured.append(time.perf_counter() - began)
    return median(measured)
