"""Variants as somebody else's package would bring them, in one file: an attention kind, a student, two methods, a
source of what teaches and a dataset reader."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Any, Literal

import timm
import torch
from pydantic import Field
from timm.models import build_model_with_cfg, register_model
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from distill.data.opening import DataReader
from distill.data.packed import Packed
from distill.features import Features
from distill.methods.base import Method, Shapes, StepInputs
from distill.options import AttentionOptions, MapsOptions, MethodOptions, Needs, SourceOptions, StudentOptions
from distill.recipe import Data
from distill.registry import register
from distill.students.attention import AttentionContext, AttentionKind, AttentionMaps
from distill.students.builder import Builder, Built, Images
from distill.teaching.source import SourceContext, StepIndex, TeacherSource

# An attention kind that refines its maps by a convolution over the grid and adds those of the block before.


class CarriedOptions(AttentionOptions):
    kind: Literal["carried"]
    share: float = Field(0.5, ge=0.0, le=1.0, description="Of the maps of the block before.")


@register("attention", "carried", CarriedOptions)
class Carried(AttentionKind):
    def __init__(self, context: AttentionContext, options: CarriedOptions) -> None:
        super().__init__()
        self.context, self.share = context, options.share
        self.qkv = nn.Linear(context.dim, 3 * context.dim, bias=context.qkv_bias)
        self.proj = nn.Linear(context.dim, context.dim)
        self.proj_drop: nn.Module = nn.Identity()
        self.mix = nn.Conv2d(context.num_heads, context.num_heads, 3, padding=1)
        nn.init.zeros_(self.mix.weight)
        nn.init.zeros_(self.mix.bias)

    def _weights(self, x: Tensor) -> tuple[Tensor, Tensor]:
        batch, count, dim = x.shape
        heads = self.context.num_heads
        query, key, value = self.qkv(x).view(batch, count, 3, heads, dim // heads).permute(2, 0, 3, 1, 4)
        weights = (query @ key.transpose(-1, -2) * (dim // heads) ** -0.5).softmax(-1)
        return (weights + self.mix(weights)).softmax(-1), value

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        weights, value = self._weights(x)
        if (before := self.context.shared.get("maps")) is not None:
            weights = (1 - self.share) * weights + self.share * before
        self.context.shared["maps"] = weights
        return self.proj_drop(self.proj((weights @ value).transpose(1, 2).flatten(2)))

    def maps(self, x: Tensor, queries: int) -> AttentionMaps:
        weights, _ = self._weights(x)
        return AttentionMaps(weights[:, :, :queries], torch.eye(x.shape[1], device=x.device))


# A student without class token.


@register_model
def stranger_vit(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    sizes: dict[str, Any] = {"patch_size": 4, "embed_dim": 48, "depth": 3, "num_heads": 3, "img_size": 8}
    without_token = {"class_token": False, "global_pool": "avg"}
    return build_model_with_cfg(VisionTransformer, "stranger_vit", pretrained, **(sizes | without_token | kwargs))


class AverageOptions(StudentOptions):
    family = "averaging"
    models = ("stranger_vit",)
    width: int = Field(48, gt=0, description="Of its tokens.")


@register("students", "averaging", AverageOptions)
class Averaging(Builder):
    @staticmethod
    def build(options: AverageOptions, images: Images) -> Built:
        model_args = {"img_size": images.resolution, "embed_dim": options.width}
        model = timm.create_model(
            "stranger_vit",
            num_classes=images.num_classes,
            in_chans=images.channels,
            drop_path_rate=options.drop_path,
            **model_args,
        )
        return Built(model, "stranger_vit", model_args, (images.mean, images.std))


# A method that sees all maps at once and keeps a queue of what the teacher said.


class QueueOptions(MapsOptions):
    method: Literal["queue"]
    size: int = Field(32, gt=0, description="Samples in the queue.")


@register("methods", "queue", QueueOptions)
class Queue(Method):
    """Relations of all of a sample's maps to those in a queue of the teacher's."""

    queue: Tensor

    def __init__(self, options: QueueOptions, shapes: Shapes) -> None:
        super().__init__(options, shapes)
        self.blocks = tuple(range(len(shapes.student_channels)))
        self.maps = tuple(shapes.stages)
        self.project = nn.Linear(sum(shapes.student_channels), sum(shapes.teacher_channels.values()))
        self.register_buffer("queue", torch.zeros(options.size, self.project.out_features))

    def forward(self, step: StepInputs) -> Tensor:
        student = self.project(_pooled(step.student[0].maps)) @ self.queue.T
        teacher = _pooled(step.teacher[0].maps) @ self.queue.T
        return F.mse_loss(student, teacher) + student.square().mean() * 1e-3

    def after_step(self, step: StepInputs, skipped: Tensor) -> None:
        new = torch.cat([_pooled(step.teacher[0].maps), self.queue])[: len(self.queue)]
        self.queue.copy_(torch.where(skipped, self.queue, new))


def _pooled(maps: Mapping[Any, Tensor]) -> Tensor:
    return torch.cat([found.float().mean((2, 3)) for found in maps.values()], 1)


# A method on two views.


class TwoViewsOptions(MethodOptions):
    needs = Needs(logits=True, views=2)
    method: Literal["two_views"]


@register("methods", "two_views", TwoViewsOptions)
class TwoViews(Method):
    """The student's answer to one view follows the teacher's to the other."""

    def forward(self, step: StepInputs) -> Tensor:
        losses = [
            F.cross_entropy(
                step.student[one].logits["cls"].float(), step.teacher[other].logits["cls"].float().softmax(1)
            )
            for one, other in ((0, 1), (1, 0))
        ]
        return torch.stack(losses).mean()


# What teaches is the student's own moving average.


class AverageOfStudentOptions(SourceOptions):
    source: Literal["average"]
    momentum: float = Field(0.9, ge=0.0, lt=1.0, description="Of the average.")


@register("teachers", "average", AverageOfStudentOptions)
class AverageOfStudent(TeacherSource):
    def __init__(self, options: AverageOfStudentOptions, context: SourceContext) -> None:
        self.momentum, self.student = options.momentum, context.student
        self.average = deepcopy(context.student).requires_grad_(False).eval()

    @torch.no_grad()
    def ask(self, views: Sequence[Tensor], index: StepIndex) -> list[Features]:
        return [Features(self.average.logits(view), {}) for view in views]

    @torch.no_grad()
    def after_step(self, step: int, skipped: Tensor) -> None:
        share = torch.where(skipped, 0.0, 1 - self.momentum)
        for average, current in zip(self.average.parameters(), self.student.parameters(), strict=True):
            average.copy_(torch.lerp(average, current.detach(), share))

    def state_dict(self) -> dict[str, Tensor]:
        return self.average.state_dict()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self.average.load_state_dict(state)


# A dataset reader.


class StripesOptions(Data):
    shine: int = Field(250, ge=100, le=255, description="Of the row that tells the class.")


@register("datasets", "stripes", StripesOptions)
class Stripes(DataReader):
    @classmethod
    def read(cls, options: StripesOptions) -> Packed:
        """Images of 8 px whose class is the row that shines."""
        generator = torch.Generator().manual_seed(0)
        tensors = {}
        for split, size in (("train", 128), ("test", 20)):
            labels = torch.arange(size) % 4
            images = torch.randint(0, 80, (size, 3, 8, 8), generator=generator, dtype=torch.uint8)
            images[torch.arange(size), :, 2 * labels] = options.shine
            tensors |= {f"{split}.images": images, f"{split}.labels": labels}
        return Packed("stripes", ("a", "b", "c", "d"), tensors, {})
