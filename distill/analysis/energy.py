"""The energy counter of an NVIDIA GPU, where the driver has one."""

from __future__ import annotations

import ctypes
from functools import cache

import torch


def energy_counter(device: torch.device) -> float | None:
    """Joules that the GPU has taken since its driver was loaded; None on other devices and where nobody counts."""
    counter = _counter(device) if device.type == "cuda" else None
    if counter is None:
        return None
    nvml, handle = counter
    millijoules = ctypes.c_ulonglong()
    return (
        millijoules.value / 1000
        if nvml.nvmlDeviceGetTotalEnergyConsumption(handle, ctypes.byref(millijoules)) == 0
        else None
    )


class EnergyMeter:
    """What a GPU takes while a process trains on it, from one reading to the next."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.last = energy_counter(device)

    def take(self) -> dict[str, float]:
        """`energy`, in joules since the last time; nothing where nobody counts."""
        before, self.last = self.last, energy_counter(self.device)
        return {} if before is None or self.last is None else {"energy": self.last - before}


@cache
def _counter(device: torch.device) -> tuple[ctypes.CDLL, ctypes.c_void_p] | None:
    """NVML, which comes with the driver, and its handle of this device."""
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return None
    handle = ctypes.c_void_p()
    uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}".encode()
    if nvml.nvmlInit_v2() != 0 or nvml.nvmlDeviceGetHandleByUUID(uuid, ctypes.byref(handle)) != 0:
        return None
    return nvml, handle
