"""A student: a timm model with its input contract."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from distill.errors import InputError
from distill.features import Features
from distill.inputs import InputAdapter, InputContract, Preparation

HEADS = ("cls", "dist")
"""The class head and, where a model has two outputs, the distillation head."""


class Student(nn.Module):
    """Images in [0, 1], [B, C, H, W] of any size -> `Features`, with all heads in train and eval mode alike.

    `architecture` and `model_args` are what `timm.create_model` makes the same model of; `preparation` is how its data
    were made of images.
    """

    def __init__(
        self,
        model: nn.Module,
        contract: InputContract,
        *,
        architecture: str,
        model_args: Mapping[str, Any],
        preparation: Preparation | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.adapter = InputAdapter(contract)
        self.architecture = architecture
        self.model_args = dict(model_args)
        self.preparation = preparation or Preparation(len(contract.mean))
        if (set_distilled_training := getattr(model, "set_distilled_training", None)) is not None:
            set_distilled_training(True)
        self.train(self.training)

    def train(self, mode: bool = True) -> Student:
        """As usual, except that the module which decides on one or two outputs always takes itself to be in training.

        timm's two-headed models return both heads only in training. Dropout, batch norm and stochastic depth are
        modules of their own and follow `mode`.
        """
        super().train(mode)
        for module in self.model.modules():
            if hasattr(module, "distilled_training"):
                module.training = True
        return self

    def checkpoint_gradients(self) -> None:
        """Recompute activations in the backward pass.

        Raises:
            InputError: timm has not built that into this model.
        """
        switch = getattr(self.model, "set_grad_checkpointing", None)
        try:
            assert switch is not None
            switch(True)
        except AssertionError:  # timm's own answer for models that define the switch without having it
            raise InputError(
                f"train.gradient_checkpointing: {self.architecture} does not support it; set it to false."
            ) from None

    @cached_property
    def heads(self) -> tuple[str, ...]:
        """Names of the heads: ("cls",), or ("cls", "dist") for a model that also has a distillation head."""
        was_training = self.training
        try:
            with torch.no_grad():
                return tuple(self.eval().logits(self._blank()))
        finally:
            self.train(was_training)

    def logits(self, images: Tensor) -> dict[str, Tensor]:
        """The logits [B, classes] by head. Not compiled where `forward` is: evaluation has other shapes and modes."""
        return _by_head(self.model(self.adapter(images)))

    def forward(self, images: Tensor, want: tuple[int, ...] = ()) -> Features:
        """The logits, and the maps of the blocks in `want`, which rise; of a CNN or a pyramid they are stages, as timm
        counts them. A map is what comes out of a block: tokens on the patch grid, without prefix tokens, or a feature
        map, [B, D, H, W].
        """
        if not want:
            return Features(self.logits(images), {})
        model: Any = self.model
        features, maps = model.forward_intermediates(self.adapter(images), indices=list(want))
        return Features(_by_head(model.forward_head(features)), dict(zip(want, maps, strict=True)))

    def map_channels(self) -> list[int]:
        """The channels D of each block's map, as `forward` gives it.

        Raises:
            InputError: timm cannot read the maps of this model.
        """
        was_training = self.training
        model: Any = self.model
        try:
            with torch.no_grad():
                maps = model.eval().forward_intermediates(self._blank(), intermediates_only=True)
        except (AttributeError, AssertionError, NotImplementedError) as error:
            raise InputError(
                f"student.model: {self.architecture} does not give its feature maps ({error}). Take another model, or "
                "distillation methods on logits."
            ) from None
        finally:
            self.train(was_training)
        return [found.shape[1] for found in maps]

    def _blank(self) -> Tensor:
        """An image of the student's size, all zeros: [1, C, size, size]."""
        contract = self.adapter.contract
        assert contract.size is not None, "a student has one input size"
        return next(self.parameters()).new_zeros(1, len(contract.mean), contract.size, contract.size)

    def timm_config(self, class_names: Sequence[str]) -> dict[str, Any]:
        """config.json of a folder that `timm.create_model("local-dir:FOLDER", pretrained=True)` loads."""
        contract = self.adapter.contract
        known: Mapping[str, Any] = getattr(self.model, "pretrained_cfg", None) or {}
        size = contract.size
        assert size is not None, "a student has one input size"
        return {
            "architecture": self.architecture,
            "num_classes": len(class_names),
            "num_features": self.model.num_features,
            "label_names": list(class_names),
            "model_args": self.model_args,
            "preparation": self.preparation._asdict(),
            "pretrained_cfg": {
                "num_classes": len(class_names),
                "input_size": [len(contract.mean), size, size],
                "fixed_input_size": bool(known.get("fixed_input_size", False)),
                "interpolation": contract.interpolation,
                "crop_pct": 1.0,
                "crop_mode": "center" if self.preparation.square else "squash",
                "mean": list(contract.mean),
                "std": list(contract.std),
                **{key: _as_json(known[key]) for key in ("first_conv", "classifier") if known.get(key)},
            },
        }


def _by_head(output: Tensor | tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    outputs = output if isinstance(output, tuple) else (output,)
    return dict(zip(HEADS, outputs, strict=False))


def _as_json(names: str | Sequence[str]) -> str | list[str]:
    return names if isinstance(names, str) else list(names)
