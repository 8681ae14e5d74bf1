"""Skipping of steps whose loss or gradients are not finite, on all processes alike."""

from __future__ import annotations

import logging
import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import gather_object
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.parallel import DistributedDataParallel

from distill.errors import RunFailed
from distill.students.attention.base import AttentionKind, named_in
from distill.teaching.moving_average import move_towards
from distill.training.joined import copy_joined, joined

MAX_NAMED = 16
"""Most steps or sample indices that a message lists."""
_log = logging.getLogger("distill")


class _Check(NamedTuple):
    """Finiteness of one step, on the device until the host reads it."""

    step: int
    finiteness: Tensor
    """float32 [2] or [3], the same on all processes: anything not finite, a loss not finite; the scaler's scale."""
    own: Tensor
    """float32: this process's losses, the sums of its gradients before averaging, and their norm after it."""
    indices: Sequence[Tensor]
    """int64 [B] for each micro-batch of this process."""


class NonFiniteSteps:
    """Decides on the device, at each step, whether its update is applied; the host reads the flags later.

    The processes agree by an all-reduce of one small tensor. A non-finite step changes no weights, optimizer state, EMA
    or batch statistics:
    - torch's fused optimizers take the flag as a tensor (`found_inf`) and then change nothing;
    - other optimizers need the flag on the host: one synchronisation a step is cheaper than copies of all weights;
    - the EMA update gets the weight 0, and batch norm statistics are restored from a copy;
    - with a gradient scaler (fp16) one gradient is set to NaN on all processes, so that the scaler skips the step.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        model: nn.Module,
        student: nn.Module,
        optimizer: torch.optim.Optimizer,
        teacher: nn.Module | None = None,
    ) -> None:
        """`model` and `optimizer` as accelerate prepared them; `student` is the module within `model`; `teacher` one in
        training mode, whose batch statistics change too.
        """
        self._accelerator, self._prepared = accelerator, optimizer
        self._optimizer: torch.optim.Optimizer = getattr(optimizer, "optimizer", optimizer)
        self._parameters = [parameter for parameter in student.parameters() if parameter.requires_grad]
        self._statistics: dict[torch.dtype, list[Tensor]] = defaultdict(list)
        """Of batch norms; all of one type are copied in one launch."""
        for module in [*student.modules(), *(teacher.modules() if teacher is not None else ())]:
            for buffer in module.buffers() if isinstance(module, _NormBase) else ():
                self._statistics[buffer.dtype].append(buffer)
        self._statistics_before: dict[torch.dtype, Tensor] = {}
        self._has_stepped = False
        self._bucket_sums: list[Tensor] = []
        self._unread: list[_Check] = []
        self._streak: list[_Check] = []
        self.skipped = torch.tensor(False, device=accelerator.device)
        """bool [], on the device: whether the update of the current step is skipped."""
        self._distributed = isinstance(model, DistributedDataParallel)
        if isinstance(model, DistributedDataParallel):
            # A lambda, because DDP rejects string annotations.
            model.register_comm_hook(None, lambda _, bucket: self._before_reduction(bucket))

    def _before_reduction(self, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        """Record the sum of this process's gradients, to tell after averaging which process had bad ones."""
        self._bucket_sums.append(bucket.buffer().sum())
        return allreduce_hook(None, bucket)  # type: ignore[arg-type]

    def begin_step(self) -> None:
        self._bucket_sums.clear()
        self._statistics_before = {dtype: joined(buffers) for dtype, buffers in self._statistics.items()}

    @contextmanager
    def statistics_kept(self) -> Iterator[None]:
        """Batch norm statistics stay as they are: gradient checkpointing runs forward passes again in backward ones."""
        before = {dtype: joined(buffers) for dtype, buffers in self._statistics.items()}
        yield
        for dtype, buffers in self._statistics.items():
            copy_joined(buffers, before[dtype])

    @torch.no_grad()
    def check(self, step: int, losses: Sequence[Tensor], indices: Sequence[Tensor]) -> Tensor:
        """Set `skipped` for step `step` (from 0), after its backward passes.

        Args:
            losses: a scalar for each micro-batch.
            indices: sample indices, int64 [B] for each micro-batch.

        Returns:
            The norm of the gradients, float32 []; overflow counts as not finite.
        """
        gradients = [parameter.grad for parameter in self._parameters if parameter.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        own = torch.stack([*losses, *self._bucket_sums, norm]).float()
        finiteness = (~torch.stack([own.sum(), own[: len(losses)].sum()]).isfinite()).float()
        if self._distributed:
            dist.all_reduce(finiteness, dist.ReduceOp.MAX)
        self.skipped = finiteness[0] > 0
        if (scaler := self._accelerator.scaler) is not None:
            gradients[0].add_(torch.full_like(self._scale(scaler), math.nan).masked_fill(~self.skipped, 0.0))
            finiteness = torch.cat([finiteness, self._scale(scaler).view(1)])
        self._unread.append(_Check(step, finiteness, own, indices))
        return norm

    @staticmethod
    def _scale(scaler: torch.amp.GradScaler) -> Tensor:
        """The scale on the device; `get_scale` would synchronise."""
        assert scaler._scale is not None, "created with the first scaled loss"
        return scaler._scale

    @torch.no_grad()
    def step(self) -> None:
        """Apply the optimizer's step unless it is skipped."""
        # Optimizers create their state in the first step. Fused SGD's is uninitialised if that step is skipped.
        first = not (self._has_stepped or self._optimizer.state)
        if self._accelerator.scaler is not None:
            self._prepared.step()
            if first:
                self._has_stepped = not self.skipped.item()
                if not self._has_stepped:
                    self._optimizer.state.clear()
        elif not first and getattr(self._optimizer, "_step_supports_amp_scaling", False):
            self._optimizer.found_inf = self.skipped.float()  # type: ignore[attr-defined]
            self._prepared.step()
        elif not self.skipped.item():
            self._prepared.step()
            self._has_stepped = True
        for dtype, buffers in self._statistics.items():
            copy_joined(buffers, torch.where(self.skipped, self._statistics_before[dtype], joined(buffers)))

    def read(self, limit: int) -> int:
        """Number of skipped steps since the last call, which are also logged; synchronises. Collective.

        Steps that a gradient scaler skips because its scale is too large do not count.

        Raises:
            RunFailed: `limit` non-finite steps in a row.
        """
        if not self._unread:
            return 0
        flags = torch.stack([check.finiteness for check in self._unread]).tolist()
        bad = []
        for check, (anything, loss, *scale) in zip(self._unread, flags, strict=True):
            if not anything:
                self._streak = []
            elif loss or not scale or scale[0] < 1:
                bad.append(check.step)
                self._streak.append(check)
                if len(self._streak) == limit:
                    raise RunFailed(self._explain())
        self._unread = []
        if bad:
            _log.warning(
                "step %s: the loss or its gradients were not finite; %s not applied",
                ", ".join(str(step + 1) for step in bad[:MAX_NAMED]) + (", ..." if len(bad) > MAX_NAMED else ""),
                "its update was" if len(bad) == 1 else "these updates were",
            )
        return len(bad)

    def _explain(self) -> str:
        """The error message: the non-finite steps, and the processes and samples that caused them."""
        found = gather_object([(*self._locate(), self._accelerator.process_index)])
        highest = max(confidence for confidence, *_ in found)
        sources = [
            f"process {process} (step {step + 1}, samples {', '.join(map(str, samples[:MAX_NAMED]))}"
            + (f" and {len(samples) - MAX_NAMED} more)" if len(samples) > MAX_NAMED else ")")
            for confidence, step, samples, process in found
            if confidence == highest
        ]
        first, last = self._streak[0].step + 1, self._streak[-1].step + 1
        steps = f"step {first}" if first == last else f"steps {first} to {last}"
        return (
            f"{steps}: the loss or its gradients were not finite on {', '.join(sources)}. No such update was applied, "
            f"but these were train.max_bad_steps={len(self._streak)} in a row.\n"
            "Lower optim.lr, warm up longer (optim.warmup_epochs), or train in fp32 (train.precision)."
        )

    def _locate(self) -> tuple[int, int, list[int]]:
        """Confidence that this process is the source (2: its own loss or gradients are not finite, 1: the averaged
        gradients, 0: none), the last such step (from 0) and its samples.
        """
        located: tuple[int, int, list[int]] = (0, self._streak[-1].step, [])
        for check in self._streak:
            finite = [math.isfinite(value) for value in check.own.tolist()]
            losses, gradients = finite[: len(check.indices)], finite[len(check.indices) : -1]
            confidence = 2 if not all(losses + gradients) else int(not finite[-1])
            if confidence < max(1, located[0]):
                continue
            # A loss belongs to one micro-batch; gradients are summed over all.
            parts = zip(check.indices, losses, strict=True)
            indices = [part for part, is_finite in parts if not is_finite] or check.indices
            located = (confidence, check.step, torch.cat(list(indices)).tolist())
        return located


class Ema:
    """Updates timm's EMA of a student unless the step was skipped, without synchronising."""

    def __init__(self, ema: ModelEmaV3, student: nn.Module) -> None:
        self._ema = ema
        copied = named_in(student, AttentionKind, "not_averaged")
        # Both change in place only, so these references stay valid.
        averages, values = ema.module.state_dict(), student.state_dict()
        self._copied = [
            (average, values[name])
            for name, average in averages.items()
            if name in copied or not average.is_floating_point()
        ]
        averaged = [name for name, average in averages.items() if name not in copied and average.is_floating_point()]
        self._averages = [averages[name] for name in averaged]
        self._values = [values[name] for name in averaged]

    @torch.no_grad()
    def update(self, step: int, skipped: Tensor) -> None:
        """average += (1 - decay) (value - average), with the decay of step `step`; unchanged if `skipped`. Counts, and
        what attention kinds do not average, are copied.
        """
        move_towards(self._averages, self._values, (~skipped).float() * (1.0 - self._ema.get_decay(step)))
        for average, value in self._copied:
            average.copy_(value)
