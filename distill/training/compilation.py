"""Whether the networks of a run are compiled, and into CUDA graphs."""

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
from distill.recipe.schema import Train

_log = logging.getLogger("distill")


def _missing() -> str | None:
    """What keeps this machine from compiling kernels for its GPU; None: nothing does. Triton compiles its launchers on
    the machine, as extensions of Python.
    """
    if not has_triton():
        return "Triton, or of a GPU that it supports (compute capability 7.0 or later)"
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        return "a C compiler (gcc or clang)"
    # As Triton asks: the default scheme of Debian's Pythons names a folder that has no headers.
    scheme = sysconfig.get_default_scheme().replace("posix_local", "posix_prefix")
    if not Path(sysconfig.get_path("include", scheme), "Python.h").exists():
        return "Python's headers (python3-dev or python3-devel)"
    return None


class Compilation:
    """What `train.compile` comes to on a device; the processes agree. Collective.

    What is compiled is the forward pass of a training step, of the student and of the teacher. It sees one shape, the
    micro-batch, in training mode, for the whole run: so shapes are taken as fixed, and on CUDA each network becomes a
    CUDA graph ("reduce-overhead"), which is replayed without launching its kernels one by one. Evaluation has other
    shapes and modes; it calls the same modules by another door (`Student.logits`, the teacher as it was loaded), which
    is not compiled, so that nothing is compiled or recorded again for it.

    A graph's outputs lie in memory that its next replay overwrites: the gradients that backward leaves in the
    parameters, the logits. Between the beginnings of two steps nothing is overwritten, and everything that a step
    makes of them (losses, weights, averages, stored logits) has memory of its own, so a mark at the beginning of the
    step is enough, provided the gradients of the step before are gone: `zero_grad` drops them. The optimizer, the
    moving average and a checkpoint change weights in place, where the graphs expect them. Under DistributedDataParallel
    gradients are copied into its buckets as they come.

    The teacher has no stream of its own: two graphs take two launches a step, so there is little to hide behind the
    other's work, and a second stream would have to be made safe against the memory that they share.

    There are no graphs, only compiled kernels, where they would not be safe or not pay:
    - gradient accumulation: autograd adds the second micro-batch to gradients in the first one's memory
      (github.com/pytorch/pytorch/issues/169545);
    - gradient checkpointing: it is for models that barely fit, and graphs hold on to all memory that they use.
    """

    def __init__(self, train: Train, device: torch.device) -> None:
        self.on_cuda = device.type == "cuda"
        self.enabled = self.on_cuda if train.compile == "auto" else train.compile
        if self.enabled and train.compile == "auto" and (missing := list(filter(None, gather_object([_missing()])))):
            _log.info("train.compile: auto compiles nothing here, for want of %s", missing[0])
            self.enabled = False
        fixed = train.gradient_accumulation == 1 and not train.gradient_checkpointing
        self.graphs = self.enabled and self.on_cuda and fixed
        if self.enabled:
            # What an earlier run of this process compiled (the teacher's, or the student's before its control's) holds
            # its memory, and would count against the limit of recompilations.
            torch.compiler.reset()

    def apply(self, module: nn.Module) -> None:
        """Compile the module's calls, in place, when it is first called; or leave it."""
        if self.enabled:
            module.compile(dynamic=False, mode="reduce-overhead" if self.graphs else None)

    def apply_to_augmentation(self, augmenter: Augmenter) -> None:
        """Compile it where the networks are, on CUDA; on a CPU its eager form skips images that an operation leaves."""
        if self.enabled and self.on_cuda:
            augmenter.compile()

    def begin_step(self) -> None:
        """Let the graphs overwrite what they returned in the step before."""
        if self.graphs:
            torch.compiler.cudagraph_mark_step_begin()
