"""A faster training step of timm's plain attention on a CPU."""

from __future__ import annotations

from typing import Any

from timm.layers import Attention
from torch import Tensor, nn

from distill.students.attention.area_pooling import Areas
from distill.students.attention.cpu import attend, eager_on_cpu


class TrainedOnCpu(Attention):
    """timm's Attention, with `attend` in training on a CPU: the same function, with different rounding.

    In evaluation, in compiled code, on other devices and with masks it is timm's code.
    """

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Any:
        if not self.training or not eager_on_cpu(x.device) or attn_mask is not None or is_causal:
            return super().forward(x, attn_mask, is_causal)
        batch, tokens, _ = x.shape
        qkv = self.qkv(x).view(batch, tokens, 3, self.num_heads, self.head_dim)
        return self.proj_drop(self.proj(attend(qkv, areas=Areas.of(tokens, 1)).flatten(2)))


def train_on_cpu(model: nn.Module) -> None:
    """Replace timm's plain attention in the model by `TrainedOnCpu`, in place, with the same parameters."""
    for module in model.modules():
        if type(module) is Attention and _is_plain(module):
            module.__class__ = TrainedOnCpu


def _is_plain(attention: Attention) -> bool:
    """Whether it has no norms, gate or dropout of the attention weights."""
    others = [child for name, child in attention.named_children() if name not in ("qkv", "proj", "proj_drop")]
    return all(isinstance(child, nn.Identity) or getattr(child, "p", None) == 0 for child in others)
