"""A student: a timm model, its input contract, and its one or two heads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from distill.errors import InputError
from distill.inputs import InputAdapter, InputContract, Preparation


class Heads(NamedTuple):
    """Logits [B, classes] of the class head and, where there is one, of the distillation head."""

    cls: Tensor
    dist: Tensor | None

    @property
    def fused(self) -> Tensor:
        """What the model answers: the mean of its heads' logits (Touvron et al. 2021, section 4)."""
        return self.cls if self.dist is None else (self.cls + self.dist) / 2


class Student(nn.Module):
    """Images in [0, 1], [B, C, H, W] of any size -> `Heads`, with both heads in train and eval mode alike.

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

    def logits(self, images: Tensor) -> Heads:
        return _heads(self.model(self.adapter(images)))

    def forward(self, images: Tensor, blocks: tuple[int, ...] = ()) -> Any:
        """`Heads`; with `blocks` (rising; of a CNN or a pyramid they are stages, as timm counts them) `Heads` and, by
        block, what comes out of it: tokens on the patch grid, without prefix tokens, or a feature map, [B, D, H, W].
        """
        if not blocks:
            return self.logits(images)
        model: Any = self.model
        features, maps = model.forward_intermediates(self.adapter(images), indices=list(blocks))
        return _heads(model.forward_head(features)), dict(zip(blocks, maps, strict=True))

    def map_channels(self) -> list[int]:
        """The channels D of each block's map, as `forward` gives it.

        Raises:
            InputError: timm cannot read the maps of this model.
        """
        contract, was_training = self.adapter.contract, self.training
        assert contract.size is not None, "a student has one input size"
        blank = next(self.parameters()).new_zeros(1, len(contract.mean), contract.size, contract.size)
        model: Any = self.model
        try:
            with torch.no_grad():
                maps = model.eval().forward_intermediates(blank, intermediates_only=True)
        except (AttributeError, AssertionError, NotImplementedError) as error:
            raise InputError(
                f"student.model: {self.architecture} does not give its feature maps ({error}). Take another model, or "
                "distillation methods on logits."
            ) from None
        finally:
            self.train(was_training)
        return [found.shape[1] for found in maps]

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


def _heads(output: Tensor | tuple[Tensor, Tensor]) -> Heads:
    return Heads(*output) if isinstance(output, tuple) else Heads(output, None)


def _as_json(names: str | Sequence[str]) -> str | list[str]:
    return names if isinstance(names, str) else list(names)
