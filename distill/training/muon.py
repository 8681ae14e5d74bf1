"""Muon in few launches: matrices of one shape are orthogonalised together, and a skipped step needs no host wait."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from timm.optim.adamw import adamw
from timm.optim.muon import (
    _COEFFICIENTS,
    Muon,
    _is_suitable_for_muon,
    get_lr_scale,
    resolve_ns_coefficients,
    zeropower_via_newtonschulz,
)
from timm.optim.nadamw import nadamw
from torch import Tensor

from distill.launching.processes import bf16_instructions
from distill.training.joined import copy_joined, joined, shaped


def iteration_dtype(device: torch.device) -> torch.dtype:
    """Type of the Newton-Schulz iteration: timm's bf16, or float32 on a CPU that would have to emulate it, in ten to
    thirty times the time.
    """
    return torch.bfloat16 if device.type != "cpu" or bf16_instructions() else torch.float32


class BatchedMuon(Muon):
    """timm's Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon) with the same updates.

    timm goes matrix by matrix; its Newton-Schulz iteration takes a batch of them. The other parameters of a group go
    through AdamW (with `nesterov` NAdamW) as one vector. All parameters have a gradient in every step, or in none from
    some step on.
    """

    _step_supports_amp_scaling = True
    """As torch's fused optimizers: `found_inf` and `grad_scale` are read on the device."""

    @classmethod
    def of(cls, optimizer: Muon) -> BatchedMuon:
        """With the groups and options of an optimizer that has not stepped yet."""
        return cls(optimizer.param_groups, **optimizer.defaults)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """torch loads the step counts of what it does not call fused to the CPU; here they are read on the device."""
        super().load_state_dict(state_dict)
        for parameter, state in self.state.items():
            if "step" in state:
                state["step"] = state["step"].to(parameter.device)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:
        """One step; it changes nothing if `found_inf` (float32 []) is set and not 0."""
        found = getattr(self, "found_inf", None)
        device = self.param_groups[0]["params"][0].device
        skipped = torch.zeros((), dtype=torch.bool, device=device) if found is None else found != 0
        for group in self.param_groups:
            matrices: dict[torch.Size, list[Tensor]] = defaultdict(list)
            others = []
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if "use_muon" not in state:
                    state["use_muon"] = not group.get("use_fallback") and _is_suitable_for_muon(parameter)
                if state["use_muon"]:
                    matrices[parameter.flatten(1).shape].append(parameter)
                else:
                    others.append(parameter)
            for parameters in matrices.values():
                self._step_matrices(group, parameters, skipped)
            if others:
                self._step_others(group, others, skipped)

    def _unscaled(self, gradients: Tensor) -> Tensor:
        """In place: without the factor of a gradient scaler that leaves the division to the optimizer."""
        scale = getattr(self, "grad_scale", None)
        return gradients if scale is None else gradients.div_(scale)

    def _state(self, parameters: Sequence[Tensor], name: str, shape: torch.Size | None = None) -> list[Tensor]:
        """One tensor of each parameter's state, at first 0; like the parameter, or of `shape`."""
        for parameter in parameters:
            if name not in self.state[parameter]:
                zeros = torch.zeros_like(parameter) if shape is None else parameter.new_zeros(shape)
                self.state[parameter][name] = zeros
        return [self.state[parameter][name] for parameter in parameters]

    def _step_matrices(self, group: dict[str, Any], parameters: list[Tensor], skipped: Tensor) -> None:
        """Parameters that are matrices of one shape, kernels with their input dimensions flattened."""
        buffers = self._state(parameters, "momentum_buffer")
        gradients = self._unscaled(torch.stack([parameter.grad.flatten(1) for parameter in parameters]))  # type: ignore[union-attr]
        before = torch.stack([buffer.flatten(1) for buffer in buffers])
        momenta = before.lerp(gradients, 1.0 - group["momentum"])
        torch._foreach_copy_(buffers, shaped(torch.where(skipped, before, momenta).unbind(), buffers))
        update = zeropower_via_newtonschulz(
            gradients.lerp_(momenta, group["momentum"]) if group["nesterov"] else momenta,
            group["ns_steps"],
            resolve_ns_coefficients(group["ns_coefficients"], _COEFFICIENTS),
            eps=group["eps"],
            safety_factor=group["safety_factor"],
            dtype=iteration_dtype(parameters[0].device),
            scale_eps=group["scale_eps"],
        ).masked_fill(skipped, 0.0)
        decay = torch.ones((), device=update.device).masked_fill(~skipped, 1.0 - group["lr"] * group["weight_decay"])
        torch._foreach_mul_(parameters, decay)
        scale = get_lr_scale(update.shape, group["adjust_lr_fn"]) if group["adjust_lr_fn"] else 1.0
        torch._foreach_add_(parameters, shaped(update.unbind(), parameters), alpha=-group["lr"] * scale)

    def _step_others(self, group: dict[str, Any], parameters: list[Tensor], skipped: Tensor) -> None:
        """Parameters for AdamW, as one vector."""
        beta1, beta2 = group["betas"]
        averages, squares = (self._state(parameters, name) for name in ("exp_avg", "exp_avg_sq"))
        steps = self._state(parameters, "step", torch.Size())
        before = [joined(parameters), joined(averages), joined(squares), steps[0]]
        after = [tensor.clone() for tensor in before]
        gradient = self._unscaled(joined([parameter.grad for parameter in parameters]))  # type: ignore[misc]
        update = nadamw if group["nesterov"] else partial(adamw, max_exp_avg_sqs=[], amsgrad=False)
        update(
            [after[0]],
            [gradient],
            [after[1]],
            [after[2]],
            state_steps=[after[3]],
            foreach=False,
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"] * group["fallback_lr_scale"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            caution=False,
            maximize=False,
            capturable=parameters[0].is_cuda,
            max_lr=None,
        )
        for targets, old, new in zip((parameters, averages, squares), before, after, strict=False):
            copy_joined(targets, torch.where(skipped, old, new))
        torch._foreach_copy_(steps, [torch.where(skipped, before[3], after[3])] * len(steps))
