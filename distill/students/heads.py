"""Inference variants of two-headed students: a single head, or both heads merged into one linear layer."""

from __future__ import annotations

from typing import Any, Literal

import timm
import torch
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from distill.errors import InputError
from distill.students.pyramid import Pyramid
from distill.students.student import Student
from distill.students.vit import TOKENS, OneHeadVisionTransformer

Head = Literal["cls", "dist"]


def one_head(student: Student, head: Head) -> Student:
    """The student with only its class or its distillation head, in eval mode.

    Of a vision transformer both tokens are kept, since each attends to the other.

    Raises:
        InputError: it does not have two heads, or is no model of this project and no DeiT.
    """
    model: Any = student.model
    if not student.heads:
        raise InputError(f"--head {head}: this student was trained without labels and has no head; leave --head away.")
    if head not in student.heads or len(student.heads) == 1:
        raise InputError(f"--head {head}: this student ({student.architecture}) has one head only; leave --head away.")
    architecture, model_args = student.architecture, dict(student.model_args)
    if isinstance(model, Pyramid):
        model_args["distilled"] = False
    elif isinstance(model, VisionTransformerDistilled):
        model_args["head"] = head
    else:
        raise InputError(
            f"--head {head}: the heads of {student.architecture} cannot be taken apart; leave --head away."
        )
    if architecture.startswith("deit_"):
        # timm's architectures have both heads; the arguments define the size.
        architecture = "vit_tiny"
        model_args |= {
            "distilled": True,
            "patch_size": model.patch_embed.patch_size[0],
            "embed_dim": model.embed_dim,
            "depth": len(model.blocks),
            "num_heads": model.blocks[0].attn.num_heads,
        }
    contract = student.adapter.contract
    with torch.random.fork_rng(devices=[]):
        alone = timm.create_model(
            architecture, num_classes=model.num_classes, in_chans=len(contract.mean), **model_args
        )
    weights = model.state_dict()
    second = {name: weights.pop(name) for name in ("head_dist.weight", "head_dist.bias")}
    distillation = {name.replace("head_dist", "head"): tensor for name, tensor in second.items()}
    alone.load_state_dict(weights if head == "cls" else weights | distillation)
    return Student(
        alone, contract, architecture=architecture, model_args=model_args, preparation=student.preparation
    ).eval()


class MergedHeads(nn.Module):
    """A vision transformer with one linear layer over its class and distillation tokens:

        (W x + b + V y + c) / 2 = [W / 2, V / 2] [x; y] + (b + c) / 2

    for normalised images [B, C, H, W] -> logits [B, classes]. Only these two tokens go through the last block's MLP and
    the last norm, since the others are not used after the last attention. For evaluation only.
    """

    def __init__(self, body: VisionTransformerDistilled) -> None:
        super().__init__()
        self.body = body
        weight = body.head.weight
        self.head = nn.utils.skip_init(
            nn.Linear, 2 * body.embed_dim, body.num_classes, device=weight.device, dtype=weight.dtype
        )
        with torch.no_grad():
            self.head.weight.copy_(torch.cat([body.head.weight, body.head_dist.weight], 1) / 2)
            self.head.bias.copy_((body.head.bias + body.head_dist.bias) / 2)
        self.pretrained_cfg = body.pretrained_cfg
        del body.head, body.head_dist
        body.blocks[-1].__class__ = _LastBlock

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body.forward_features(x).flatten(1))


class _LastBlock(Block):
    """timm's Block, computing only the first two tokens: [B, N, dim] -> [B, 2, dim]."""

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        attended = self.attn(self.norm1(x), attn_mask=attn_mask, is_causal=is_causal)
        x = x[:, : len(TOKENS)] + self.ls1(attended[:, : len(TOKENS)])
        return x + self.ls2(self.mlp(self.norm2(x)))


def merge_heads(model: nn.Module) -> nn.Module:
    """A model in eval mode with the same logits up to rounding; `model` itself is modified and must not be used."""
    model.eval()
    if isinstance(model, Pyramid) and model.distilled:
        model.merge_heads()
    can_be_merged = isinstance(model, VisionTransformerDistilled) and not isinstance(model, OneHeadVisionTransformer)
    if not can_be_merged or type(_last_block(model)) is not Block:
        return model
    return MergedHeads(model).eval()


def _last_block(model: Any) -> nn.Module:
    return model.blocks[-1]
