"""What a student learns from: the labels and, by weighted objectives, a teacher.

One distillation method a file, `name.py`. A method on logits is the function `name`(student_logits, teacher_logits,
**options), which may also take the `targets`; one on feature maps compares a pair of maps: the function
`name`(student_map, teacher_map, **options), or, where it owns parameters, the module `Name`(student_channels,
teacher_channels, **options). The options are those of its section in a recipe. Nothing else needs to know of it.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from distill.features import Features, mean_over_heads
from distill.objectives.maps import pairs_of

if TYPE_CHECKING:
    from distill.recipe.objectives import OnLogits, OnMaps

__all__ = ["Objectives", "Seen", "training_loss"]


class Seen(NamedTuple):
    """What a teacher says to a batch."""

    logits: Tensor
    """[B, classes]."""
    maps: Mapping[str, Tensor]
    """By name [B, C, h, w]: those that an objective asks for."""


class Objectives(nn.Module):
    """The losses of a recipe, with the parameters that some of them own.

    Attributes:
        blocks: of the student, whose tokens they compare.
        maps: of the teacher, by name, that they compare these with.
    """

    def __init__(
        self,
        on_logits: Sequence[OnLogits] = (),
        on_maps: Sequence[OnMaps] = (),
        *,
        label_smoothing: float,
        student_channels: Sequence[int] = (),
        teacher_channels: Mapping[str, int] | None = None,
        stages: Sequence[str] = (),
    ) -> None:
        """Losses from sections of a recipe.

        Args:
            label_smoothing: of the targets, in the label loss only.
            student_channels: of the student's map after each block, for methods on maps.
            teacher_channels: of the teacher's maps by name, for methods on maps.
            stages: names of its own stages among them, from the first to the last.

        Raises:
            ValueError: a block or a map that there is not; the message names those that there are.
        """
        super().__init__()
        self.label_smoothing = label_smoothing
        self.on_logits: dict[str, Callable[..., Tensor]] = {}
        self.on_maps: dict[str, list[tuple[int, str]]] = {}
        self._comparisons: dict[str, list[Callable[[Tensor, Tensor], Tensor]]] = {}
        self.owned = nn.ModuleDict()
        for on_logit in on_logits:
            self.on_logits[on_logit.method] = _on_logits(on_logit.method, on_logit.options())
        for section in on_maps:
            method, options = section.method, section.options()
            given = [(pair.block, pair.map) for pair in section.pairs or ()]
            pairs = pairs_of(given, section.pairing, depth=len(student_channels), maps=stages)
            channels = [(student_channels[block], (teacher_channels or {})[name]) for block, name in pairs]
            self.on_maps[method] = pairs
            self._comparisons[method] = [_on_maps(method, options, *these) for these in channels]
            owned = [comparison for comparison in self._comparisons[method] if isinstance(comparison, nn.Module)]
            if owned:
                self.owned[method] = nn.ModuleList(owned)
        used = [pair for pairs in self.on_maps.values() for pair in pairs]
        self.blocks = tuple(sorted({block for block, _ in used}))
        self.maps = tuple(dict.fromkeys(name for _, name in used))

    def forward(self, student: Features, targets: Tensor, seen: Seen | None) -> dict[str, Tensor]:
        """The losses, unweighted scalars in float32, under 'label' and each method's name.

        The first head learns the labels and the last one the teacher's logits; a model with one head learns both on it.
        Where no method is on logits, the label loss is the mean over all heads.

        Args:
            student: its logits, and its maps of `blocks`.
            targets: [B, classes], rows summing to 1 (soft where images were mixed), not smoothed.
            seen: None only where there are no objectives.
        """
        with torch.autocast(targets.device.type, enabled=False):
            heads = list(student.logits)
            labelled = heads[:1] if self.on_logits else heads
            losses = {head: self._label_loss(student.logits[head], targets) for head in labelled}
            parts = {"label": mean_over_heads(losses)}
            if seen is None:
                assert not self.on_logits, "an objective needs what the teacher says"
                return parts
            for method, compare in self.on_logits.items():
                parts[method] = compare(student.logits[heads[-1]], seen.logits, targets=targets)
            for method, pairs in self.on_maps.items():
                comparisons = zip(self._comparisons[method], pairs, strict=True)
                of_pairs = [compare(student.maps[block], seen.maps[name]) for compare, (block, name) in comparisons]
                parts[method] = torch.stack(of_pairs).mean()
            return parts

    def _label_loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(logits.float(), targets.float(), label_smoothing=self.label_smoothing)


def training_loss(parts: Mapping[str, Tensor], weights: Mapping[str, float]) -> tuple[Tensor, dict[str, Tensor]]:
    """label_weight * label + sum of weight * objective (Touvron et al. 2021, arXiv 2012.12877, equations 2 and 3 with
    free weights), and its parts, detached and unweighted.
    """
    loss = torch.stack([weights[name] * part for name, part in parts.items()]).sum()
    return loss, {name: part.detach() for name, part in parts.items()}


def _on_logits(method: str, options: Mapping[str, Any]) -> Callable[..., Tensor]:
    function = getattr(importlib.import_module(f"distill.objectives.{method}"), method)
    if "targets" in inspect.signature(function).parameters:
        return partial(function, **options)
    return lambda student, teacher, targets: function(student, teacher, **options)


def _on_maps(
    method: str, options: Mapping[str, Any], student_channels: int, teacher_channels: int
) -> Callable[[Tensor, Tensor], Tensor]:
    room = importlib.import_module(f"distill.objectives.{method}")
    if (owner := getattr(room, method.title().replace("_", ""), None)) is not None:
        return owner(student_channels, teacher_channels, **options)
    return partial(getattr(room, method), **options)
