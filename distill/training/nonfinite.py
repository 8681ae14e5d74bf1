"""Steps whose loss or gradients are not finite: their updates are not applied, on any process."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
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

NAMED = 16
"""Sample indices that a message names; there may be thousands."""
_log = logging.getLogger("distill")


class _Judged(NamedTuple):
    """What the device knows of a step, for the host to read later."""

    step: int
    finiteness: Tensor
    """float32 [2] or [3], the same on all processes: is anything not finite, is a loss; with a scaler, its scale."""
    own: Tensor
    """float32: this process's losses, sums of its gradients before they were averaged, and their norm after it."""
    indices: Sequence[Tensor]
    """int64 [B] for each micro-batch of this process."""


class NonFiniteSteps:
    """Decides on the device, at each step, whether its update is applied, and tells the host when it is asked.

    The processes agree by a reduction of one small tensor on the device. A step that is not finite leaves no trace in
    weights, optimizer, moving average and batch statistics:
    - torch's fused optimizers take the decision as a tensor and then leave alone weights, state and step counter;
    - for other optimizers the host waits for the decision: one wait a step costs less than copies of all weights;
    - the moving average gets the weight 0, and the statistics of batch norms are copied and put back;
    - with a gradient scaler (fp16) one gradient is made NaN on all processes, so that the scaler skips the step.
    """

    def __init__(
        self, accelerator: Accelerator, model: nn.Module, student: nn.Module, optimizer: torch.optim.Optimizer
    ) -> None:
        """Watch `model`, which is `student` as accelerate prepared it, and accelerate's `optimizer` over it."""
        self._accelerator, self._wrapped = accelerator, optimizer
        self._optimizer: torch.optim.Optimizer = getattr(optimizer, "optimizer", optimizer)
        self._parameters = [parameter for parameter in student.parameters() if parameter.requires_grad]
        self._statistics = [
            buffer for module in student.modules() if isinstance(module, _NormBase) for buffer in module.buffers()
        ]
        self._statistics_before: list[Tensor] = []
        self._has_stepped = False
        self._bucket_sums: list[Tensor] = []
        self._judged: list[_Judged] = []
        self._streak: list[_Judged] = []
        self.skipped = torch.tensor(False, device=accelerator.device)
        """bool [], on the device: whether the update of the step at hand is left out."""
        self._shared = isinstance(model, DistributedDataParallel)
        if isinstance(model, DistributedDataParallel):
            # DDP reads annotations, and cannot read those that are text.
            model.register_comm_hook(None, lambda _, bucket: self._before_reduction(bucket))

    def _before_reduction(self, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        """Note this process's own gradients: afterwards all processes have the same, and whose were bad is lost."""
        self._bucket_sums.append(bucket.buffer().sum())
        return allreduce_hook(None, bucket)  # type: ignore[arg-type]

    def begin_step(self) -> None:
        self._bucket_sums.clear()
        self._statistics_before = [buffer.clone() for buffer in self._statistics]

    @torch.no_grad()
    def judge(self, step: int, losses: Sequence[Tensor], indices: Sequence[Tensor]) -> Tensor:
        """Decide on step `step` (from 0), whose gradients are there.

        Args:
            losses: of its micro-batches, scalars.
            indices: of their samples.

        Returns:
            The norm of the gradients, float32 []; one beyond the range of float32 counts as not finite.
        """
        gradients = [parameter.grad for parameter in self._parameters if parameter.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        own = torch.stack([*losses, *self._bucket_sums, norm]).float()
        finiteness = (~torch.stack([own.sum(), own[: len(losses)].sum()]).isfinite()).float()
        if self._shared:
            dist.all_reduce(finiteness, dist.ReduceOp.MAX)
        self.skipped = finiteness[0] > 0
        if (scaler := self._accelerator.scaler) is not None:
            gradients[0].add_(torch.full_like(self._scale(scaler), math.nan).masked_fill(~self.skipped, 0.0))
            finiteness = torch.cat([finiteness, self._scale(scaler).view(1)])
        self._judged.append(_Judged(step, finiteness, own, indices))
        return norm

    @staticmethod
    def _scale(scaler: torch.amp.GradScaler) -> Tensor:
        """The scale on the device; `get_scale` would wait for it."""
        assert scaler._scale is not None, "it is there from the first scaled loss on"
        return scaler._scale

    @torch.no_grad()
    def step(self) -> None:
        """The optimizer's step, or none."""
        # Optimizers make their state in their first step: fused SGD as empty memory, which a step that is left out does
        # not fill.
        first = not (self._has_stepped or self._optimizer.state)
        if self._accelerator.scaler is not None:
            self._wrapped.step()
            if first:
                self._has_stepped = not self.skipped.item()
                if not self._has_stepped:
                    self._optimizer.state.clear()
        elif not first and getattr(self._optimizer, "_step_supports_amp_scaling", False):
            self._optimizer.found_inf = self.skipped.float()  # type: ignore[attr-defined]
            self._wrapped.step()
        elif not self.skipped.item():
            self._wrapped.step()
            self._has_stepped = True
        for buffer, before in zip(self._statistics, self._statistics_before, strict=True):
            buffer.copy_(torch.where(self.skipped, before, buffer))

    def read(self, limit: int) -> int:
        """How many updates were skipped since the last call, said on the console too; waits for the device.
        Collective.

        What a gradient scaler skips because its scale is too large is not counted.

        Raises:
            RunFailed: `limit` steps in a row were not finite.
        """
        if not self._judged:
            return 0
        finitenesss = torch.stack([judged.finiteness for judged in self._judged]).tolist()
        bad = []
        for judged, (anything, loss, *scale) in zip(self._judged, finitenesss, strict=True):
            if not anything:
                self._streak = []
            elif loss or not scale or scale[0] < 1:
                bad.append(judged.step)
                self._streak.append(judged)
                if len(self._streak) == limit:
                    raise RunFailed(self._explain())
        self._judged = []
        if bad:
            _log.warning(
                "step %s: the loss or its gradients were not finite; %s not applied",
                ", ".join(str(step + 1) for step in bad[:NAMED]) + (", ..." if len(bad) > NAMED else ""),
                "its update was" if len(bad) == 1 else "these updates were",
            )
        return len(bad)

    def _explain(self) -> str:
        """Which steps, and whose samples, made the run fail: those of the last of these steps on each process."""
        found = gather_object([(*self._blame(), self._accelerator.process_index)])
        surest = max(sureness for sureness, *_ in found)
        culprits = [
            f"process {process} (step {step + 1}, samples {', '.join(map(str, samples[:NAMED]))}"
            + (f" and {len(samples) - NAMED} more)" if len(samples) > NAMED else ")")
            for sureness, step, samples, process in found
            if sureness == surest
        ]
        first, last = self._streak[0].step + 1, self._streak[-1].step + 1
        steps = f"step {first}" if first == last else f"steps {first} to {last}"
        return (
            f"{steps}: the loss or its gradients were not finite on {', '.join(culprits)}. No such update was applied, "
            f"but these were train.max_bad_steps={len(self._streak)} in a row.\n"
            "Lower optim.lr, warm up longer (optim.warmup_epochs), or train in fp32 (train.precision)."
        )

    def _blame(self) -> tuple[int, int, list[int]]:
        """How surely it was this process (2: its own loss or gradients, 1: its gradients once averaged, 0: another),
        the step (from 0) and its samples.
        """
        blamed: tuple[int, int, list[int]] = (0, self._streak[-1].step, [])
        for judged in self._streak:
            finite = [math.isfinite(value) for value in judged.own.tolist()]
            losses, gradients = finite[: len(judged.indices)], finite[len(judged.indices) : -1]
            sureness = 2 if not all(losses + gradients) else int(not finite[-1])
            if sureness < max(1, blamed[0]):
                continue
            # A loss names its micro-batch; of gradients only the sum is known.
            parts = zip(judged.indices, losses, strict=True)
            indices = [part for part, is_finite in parts if not is_finite] or judged.indices
            blamed = (sureness, judged.step, torch.cat(list(indices)).tolist())
        return blamed


class Ema:
    """timm's moving average of a student, whose update a step's finiteness can leave out without the host knowing."""

    def __init__(self, ema: ModelEmaV3, student: nn.Module) -> None:
        self._ema = ema
        pairs = list(zip(ema.module.state_dict().values(), student.state_dict().values(), strict=True))
        # Both change in place only, so that these stay theirs.
        self._counts = [pair for pair in pairs if not pair[0].is_floating_point()]
        self._averages = [average for average, _ in pairs if average.is_floating_point()]
        self._values = [value for average, value in pairs if average.is_floating_point()]

    @torch.no_grad()
    def update(self, step: int, skipped: Tensor) -> None:
        """average += (1 - decay) (value - average), with the decay of step `step`; nothing where `skipped`."""
        differences = torch._foreach_sub(self._values, self._averages)
        torch._foreach_mul_(differences, (~skipped).float() * (1.0 - self._ema.get_decay(step)))
        torch._foreach_add_(self._averages, differences)
        for average, count in self._counts:
            average.copy_(count)
