"""The pyramid that all families share; they differ in stem, block and what is between the stages.

Stages of blocks over maps whose grid halves and whose width doubles from stage to stage, a norm, the mean over the grid
and a linear head. No class token. With `distilled` there are two heads on the same features, for labels and teacher, as
in LeViT (Graham et al. 2021, arXiv 2104.01136, section 4.2): both in training, their mean in evaluation.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import timm
import torch
from timm.layers import DropPath, Mlp, calculate_drop_path_rates, trunc_normal_
from timm.models import build_model_with_cfg, checkpoint, register_model
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from distill.recipe.pyramids import PyramidOptions, PyramidSize
from distill.students.attention.base import AttentionMaps, head_width, named_in
from distill.students.builder import Builder, Built, Images, inputs_of

Stream = Tensor | tuple[Tensor, ...]
"""What goes from block to block: a map [B, h, w, C], or several."""


class GridAttention(nn.Module):
    """Attention over maps, for pictures."""

    def maps(self, *inputs: Any) -> AttentionMaps:
        """Where places look, given the arguments of `forward` with maps of h x w places: weights [B, heads, queries,
        K], and the h * w places that each key covers, row by row.
        """
        raise NotImplementedError

    def no_weight_decay(self) -> set[str]:
        """Names of its parameters without weight decay, besides biases and norms."""
        return set()


class Block(nn.Module):
    """x += attention(norm(x)); x += MLP(norm(x)), for maps [B, h, w, C]."""

    def __init__(self, dim: int, attention: GridAttention, drop_path: float = 0.0, mlp_ratio: float = 4.0) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = attention
        self.drop_path1 = DropPath(drop_path) if drop_path else nn.Identity()
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.drop_path2 = DropPath(drop_path) if drop_path else nn.Identity()
        self.mlp.apply(init_linear)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path1(self.attn(self.norm1(x)))
        return x + self.drop_path2(self.mlp(self.norm2(x)))


class Stage(nn.Module):
    """What leads to its grid, and blocks; `downsample` takes and gives what its blocks do."""

    def __init__(self, downsample: nn.Module, blocks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.downsample = downsample
        self.blocks = nn.ModuleList(blocks)
        self.grad_checkpointing = False

    def forward(self, x: Stream) -> Stream:
        x = self.downsample(x)
        for block in self.blocks:
            inputs = x if isinstance(x, tuple) else (x,)
            x = checkpoint(block, *inputs) if self.grad_checkpointing else block(*inputs)
        return x


class Pyramid(nn.Module):
    """Images [B, in_chans, H, W] -> logits [B, num_classes]; while `set_distilled_training(True)` and in training the
    logits of both heads.
    """

    head: Any
    head_dist: Any
    norm: nn.Module
    output_fmt = "NHWC"
    """timm's name for the order of dimensions of `forward_features`."""

    def __init__(
        self,
        *,
        stem: Callable[[int, int], nn.Module],
        downsample: Callable[[int], nn.Module],
        block: Callable[[int, int, int, float], nn.Module],
        size: PyramidSize,
        img_size: int = 224,
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: str = "avg",
        distilled: bool = False,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        norm_eps: float = 1e-5,
    ) -> None:
        """
        Args:
            stem: of (in_chans, width): images -> the first stage's stream.
            downsample: of a stage's width: its stream -> that of the next stage.
            block: of (stage, index in it, width, drop path rate).
            img_size: side in pixels of images that it is for; all others can be taken too.
            drop_rate: of the features before the heads.
            drop_path_rate: of the last block, rising linearly from 0.

        Raises:
            ValueError: heads do not divide a width, or the last grid has one place only.
        """
        super().__init__()
        depths = size.depths
        widths = [size.width * 2**stage for stage in range(len(depths))]
        if len(size.heads) != len(depths):
            raise ValueError(f"one number for each stage: {len(depths)} depths and {len(size.heads)} heads")
        for width, heads in zip(widths, size.heads, strict=True):
            head_width(width, heads)
        if size.sides(img_size)[-1] < 2:
            raise ValueError(f"{len(depths)} stages are too deep for {img_size} px: the last grid has one place")
        self.num_classes = num_classes
        self.num_features = self.head_hidden_size = widths[-1]
        self.distilled = distilled
        self.distilled_training = False
        rates = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)
        self.stem = stem(in_chans, widths[0])
        self.stages = nn.ModuleList(
            Stage(
                downsample(widths[stage - 1]) if stage else nn.Identity(),
                [block(stage, index, widths[stage], rate) for index, rate in enumerate(rates[stage])],
            )
            for stage in range(len(depths))
        )
        self.norm = nn.LayerNorm(widths[-1], eps=norm_eps)
        self.head_drop = nn.Dropout(drop_rate)
        self.feature_info = [
            {"num_chs": width, "reduction": size.patch * 2**stage, "module": f"stages.{stage}"}
            for stage, width in enumerate(widths)
        ]
        self.reset_classifier(num_classes, global_pool)

    def map_of(self, x: Stream) -> Tensor:
        """Of a stage's stream the map [B, h, w, C] that is its feature map."""
        assert isinstance(x, Tensor)
        return x

    def answer_of(self, x: Stream) -> Tensor:
        """Of the last stage's stream the map [B, h, w, C] that is normed, averaged and classified."""
        assert isinstance(x, Tensor)
        return x

    def forward_features(self, x: Tensor) -> Tensor:
        """Images -> the last map [B, h, w, C], normed."""
        stream: Stream = self.stem(x)
        for stage in self.stages:
            stream = stage(stream)
        return self.norm(self.answer_of(stream))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        x = self.head_drop(x.mean((1, 2)))
        if pre_logits:
            return x
        if not self.distilled:
            return self.head(x)
        both = self.head(x), self.head_dist(x)
        if self.distilled_training and self.training:
            return both
        return (both[0] + both[1]) / 2

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        return self.forward_head(self.forward_features(x))

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """timm's: maps [B, C, h, w] of the stages, and what `forward_head` takes; `norm` is for the last stage."""
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt is NCHW, got {output_fmt}")
        taken, last = feature_take_indices(len(self.stages), indices)
        stages = self.stages[: last + 1] if stop_early else self.stages
        maps, stream = [], self.stem(x)
        for index, stage in enumerate(stages):
            stream = stage(stream)
            if index in taken:
                found = self.map_of(stream)
                found = self.norm(found) if norm and index == len(self.stages) - 1 else found
                maps.append(found.permute(0, 3, 1, 2).contiguous())
        if intermediates_only:
            return maps
        final = self.answer_of(stream)
        return (self.norm(final) if len(stages) == len(self.stages) else final), maps

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """timm's: leave out what the maps of these stages do not need; their indices."""
        taken, last = feature_take_indices(len(self.stages), indices)
        shortened = last < len(self.stages) - 1
        self.stages = self.stages[: last + 1]
        if prune_norm or shortened:
            self.norm = nn.Identity()
        if shortened:
            self.num_features = self.head_hidden_size = self.feature_info[last]["num_chs"]
        if prune_head or shortened:
            self.reset_classifier(0)
        return taken

    def get_classifier(self) -> nn.Module | tuple[nn.Module, nn.Module]:
        return (self.head, self.head_dist) if self.distilled else self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """New heads for this many classes; 0: none, the features."""
        if global_pool not in (None, "", "avg"):
            raise ValueError(f"a pyramid averages over its grid; global_pool is 'avg', got '{global_pool}'")
        self.num_classes = num_classes
        for name in ("head", "head_dist") if self.distilled else ("head",):
            head = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()
            setattr(self, name, head.apply(init_linear))

    def merge_heads(self) -> None:
        """Replace both heads by one with the mean of their logits: (W x + b + V x + c) / 2."""
        with torch.no_grad():
            self.head.weight.add_(self.head_dist.weight).div_(2)
            self.head.bias.add_(self.head_dist.bias).div_(2)
        self.distilled = False
        del self.head_dist

    def set_distilled_training(self, enable: bool = True) -> None:
        self.distilled_training = enable

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        for stage in self.stages:
            assert isinstance(stage, Stage)
            stage.grad_checkpointing = enable

    def no_weight_decay(self) -> set[str]:
        """Parameters without weight decay: those that the attention modules name."""
        return named_in(self, GridAttention, "no_weight_decay")

    def keeps_from_muon(self) -> set[str]:
        """Kernels of single channels: no matrices between hidden layers."""
        return {
            f"{name}.weight"
            for name, module in self.named_modules()
            if isinstance(module, nn.Conv2d) and module.groups > 1
        }

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """timm's, for `layer_decay`: a layer a block, or a stage."""
        fine = [(r"^stages\.(\d+)\.downsample", (0,)), (r"^stages\.(\d+)\.blocks\.(\d+)", None), (r"^norm", (99999,))]
        return {"stem": r"^stem", "blocks": r"^stages\.(\d+)" if coarse else fine}


