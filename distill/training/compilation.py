"""`train.compile`: torch.compile and CUDA graphs for student, teacher and augmentation."""

from __future__ import annotations

import logging
import os
import shutil
import sysconfig
from pathlib import Path

import torch
from accelerate.utils import gather_object
from torch import nn
from torch.utils._triton import has_triton

from distill.data.augment import Augmenter
from distill.data.views import MultiCrop
from distill.recipe.schema import Train

_log = logging.getLogger("distill")


def _missing() -> str | None:
    """What this machine lacks for compiling GPU kernels, if anything. Triton builds its launchers as C extensions."""
    if not has_triton():
        return "Triton, or a GPU that it supports (compute capability 7.0 or later)"
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        return "a C compiler (gcc or clang)"
    # As in Triton: the default scheme of Debian's Python names a folder without headers.
    scheme = sysconfig.get_default_scheme().replace("posix_local", "posix_prefix")
    if not Path(sysconfig.get_path("include", scheme), "Python.h").exists():
        return "Python's headers (python3-dev or python3-devel)"
    return None


class Compilation:
    """Resolves `train.compile` on a device, the same on all processes. Collective.

    Compiled are the training forward passes of student and teacher. Their shapes are fixed (the micro-batch), so on
    CUDA each network becomes a CUDA graph ("reduce-overhead"); with `data.growth` the student has one for each of its
    two sizes, the second compiled where its images grow, and with `data.views` one for each size of views. Evaluation
    has other shapes and modes; it uses entry points that are not compiled (`Student.logits`, the teacher as it was
    loaded), so it triggers no recompilation.

    A graph's replay overwrites its previous outputs: logits, and gradients in the parameters. All that a step derives
    from them (losses, weights, EMA, stored logits) has its own memory, and `zero_grad` drops the gradients, so one mark
    at the beginning of a step is enough. Optimizer, EMA and checkpoint loading change weights in place, as graphs
    require. Under DistributedDataParallel gradients are copied into its buckets.

    The teacher has no CUDA stream of its own: with one graph launch each there is little to overlap.

    Without graphs, with compiled kernels only:
    - gradient accumulation: autograd adds the second micro-batch to gradients in the first one's memory
      (github.com/pytorch/pytorch/issues/169545);
    - gradient checkpointing: it is for models that barely fit, and graphs keep all memory that they use.
    """

    def __init__(self, train: Train, device: torch.device) -> None:
        self.on_cuda = device.type == "cuda"
        self.enabled = self.on_cuda if train.compile == "auto" else train.compile
        if self.enabled and train.compile == "auto" and (missing := list(filter(None, gather_object([_missing()])))):
            _log.info("train.compile: auto compiles nothing on this machine, which lacks %s", missing[0])
            self.enabled = False
        fixed = train.gradient_accumulation == 1 and not train.gradient_checkpointing
        self.graphs = self.enabled and self.on_cuda and fixed
        # A graph is recorded in the second step, and replayed from the third.
        self.steps = (3 if self.graphs else 1) if self.enabled else 0
        """Number of first steps, at each size of images, whose time is mostly that of compilation."""
        if self.enabled:
            # Earlier runs of this process (teacher, student) hold memory and count towards the recompilation limit.
            torch.compiler.reset()
            # Dynamo would cut the student at the buckets of DistributedDataParallel, to overlap their reduction with
            # the backward pass. One graph is worth more: students have some tens of megabytes of gradients.
            torch._dynamo.config.optimize_ddp = False

    def apply(self, module: nn.Module) -> None:
        """Compile the module in place, at its first call, if compilation is enabled."""
        if self.enabled:
            module.compile(dynamic=False, mode="reduce-overhead" if self.graphs else None)

    def apply_to_augmentation(self, augmenter: Augmenter | MultiCrop) -> None:
        """Compile it on CUDA if the networks are; on a CPU eager code is faster, since it skips unaffected images."""
        if self.enabled and self.on_cuda:
            augmenter.compile()

    def begin_step(self) -> None:
        """Let CUDA graphs overwrite the outputs of the previous step."""
        if self.graphs:
            torch.compiler.cudagraph_mark_step_begin()
