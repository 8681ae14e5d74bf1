"""Vision transformers based on timm's, registered with timm under their own names.

`vit_nano` ... `vit_huge` are ViT and DeiT (Dosovitskiy et al. 2020, arXiv 2010.11929; Touvron et al. 2021, arXiv
2012.12877) at the sizes of recipes; `<kind>_vit_<size>`, such as `area_vit_tiny`, have another attention in some
blocks. The names differ from timm's, so that timm alone refuses such a model instead of building it with standard
attention.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import timm
from pydantic import Field
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from torch import SymInt, Tensor, nn

from distill import registry
from distill.options import AttentionOptions, Grid, Key, Problem, StudentOptions
from distill.recipe.initialization import Impulse, Initialization, Mimetic, Select
from distill.recipe.sizes import DEFAULT_PATCH_SIZE, MOST_PATCHES_A_SIDE, VIT_SIZES
from distill.registry import register
from distill.students.attention.base import AttentionContext, AttentionKind, PatchGrid, SharedState, named_in
from distill.students.builder import Builder, Built, Images, inputs_of
from distill.students.initialization import initialize_impulse, initialize_mimetic
from distill.students.selection import initialize_selected
from distill.students.stem import ConvStem
from distill.students.weights import load_timm_weights


class Options(StudentOptions):
    family = "vit"
    models = tuple(VIT_SIZES)
    init: Initialization | None = Field(
        None, description="Initial weights of a vit_* student other than timm's random ones; null: those."
    )

    def grid(self, resolution: int) -> Grid:
        patch = self.patch_size or DEFAULT_PATCH_SIZE
        side = resolution // patch if resolution % patch == 0 else None
        return Grid(VIT_SIZES[self.model].depth, side, 1 if self.distillation_token is False else 2)

    def check(self, recipe: Any, at: Key) -> Iterator[Problem]:
        yield from super().check(recipe, at)
        patch, resolution = self.patch_size or DEFAULT_PATCH_SIZE, recipe.data.resolution
        involved = ((*at, "patch_size"), (*at, "model"), ("data", "resolution"))
        grid = self.grid(resolution)
        if grid.side is None:
            yield Problem(involved, f"data.resolution {resolution} is not divisible by the patch size {patch}")
        elif grid.side > MOST_PATCHES_A_SIDE:
            most = MOST_PATCHES_A_SIDE
            side = grid.side
            yield Problem(involved, f"{side}x{side} patches need too much memory; at most {most}x{most}")
        for side, key in recipe.other_sides.items():
            if side % patch:
                yield Problem((key, *involved), f"{side} is not divisible by the patch size {patch}")
        if self.stem == "conv" and patch & (patch - 1):
            yield Problem(
                ((*at, "stem"), (*at, "patch_size")),
                f"a conv stem halves the image: the patch size {patch} is no power of 2",
            )
        yield from self.attention.check_grid(grid, recipe, (*at, "attention"))
        if self.init is not None:
            for key in ("pretrained", "weights"):
                if getattr(self, key):
                    message = f"the student starts from these weights, or from those of student.{key}; leave one out"
                    yield Problem(((*at, "init"), (*at, key)), message)
        if isinstance(self.init, Select) and self.init.source is None:
            yield Problem(((*at, "init", "source"),), "name a timm model with weights, or an export folder")
        if isinstance(self.init, Impulse) and grid.side is not None and self.init.window > grid.side:
            yield Problem(
                ((*at, "init", "window"), *involved),
                f"a window of {self.init.window} is larger than the {grid.side}x{grid.side} patch grid",
            )
        if self.distillation_token is not False and (untaught := recipe.untaught_head()) is not None:
            yield untaught


# Arguments of timm's model_args and of the functions below, besides width, depth and heads of a size:
#   img_size, patch_size, in_chans, num_classes, drop_path_rate, ...: as in timm
#   distilled (bool): with DeiT's distillation token and second head
#   head ("both", "cls", "dist"): of a distilled model; one of the two alone, called `head`, where it is not both
#   stem ("patch", "conv")
#   attention (mapping; <kind>_vit_* only): `blocks` and the options of the kind's module, as in a recipe


class AttentionVisionTransformer(VisionTransformer):
    """timm's VisionTransformer with another attention in some blocks."""

    dynamic_img_size: bool

    def __init__(self, *args: Any, kind: str, attention: Mapping[str, Any], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        variant = registry.find("attention", kind)
        options: Any = variant.options.model_validate({"kind": kind, **attention})
        blocks = options.chosen(len(self.blocks))
        if wrong := [index for index in blocks if not 0 <= index < len(self.blocks)]:
            raise ValueError(f"attention.blocks: there are blocks 0 to {len(self.blocks) - 1}, got {wrong}")
        self.patch_grid = PatchGrid(*self.patch_embed.grid_size)
        self.shared = SharedState()
        for index in blocks:
            plain = self.blocks[index].attn
            context = AttentionContext(
                dim=plain.qkv.in_features,
                num_heads=plain.num_heads,
                qkv_bias=plain.qkv.bias is not None,
                grid=self.patch_grid,
                num_prefix_tokens=self.num_prefix_tokens,
                block=index,
                depth=len(self.blocks),
                shared=self.shared,
            )
            self.blocks[index].attn = _replacement(plain, kind, variant.implementation.build(context, options))

    def _pos_embed(self, x: Tensor) -> Tensor:
        # [B, H, W, C] with dynamic image size, else [B, H * W, C].
        grid = x.shape[1:3] if self.dynamic_img_size else self.patch_embed.grid_size
        self.patch_grid.height, self.patch_grid.width = grid
        self.shared.clear()
        own = tuple(self.patch_embed.grid_size)
        if not self.dynamic_img_size or any(isinstance(side, SymInt) for side in grid) or tuple(grid) != own:
            return super()._pos_embed(x)
        # In graphs that torch 2.9 to 2.11 compile, timm would resample the embedding to the size that it has: time for
        # nothing, and on CUDA a backward pass that is not deterministic.
        self.dynamic_img_size = False
        x = super()._pos_embed(x.flatten(1, 2))
        self.dynamic_img_size = True
        return x

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """AssertionError where a kind of attention shares state between blocks."""
        kinds = [module for module in self.modules() if isinstance(module, AttentionKind)]
        assert not enable or all(kind.recomputable for kind in kinds), "blocks that share maps cannot be computed again"
        super().set_grad_checkpointing(enable)

    def no_weight_decay(self) -> set[str]:
        """timm's parameters without weight decay, and those of the attention kinds."""
        return super().no_weight_decay() | named_in(self, AttentionKind, "no_weight_decay")

    def keeps_from_muon(self) -> set[str]:
        """Matrices of the attention kinds that are none between hidden layers."""
        return named_in(self, AttentionKind, "keeps_from_muon")


class AttentionVisionTransformerDistilled(AttentionVisionTransformer, VisionTransformerDistilled):
    """`AttentionVisionTransformer` with a distillation token and head."""


class OneHeadVisionTransformer(VisionTransformerDistilled):
    """timm's VisionTransformerDistilled with both tokens, but only one of the heads."""

    def __init__(self, *args: Any, head: str, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.head_token = TOKENS[head]
        del self.head_dist, self.distilled_training

    set_distilled_training = None
    """With one head there is no such mode."""

    def get_classifier(self) -> nn.Module:
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        super().reset_classifier(num_classes, global_pool)
        del self.head_dist

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        x = self.head_drop(x[:, self.head_token])
        return x if pre_logits else self.head(x)


class AttentionOneHeadVisionTransformer(AttentionVisionTransformer, OneHeadVisionTransformer):
    """`OneHeadVisionTransformer` with another attention in some blocks."""


TOKENS = {"cls": 0, "dist": 1}
"""Index of each head's token."""


def _replacement(plain: Any, kind: str, module: AttentionKind) -> AttentionKind:
    """The module, with the initialised projections of timm's attention."""
    if plain.attn_drop.p:
        raise ValueError(f"{kind} attention has no dropout of its weights; leave attn_drop_rate at 0")
    state = module.initial_state(plain.state_dict())
    if foreign := module.load_state_dict(state, strict=False).unexpected_keys:
        raise ValueError(f"{kind} attention has no {', '.join(foreign)}; leave out the option that needs it")
    module.proj_drop = plain.proj_drop
    return module


_CLASSES: dict[tuple[str, bool], type[VisionTransformer]] = {
    ("plain", False): VisionTransformer,
    ("plain", True): AttentionVisionTransformer,
    ("both", False): VisionTransformerDistilled,
    ("both", True): AttentionVisionTransformerDistilled,
    ("one", False): OneHeadVisionTransformer,
    ("one", True): AttentionOneHeadVisionTransformer,
}
"""By heads, and by whether some blocks have another attention."""


def _build(
    variant: str,
    kind: str | None,
    pretrained: bool,
    distilled: bool = False,
    head: str = "both",
    stem: str = "patch",
    **kwargs: Any,
) -> VisionTransformer:
    size = VIT_SIZES[variant if kind is None else variant.removeprefix(f"{kind}_")]
    model_args = {
        "patch_size": DEFAULT_PATCH_SIZE,
        "embed_dim": size.width,
        "depth": size.depth,
        "num_heads": size.heads,
        # Standard attention needs no grid and may be traced at a fixed size; other kinds follow the input's.
        "dynamic_img_size": kind is not None,
        **kwargs,
    }
    if (num_heads := model_args["num_heads"]) < 1:  # timm finds out in the forward pass
        raise ValueError(f"num_heads is at least 1, got {num_heads}")
    if head not in ("both", *TOKENS) or (head != "both" and not distilled):
        raise ValueError(f"head is 'both', 'cls' or 'dist' of a distilled model, got '{head}'")
    heads = ("plain" if not distilled else "both" if head == "both" else "one", kind is not None)
    model_cls: Callable[..., VisionTransformer] = _CLASSES[heads]
    if head != "both":
        model_args["head"] = head
    if kind is not None:
        model_args["attention"] = kwargs.get("attention", {})
        model_cls = partial(model_cls, kind=kind)
    if stem not in ("patch", "conv"):
        raise ValueError(f"stem is 'patch' or 'conv', got '{stem}'")
    if stem == "conv":
        model_args["embed_layer"] = ConvStem
    overlay = {
        "first_conv": "patch_embed.proj.0.0" if stem == "conv" else "patch_embed.proj",
        "classifier": ("head", "head_dist") if distilled and head == "both" else "head",
        **(model_args.pop("pretrained_cfg_overlay", None) or {}),
    }
    return build_model_with_cfg(
        model_cls,
        variant,
        pretrained,
        pretrained_cfg_overlay=overlay,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": 3, "feature_cls": "getter"},  # of features_only, as timm's vision transformers
        **model_args,
    )


default_cfgs: dict[str, Any] = {}
__all__ = ["AttentionVisionTransformer", "AttentionVisionTransformerDistilled"]


def _register(variant: str, kind: str | None) -> None:
    def create(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
        return _build(variant, kind, pretrained, **kwargs)

    create.__name__ = variant
    default_cfgs.update(generate_default_cfgs({variant: {"input_size": (3, 224, 224), "fixed_input_size": True}}))
    globals()[variant] = register_model(create)


def register_names() -> None:
    """Register `vit_<size>` and `<kind>_vit_<size>` with timm, for every known attention kind."""
    for kind in (None, *registry.names("attention")):
        for size in VIT_SIZES:
            variant = f"{kind}_{size}" if kind else size
            if variant not in default_cfgs:
                _register(variant, kind)


register_names()


@register("students", "vit", Options)
class Vit(Builder):
    @staticmethod
    def build(options: Options, images: Images) -> Built:
        size = VIT_SIZES[options.model]
        distilled = options.distillation_token is not False and images.num_classes > 0
        patch_size = options.patch_size or DEFAULT_PATCH_SIZE
        model_args: dict[str, Any] = {"img_size": images.resolution, "patch_size": patch_size}
        attention = options.attention
        if not isinstance(attention, AttentionOptions) and options.stem == "patch":
            # One of timm's architectures, so that an export needs only timm; the arguments define the size.
            family = options.model.removeprefix("vit_") if options.model in ("vit_small", "vit_base") else "tiny"
            architecture = f"deit_{family}_distilled_patch16_224" if distilled else f"vit_{family}_patch16_224"
            model_args |= {"embed_dim": size.width, "depth": size.depth, "num_heads": size.heads}
        else:
            architecture = options.model
            model_args |= {"distilled": distilled, "stem": options.stem}
            if isinstance(attention, AttentionOptions):
                architecture = f"{attention.kind}_{options.model}"
                model_args["attention"] = attention.model_dump(mode="json", exclude={"kind"})
        channels, statistics = inputs_of(options, images)
        register_names()
        model = timm.create_model(
            architecture,
            num_classes=images.num_classes,
            in_chans=channels,
            drop_path_rate=options.drop_path,
            **images.dynamic_size(),
            **model_args,
        )
        if options.pretrained:
            config = load_timm_weights(
                model, options.model, resolution=images.resolution, patch_size=patch_size, channels=channels
            )
            statistics = statistics or (config["mean"], config["std"])
        elif isinstance(options.init, Mimetic):
            initialize_mimetic(model, options.init)
        elif isinstance(options.init, Impulse):
            initialize_impulse(model, options.init)
        elif options.init is not None:
            statistics = initialize_selected(model, options.init, channels=channels) or statistics
        return Built(model, architecture, model_args, statistics or (images.mean, images.std))
