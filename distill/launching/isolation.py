"""Restores the global state of the process after a run in Python."""

from __future__ import annotations

import logging
import os
import random
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import numpy as np
import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState, GradientState, PartialState
from PIL import Image
from torch.utils.data._utils import signal_handling

from distill.launching.determinism import allow_tf32, allowed_tf32
from distill.launching.processes import restore_malloc

_log = logging.getLogger("distill")


@contextmanager
def isolated() -> Iterator[None]:
    """Restore on exit: environment, logging, random states, torch's settings, accelerate's state, the process group.

    Within, torch has the default settings of a fresh process, and loads no pickled code.
    """
    with ExitStack() as stack:
        for save in (_logging, _random_states, _torch_settings, _processes, _child_signal, _pixel_limit):
            stack.callback(save())
        torch.set_default_dtype(torch.float32)
        if _default_device().type != "cpu":
            torch.set_default_device(None)
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(tensors_only())
        yield


@contextmanager
def tensors_only() -> Iterator[None]:
    """Force `torch.load(weights_only=True)` within, since older releases of timm ask for unsafe loading; restores the
    environment.
    """
    before = dict(os.environ)
    os.environ.pop("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", None)
    os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"
    try:
        yield
    finally:
        for name in os.environ.keys() - before.keys():
            del os.environ[name]
        os.environ.update(before)


def _logging() -> Callable[[], None]:
    level, propagate, handlers, filters = _log.level, _log.propagate, list(_log.handlers), list(_log.filters)

    def restore() -> None:
        _log.setLevel(level)
        _log.propagate, _log.handlers, _log.filters = propagate, handlers, filters

    return restore


def _random_states() -> Callable[[], None]:
    python, numpy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002 (the caller's)
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None

    def restore() -> None:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002
        torch.set_rng_state(cpu)
        if cuda is not None:
            torch.cuda.set_rng_state_all(cuda)
        elif torch.cuda.is_initialized():  # as if CUDA had started after `torch.manual_seed`
            torch.cuda.manual_seed_all(torch.initial_seed())

    return restore


def _default_device() -> torch.device:
    """`torch.get_default_device`, which in torch 2.9 fails after `torch.set_default_device(None)`."""
    return torch.empty(0).device


def _torch_settings() -> Callable[[], None]:
    threads, dtype, device = torch.get_num_threads(), torch.get_default_dtype(), _default_device()
    deterministic = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    cudnn = torch.backends.cudnn.deterministic
    tf32 = allowed_tf32()
    fill = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    compiler = sys.modules.get("torch._dynamo")  # its import takes a second
    cut_for_ddp = compiler is None or compiler.config.optimize_ddp  # by default, true

    def restore() -> None:
        torch.set_num_threads(threads)
        torch.set_default_dtype(dtype)
        if _default_device() != device:
            torch.set_default_device(device)
        now = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
        if now != deterministic:  # the call imports torch's compiler
            torch.use_deterministic_algorithms(deterministic[0], warn_only=deterministic[1])
        torch.backends.cudnn.deterministic = cudnn
        if allowed_tf32() != tf32:
            allow_tf32(tf32)
        torch.utils.deterministic.fill_uninitialized_memory = fill  # type: ignore[attr-defined]
        if "torch._dynamo" in sys.modules:
            torch._dynamo.config.optimize_ddp = cut_for_ddp

    return restore


def _child_signal() -> Callable[[], None]:
    """SIGCHLD, whose handler torch's data loaders replace."""
    handler, is_set = signal.getsignal(signal.SIGCHLD), signal_handling._SIGCHLD_handler_set

    def restore() -> None:
        if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGCHLD) != handler:
            signal.signal(signal.SIGCHLD, handler)
            signal_handling._SIGCHLD_handler_set = is_set

    return restore


def _pixel_limit() -> Callable[[], None]:
    """Pillow's, which a larger data.max_pixels raises."""
    limit = Image.MAX_IMAGE_PIXELS

    def restore() -> None:
        Image.MAX_IMAGE_PIXELS = limit

    return restore


def _processes() -> Callable[[], None]:
    grouped = dist.is_initialized()
    states = [
        (kind._shared_state, dict(kind._shared_state)) for kind in (PartialState, AcceleratorState, GradientState)
    ]

    def restore() -> None:
        if dist.is_initialized() and not grouped:
            dist.destroy_process_group()
        for state, before in states:
            state.clear()
            state.update(before)
        restore_malloc()

    return restore
