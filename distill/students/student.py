"""A student: a timm model with its input contract."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any, cast

import torch
from torch import Tensor, nn

from distill.errors import InputError
from distill.features import Features, Stage, example_image, final_and_maps, problem_of_maps, with_maps
from distill.inputs import InputAdapter, InputContract, Preparation
from distill.options import Key, dotted
from distill.students.embedding import embedding_of, regions_of

CROP_MODES = {"crop": "center", "squash": "squash", "pad": "border"}
"""timm's names for `data.fit`; its border has the mean colour."""
HEADS = ("cls", "dist")
"""The class head and, where a model has two outputs, the distillation head."""


class Student(nn.Module):
    """Images in [0, 1], [B, C, H, W] of any size -> `Features`, with all heads in train and eval mode alike.

    A student of a run without labels has no heads and no logits; its model answers with the embedding.

    `timm.create_model` builds the same model from `architecture` and `model_args`; `preparation` describes the
    preprocessing of its data.
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
        self._has_heads = getattr(model, "num_classes", None) != 0  # as in timm
        if (set_distilled_training := getattr(model, "set_distilled_training", None)) is not None:
            set_distilled_training(True)
        self.train(self.training)

    def train(self, mode: bool = True) -> Student:
        """Like `nn.Module.train`, but keeps timm's `distilled_training` modules in training mode.

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
            InputError: timm does not support it for this model.
        """
        switch = getattr(self.model, "set_grad_checkpointing", None)
        try:
            assert switch is not None
            switch(True)
        except AssertionError:  # raised by timm's models that define the method without supporting it
            raise InputError(
                f"train.gradient_checkpointing: {self.architecture} does not support it; set it to false."
            ) from None

    @cached_property
    def heads(self) -> tuple[str, ...]:
        """Names of the heads: ("cls",), or ("cls", "dist") for a model that also has a distillation head; () without a
        classifier.
        """
        if not self._has_heads:
            return ()
        was_training = self.training
        try:
            with torch.no_grad():
                return tuple(self.eval().logits(self._example()))
        finally:
            self.train(was_training)

    def logits(self, images: Tensor) -> dict[str, Tensor]:
        """The logits [B, classes] by head. Never compiled, unlike `forward`: evaluation has other shapes and modes."""
        return self._logits(self.adapter(images))

    def _logits(self, inputs: Tensor) -> dict[str, Tensor]:
        return _by_head(self.model(inputs)) if self._has_heads else {}

    def embedding(self, images: Tensor) -> Tensor:
        """`Features.embedding`, [B, D]; never compiled."""
        return embedding_of(self.model, self.model.forward_features(self.adapter(images)))  # type: ignore[operator]

    def forward(
        self, images: Tensor, want: tuple[int, ...] = (), side: int | None = None, embed: bool = False
    ) -> Features:
        """The logits, and what is asked for.

        Args:
            want: the maps [B, D, H, W] of these `stages`, from 0 and rising: a block's tokens on the patch grid,
                without prefix tokens, or the output of a CNN's or pyramid's stage.
            side: resize the images to that many pixels, not to the size of the contract.
            embed: embedding and regions too.
        """
        embed = embed or not self._has_heads  # which is then its answer
        if not want and side is None and not embed:
            return Features(self.logits(images), {})
        inputs = self.adapter(images, side)
        if not want and not embed:
            return Features(self._logits(inputs), {})
        model: Any = self.model
        final, maps = final_and_maps(model, inputs, want) if want else (model.forward_features(inputs), [])
        features = Features(
            _by_head(model.forward_head(final)) if self._has_heads else {}, dict(zip(want, maps, strict=True))
        )
        if not embed:
            return features
        return features._replace(embedding=embedding_of(model, final), regions=regions_of(model, final))

    @cached_property
    def embedding_width(self) -> int:
        """D of `Features.embedding`."""
        return self._embed_example()[0].shape[1]

    @cached_property
    def region_width(self) -> int | None:
        """E of `Features.regions`; None: there are none."""
        regions = self._embed_example()[1]
        return None if regions is None else regions.shape[2]

    def check_embedding(self) -> None:
        """Raise InputError unless `forward` returns an embedding, the model's own answer where it has no head."""
        try:
            embedding, _, answer = self._embed_example()
            problem = None if embedding.dim() == 2 else f"it is {list(embedding.shape)} instead of [batch, features]"
            if problem is None and not self._has_heads and not torch.equal(embedding, answer):
                problem = "it answers with something else"
        except (AttributeError, AssertionError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
            problem = str(error).partition("\n")[0] or type(error).__name__
        if problem is not None:
            raise InputError(
                f"student.model: {self.architecture} does not give its features ({problem}). Take another model, or "
                "train a classifier with labels."
            )

    def _embed_example(self) -> tuple[Tensor, Tensor | None, Any]:
        """Embedding and regions of an example image in evaluation, and what the model answers."""
        was_training = self.training
        try:
            with torch.no_grad():
                inputs, model = self.eval().adapter(self._example()), cast(Any, self.model)
                final = model.forward_features(inputs)
                return embedding_of(model, final), regions_of(model, final), model(inputs)
        finally:
            self.train(was_training)

    @cached_property
    def stages(self) -> tuple[Stage, ...]:
        """The stages whose maps `forward` can return, first to last.

        Raises:
            InputError: this model cannot return its maps along with its logits.
        """
        image, maps = self._example(), self._try_maps(None)
        known = getattr(self.model, "feature_info", None) or []
        names = [stage["module"] for stage in getattr(known, "info", known)]
        if len(names) != len(maps):
            names = [str(index) for index in range(len(maps))]
        strides = [round(image.shape[2] / found.shape[2]) for found in maps]
        return tuple(map(Stage, names, (found.shape[1] for found in maps), strides))

    def check_maps(self, want: tuple[int, ...], side: int | None = None, key: Key = ("student", "model")) -> None:
        """Raise InputError, which begins with the key, unless `forward` returns these maps, and the same logits as
        without them.
        """
        if want:
            self._try_maps(want, side, key)

    def _try_maps(
        self, want: tuple[int, ...] | None, side: int | None = None, at: Key = ("student", "model")
    ) -> list[Tensor]:
        """Maps of an example image, in evaluation; `want` None: all of them."""
        was_training = self.training
        try:
            with torch.no_grad(), _nonzero_weights(self.model):
                inputs = self.eval().adapter(self._example(), side)
                plain = _by_head(self.model(inputs))
                output, maps = with_maps(self.model, inputs, want)
                problem = problem_of_maps(list(_by_head(output).values()), list(plain.values()), maps)
        except (AttributeError, AssertionError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
            problem = str(error).partition("\n")[0] or type(error).__name__
        finally:
            self.train(was_training)
        if problem is None:
            return maps
        which = f" of {side} px images" if side else ""
        raise InputError(
            f"{dotted(at)}: {self.architecture} does not give its feature maps{which} ({problem}). Take another "
            "model, or distillation methods on logits."
        )

    def _example(self) -> Tensor:
        contract = self.adapter.contract
        assert contract.size is not None, "a student has one input size"
        return example_image(len(contract.mean), contract.size, next(self.parameters()).device)

    def timm_config(self, class_names: Sequence[str]) -> dict[str, Any]:
        """config.json for `timm.create_model("local-dir:FOLDER", pretrained=True)`; no classes without a head."""
        contract, class_names = self.adapter.contract, class_names if self._has_heads else ()
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
                "crop_mode": CROP_MODES[self.preparation.fit] if self.preparation.square else "squash",
                "mean": list(contract.mean),
                "std": list(contract.std),
                **{key: _as_json(known[key]) for key in ("first_conv", "classifier") if known.get(key)},
            },
        }


@contextmanager
def _nonzero_weights(model: nn.Module) -> Iterator[None]:
    """Within, fill all-zero matrices with small random numbers: the logits of a zero-initialised head say nothing."""
    zeros = [weight for weight in model.parameters() if weight.ndim > 1 and not weight.any()]
    generator = torch.Generator().manual_seed(0)
    try:
        for weight in zeros:
            weight.copy_(0.02 * torch.randn(weight.shape, generator=generator))
        yield
    finally:
        for weight in zeros:
            weight.zero_()


def _by_head(output: Tensor | tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    outputs = output if isinstance(output, tuple) else (output,)
    return dict(zip(HEADS, outputs, strict=False))


def _as_json(names: str | Sequence[str]) -> str | list[str]:
    return names if isinstance(names, str) else list(names)
