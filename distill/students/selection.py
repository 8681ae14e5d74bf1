"""Weight selection: a smaller ViT starts from elements of a larger one's weights (`student.init: {kind: select}`).

Xu et al. 2023, "Initializing Models with Larger Ones" (arXiv 2311.18823): the first N layers, and of each tensor evenly
spaced elements along every dimension ("uniform element selection").
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from torch import Tensor

from distill.errors import InputError
from distill.recipe.initialization import Select
from distill.students.builder import Statistics
from distill.students.saved import read_export
from distill.students.weights import (
    add_distillation_token,
    convert_attention,
    create_pretrained,
    on_square_grid,
)

KEY = "student.init.source"
BLOCK = re.compile(r"^blocks\.(\d+)\.")
HEADS, STEM = ("head.", "head_dist."), "patch_embed."
SHARED_ATTENTION = re.compile(r"\.attn\.(qkv|proj)\.(weight|bias)$")
"""What timm's attention and every kind of this project have."""


class _Source(NamedTuple):
    weights: dict[str, Tensor]
    num_classes: int
    statistics: Statistics
    """Mean and std of its inputs."""


@torch.no_grad()
def initialize_selected(model: VisionTransformer, options: Select, *, channels: int) -> Statistics | None:
    """Load selected weights; returns the source's mean and std, or None where they do not apply.

    Positions and patches are adapted to the student's grid first; queries, keys and values are selected each among
    their own. A stem of another kind, heads for other classes and an attention kind's own parameters keep their random
    weights. A missing distillation token is the class token.

    Args:
        channels: of the student's images.

    Raises:
        InputError: the source is not found, cannot be downloaded, is no such ViT, or is smaller than the student.
    """
    name = str(options.source)
    source = _exported(options.folder, channels) if options.folder else _timms(model, name, channels)
    given = _on_students_grid(model, source.weights, name)
    if source.num_classes != model.num_classes:
        given = {key: tensor for key, tensor in given.items() if not key.startswith(HEADS)}
    chosen = {
        key: _selected(given[key], shape, 3 if ".qkv." in key else 1, f"{name}: {key}")
        for key, shape in _wanted(model).items()
        if key in given
    }
    convert_attention(model, chosen)
    model.load_state_dict(model.state_dict() | chosen)
    has_stem = any(key.startswith(STEM) for key in given)
    fits = has_stem and len(source.statistics[0]) == channels
    return source.statistics if fits else None


def _timms(model: VisionTransformer, name: str, channels: int) -> _Source:
    """timm's weights; those that cannot do are refused before they are downloaded."""
    if not timm.is_model_pretrained(name):
        raise InputError(f"{KEY}: timm has no weights called '{name}'. `timm.list_pretrained()` lists them.")
    with torch.device("meta"):
        shapes = timm.create_model(name).state_dict()
    _check_fits(model, shapes, name)
    source = create_pretrained(name, KEY, in_chans=channels)
    statistics = (source.pretrained_cfg["mean"], source.pretrained_cfg["std"])
    return _Source(source.state_dict(), source.num_classes, statistics)


def _exported(folder: Path, channels: int) -> _Source:
    saved = read_export(folder)
    config = saved.config["pretrained_cfg"]
    if (found := config["input_size"][0]) != channels:
        raise InputError(f"{KEY}: {folder} takes images of {found} channels, the data have {channels}.")
    weights = {
        name: tensor for name, tensor in saved.weights.items() if ".attn." not in name or SHARED_ATTENTION.search(name)
    }
    return _Source(weights, saved.config["num_classes"], (config["mean"], config["std"]))


def _check_fits(model: VisionTransformer, weights: Mapping[str, Tensor], source: str) -> None:
    """Raise InputError unless the source is a ViT of the same parts and at least the student's size."""
    if not {"cls_token", "pos_embed", "blocks.0.attn.qkv.weight"} <= weights.keys():
        raise InputError(f"{KEY}: {source} is no ViT with a class token. Choose one of the vit_* or deit_* models.")
    width, depth = weights["cls_token"].shape[-1], 1 + max(_block(name) for name in weights)
    if width < model.embed_dim or depth < len(model.blocks):
        raise InputError(
            f"{KEY}: {source} is smaller than the student: width {width} and {depth} blocks, the student has "
            f"{model.embed_dim} and {len(model.blocks)}. Choose a larger one."
        )
    optional = (*HEADS, STEM, "dist_token")
    wanted = {name for name in _wanted(model) if not name.startswith(optional)}
    given = {name for name in weights if not name.startswith(optional) and _block(name) < len(model.blocks)}
    for names, problem in ((wanted - given, "lacks"), (given - wanted, "also has")):
        if names:
            raise InputError(f"{KEY}: {source} is another kind of ViT: it {problem} {min(names)}. Choose a plain one.")


def _block(name: str) -> int:
    """Index of the block that a parameter belongs to; -1: none."""
    found = BLOCK.match(name)
    return int(found[1]) if found else -1


def _on_students_grid(model: VisionTransformer, weights: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
    """What the student can use, still of the source's width: its blocks, prefix tokens, positions and patches."""
    _check_fits(model, weights, source)
    given = {name: tensor for name, tensor in weights.items() if _block(name) < len(model.blocks)}
    for name in given:
        if name.endswith(".qkv.weight") and given[name].shape[0] != 3 * given[name].shape[1]:
            raise InputError(f"{KEY}: {source} has no queries and keys in {name}. Choose one without shared maps.")
    if hasattr(model, "dist_token") and "dist_token" not in given:
        add_distillation_token(given)
    elif "dist_token" in given and not hasattr(model, "dist_token"):
        del given["dist_token"]
        positions = given["pos_embed"]
        given["pos_embed"] = torch.cat([positions[:, :1], positions[:, 2:]], dim=1)
    if not on_square_grid(model, given):
        raise InputError(f"{KEY}: {source} has positions for other tokens than two-dimensional patches and its own.")
    stem = {name for name in given if name.startswith(STEM)}
    if stem != {name for name in model.state_dict() if name.startswith(STEM)}:
        given = {name: tensor for name, tensor in given.items() if name not in stem}
    return dict(checkpoint_filter_fn(given, model))


def _wanted(model: VisionTransformer) -> dict[str, torch.Size]:
    """Shapes of the student's tensors, of its attention as timm's has them."""
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items() if ".attn." not in name}
    for index, block in enumerate(model.blocks):
        attention: Any = block.attn
        dim = attention.proj.in_features
        for name, rows in (("qkv", 3 * dim), ("proj", dim)):
            shapes[f"blocks.{index}.attn.{name}.weight"] = torch.Size([rows, dim])
            if getattr(attention, name).bias is not None:
                shapes[f"blocks.{index}.attn.{name}.bias"] = torch.Size([rows])
    return shapes


def _selected(tensor: Tensor, shape: torch.Size, groups: int, what: str) -> Tensor:
    """Evenly spaced elements along each dimension, along the first within each of so many groups: of S elements,
    number i of s is i S / s, rounded down.
    """
    if len(tensor.shape) != len(shape) or any(a < b for a, b in zip(tensor.shape, shape, strict=True)):
        raise InputError(f"{KEY}: {what} has the shape {list(tensor.shape)}; the student's, {list(shape)}, is no part.")
    for dim, size in enumerate(shape):
        count = tensor.shape[dim]
        parts = groups if dim == 0 else 1
        each, apart = size // parts, count // parts
        within = torch.arange(each) * apart // each
        tensor = tensor.index_select(dim, torch.cat([part * apart + within for part in range(parts)]))
    return tensor
