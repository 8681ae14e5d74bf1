"""`environment.json`: with what, and on what, a run was trained."""

from __future__ import annotations

import platform
import shutil
import socket
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from distill.cores import cores
from distill.launching.determinism import allowed_tf32
from distill.version import __version__


def describe_environment(
    *, num_processes: int, precision: str | None, device: torch.device, threads: int
) -> dict[str, Any]:
    """Content of `environment.json`: versions, machine, processes, precision, commit."""
    packages = ("torch", "torchvision", "timm", "accelerate", "safetensors", "numpy")
    return {
        "command": sys.argv,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "host": socket.gethostname(),
        "versions": {"distill": __version__, **{name: metadata.version(name) for name in packages}},
        "commit": _commit(),
        "processes": num_processes,
        "precision": precision,
        "device": str(device),
        "device_name": device_name(device),
        "threads": threads,
        "cores": cores(),
        **({"tf32": allowed_tf32()} if device.type == "cuda" else {}),
    }


def device_name(device: torch.device) -> str:
    """Of the GPU, or of this machine's processor."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name()


def _commit() -> str | None:
    """Git commit of the checkout that this code runs from; None without a checkout or git."""
    checkout = Path(__file__).resolve().parent.parent
    if not (checkout / ".git").exists() or shutil.which("git") is None:
        return None
    command = ["git", "-C", str(checkout), "rev-parse", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or None


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor()
    )
