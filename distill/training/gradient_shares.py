"""Each loss part's share of the gradient norms of the student."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from distill.recipe.schema import Train


class GradientShares:
    """Measured at logged steps if `train.log_gradient_share` is set: each weighted part's gradient norm over the sum
    of these norms, in the first micro-batch of each process.
    """

    def __init__(self, train: Train, accelerator: Accelerator, student: nn.Module) -> None:
        self.enabled = train.log_gradient_share
        self._accelerator = accelerator
        self._parameters = [parameter for parameter in student.parameters() if parameter.requires_grad]
        self.latest: dict[str, Tensor] = {}
        """Scalars from 0 to 1 by part, on the device."""

    @staticmethod
    def forward_pass(due: bool) -> AbstractContextManager[object]:
        """Context for the forward pass: eager if `due`. The backward pass of compiled code may write over what the
        forward pass saved; torch refuses a second one, or not, by a setting (torch._functorch.config.donated_buffer).
        """
        return torch.compiler.set_stance("force_eager") if due else nullcontext()

    def measure(self, parts: Mapping[str, Tensor], weights: Mapping[str, float]) -> None:
        """`parts`: losses by name, of which those without a weight have ended; their graph is retained."""
        parts = {name: part for name, part in parts.items() if name in weights}
        scaler = self._accelerator.scaler
        scale = 1.0 if scaler is None else scaler.get_scale()  # fp16 gradients would underflow
        norms = []
        for name, part in parts.items():
            gradients = torch.autograd.grad(
                weights[name] * scale * part,
                self._parameters,
                retain_graph=True,
                allow_unused=True,
                materialize_grads=True,
            )
            norms.append(torch.nn.utils.get_total_norm(gradients))
        total = torch.stack(norms).sum()
        self.latest = {name: norm / total for name, norm in zip(parts, norms, strict=True)}

    def read(self) -> dict[str, float]:
        """The latest as metrics, means over the processes; empty unless finite (bad step, zero weights). Collective."""
        if not self.latest:
            return {}
        shares = self._accelerator.reduce(torch.stack(list(self.latest.values())), "mean").tolist()
        if not all(map(math.isfinite, shares)):
            return {}
        return {f"gradient_share/{name}": share for name, share in zip(self.latest, shares, strict=True)}