def check_stages(name: str, values: Sequence[int], size: PyramidSize) -> None:
    """ValueError unless there is one value for each stage."""
    if len(values) != len(size.depths):
        raise ValueError(f"{name}: one number for each of {len(size.depths)} stages, got {len(values)}")


def init_linear(module: nn.Module) -> None:
    """Linear layers: weights trunc_normal(.02), biases 0."""
    if isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def describe(sizes: Mapping[str, PyramidSize], first_conv: str | tuple[str, ...]) -> dict[str, dict[str, Any]]:
    """timm's pretrained_cfg of each size: published ones are for 224 px, those with small patches for 32."""
    return {
        name: {
            "input_size": (3, side, side),
            "fixed_input_size": False,
            "pool_size": (size.sides(side)[-1],) * 2,
            "first_conv": first_conv,
            "classifier": "head",
        }
        for name, size in sizes.items()
        for side in [224 if size.patch == 4 else 32]
    }


def register_sizes(
    model_cls: type[Pyramid],
    sizes: Mapping[str, PyramidSize],
    arguments: Mapping[str, Mapping[str, Any]] | None = None,
) -> None:
    """Register a constructor of the class with timm for each of its sizes, which is its first argument, with further
    `arguments` of some of them. The constructors also take width, depths, heads and window.

    The module of the class has the `default_cfgs`.
    """
    module = sys.modules[model_cls.__module__]

    def of(variant: str, own: PyramidSize) -> Callable[..., Any]:
        def create(pretrained: bool = False, **kwargs: Any) -> Any:
            given: dict[str, Any] = {
                key: kwargs.pop(key) for key in ("width", "depths", "heads", "window") if key in kwargs
            }
            size = own.changed(given)
            overlay = kwargs.pop("pretrained_cfg_overlay", None) or {}
            classifier = ("head", "head_dist") if kwargs.get("distilled") else "head"
            return build_model_with_cfg(
                model_cls,
                variant,
                pretrained,
                pretrained_cfg_overlay={"classifier": classifier, **overlay},
                feature_cfg={"out_indices": tuple(range(len(size.depths))), "feature_cls": "getter"},
                size=size,
                **{"img_size": 224 if own.patch == 4 else 32, **(arguments or {}).get(variant, {}), **kwargs},
            )

        create.__name__ = create.__qualname__ = variant
        create.__module__ = module.__name__
        return create

    for variant, size in sizes.items():
        setattr(module, variant, register_model(of(variant, size)))


class PyramidBuilder(Builder):
    """Builds the models of any family of pyramids."""

    @staticmethod
    def build(options: PyramidOptions, images: Images) -> Built:
        model_args = {
            "img_size": images.resolution,
            "distilled": options.distillation_token is not False and images.num_classes > 0,
            **options.model_args(),
        }
        channels, _ = inputs_of(options, images)
        model = timm.create_model(
            options.model,
            num_classes=images.num_classes,
            in_chans=channels,
            drop_path_rate=options.drop_path,
            **model_args,
        )
        return Built(model, options.model, model_args, (images.mean, images.std))
