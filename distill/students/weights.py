"""Initial weights of a student from timm or from an earlier export."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import timm
import torch
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from torch import Tensor, nn

from distill.errors import InputError
from distill.students.attention.base import AttentionKind
from distill.students.saved import Saved

# (size, with distillation token) -> timm's weights. DeiT has three distilled sizes; large and huge are ViT's.
TIMM_WEIGHTS = {
    ("vit_tiny", True): "deit_tiny_distilled_patch16_224.fb_in1k",
    ("vit_small", True): "deit_small_distilled_patch16_224.fb_in1k",
    ("vit_base", True): "deit_base_distilled_patch16_224.fb_in1k",
    ("vit_large", True): "vit_large_patch16_224.augreg_in21k_ft_in1k",
    ("vit_huge", True): "vit_huge_patch14_224.orig_in21k",
    ("vit_tiny", False): "vit_tiny_patch16_224.augreg_in21k_ft_in1k",
    ("vit_small", False): "vit_small_patch16_224.augreg_in21k_ft_in1k",
    ("vit_base", False): "vit_base_patch16_224.augreg_in21k_ft_in1k",
    ("vit_large", False): "vit_large_patch16_224.augreg_in21k_ft_in1k",
    ("vit_huge", False): "vit_huge_patch14_224.orig_in21k",
}


def create_pretrained(name: str, key: str = "student.pretrained", /, **kwargs: Any) -> Any:
    """timm's pretrained model; timm adapts patches, positions and channels, and drops a head of other classes.

    Raises:
        InputError: its weights cannot be downloaded or used; it names the recipe's `key`.
    """
    try:
        return timm.create_model(name, pretrained=True, **kwargs)
    except OSError as error:
        raise InputError(f"{key}: timm's weights {name} cannot be downloaded ({error}).") from error
    except Exception as error:  # a damaged file, or one that is not only tensors, can fail in any way
        reason = str(error).strip().partition("\n")[0]
        raise InputError(f"{key}: timm's weights {name} cannot be used ({reason}).") from error


def load_timm_weights(
    model: VisionTransformer, size: str, *, resolution: int, patch_size: int, channels: int
) -> Mapping[str, Any]:
    """Load timm's weights for a named size, resampled to the student's grid; returns their pretrained_cfg.

    Heads for other classes and an attention kind's own parameters keep their random weights. A missing distillation
    token is initialised with the class token.

    Raises:
        InputError: timm has no weights for this size or stem, or they cannot be downloaded.
    """
    distilled = hasattr(model, "dist_token")
    if (size, distilled) not in TIMM_WEIGHTS:
        sizes = ", ".join(dict.fromkeys(known for known, _ in TIMM_WEIGHTS))
        raise InputError(f"student.pretrained: timm has no weights for {size}; it has them for {sizes}.")
    if not hasattr(model.patch_embed.proj, "weight"):
        raise InputError("student.pretrained: timm's weights have a patch stem; set student.stem to patch.")
    source = create_pretrained(
        TIMM_WEIGHTS[size, distilled],
        num_classes=model.num_classes, in_chans=channels, img_size=resolution, patch_size=patch_size,
    )  # fmt: skip
    weights = source.state_dict()
    if distilled and "dist_token" not in weights:
        add_distillation_token(weights)
    convert_attention(model, weights)
    result = model.load_state_dict(weights, strict=False)
    assert not result.unexpected_keys, result.unexpected_keys
    assert all(key.startswith("head_dist.") or ".attn." in key for key in result.missing_keys), result.missing_keys
    return source.pretrained_cfg


def add_distillation_token(weights: dict[str, Tensor]) -> None:
    """In place: one that is the class token, at its position."""
    weights["dist_token"] = weights["cls_token"]
    weights["pos_embed"] = torch.cat([weights["pos_embed"][:, :1], weights["pos_embed"]], dim=1)


def convert_attention(model: nn.Module, weights: dict[str, Tensor]) -> None:
    """In place: the weights of timm's attention become what the model's attention kinds start with."""
    for name, module in model.named_modules():
        if isinstance(module, AttentionKind):
            prefix = f"{name}."
            own = {key.removeprefix(prefix): weights.pop(key) for key in list(weights) if key.startswith(prefix)}
            weights |= {prefix + key: tensor for key, tensor in module.initial_state(own).items()}


def load_saved_weights(model: nn.Module, saved: Saved, source: str) -> None:
    """Load an export's weights; positions are resampled to the model's grid, heads for other classes stay random.

    To the weights of a student without a classifier the model adds its own heads and distillation token.

    Raises:
        InputError: lists keys that are missing, unknown or of another shape.
    """
    weights: dict[str, Tensor] = dict(saved.weights)
    own = model.state_dict()
    classes = saved.config.get("num_classes")
    if not classes and "dist_token" in own and "dist_token" not in weights:
        weights["dist_token"] = own["dist_token"]
        if "pos_embed" in weights and not model.no_embed_class:
            positions = weights["pos_embed"]  # of class token and patches
            weights["pos_embed"] = torch.cat([positions[:, :1], own["pos_embed"][:, 1:2], positions[:, 1:]], dim=1)
    if on_square_grid(model, weights):
        weights = checkpoint_filter_fn(weights, model)
    if classes != model.num_classes:
        known: Mapping[str, Any] = saved.config["pretrained_cfg"] if classes else getattr(model, "pretrained_cfg", {})
        heads = known.get("classifier") or ()
        for head in (heads,) if isinstance(heads, str) else heads:
            weights |= {key: tensor for key, tensor in own.items() if key.startswith(f"{head}.")}
    problems = {
        "missing": own.keys() - weights.keys(),
        "unknown": weights.keys() - own.keys(),
        "of another shape": {key for key in own.keys() & weights.keys() if own[key].shape != weights[key].shape},
    }
    if any(problems.values()):
        listed = "; ".join(f"{what}: {_listed(keys)}" for what, keys in problems.items() if keys)
        raise InputError(f"student.weights: {source} holds another student than the recipe's ({listed}).")
    model.load_state_dict(weights)


def on_square_grid(model: nn.Module, weights: Mapping[str, Tensor]) -> bool:
    """Whether `weights` have a position for each of the model's prefix tokens and for every patch of a square grid."""
    if not isinstance(model, VisionTransformer) or "pos_embed" not in weights:
        return False
    patches = weights["pos_embed"].shape[1] - (0 if model.no_embed_class else model.num_prefix_tokens)
    return patches > 0 and math.isqrt(patches) ** 2 == patches


def _listed(keys: Iterable[str], most: int = 8) -> str:
    names = sorted(keys)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
