"""Focal Transformer (Yang et al. 2021, arXiv 2107.00641)."""

from __future__ import annotations

from torch import Tensor

from distill.students.attention.windows import FocalWindows


class FocalAttention(FocalWindows):
    """Focal self-attention of a map, after its norm: [B, h, w, dim] -> [B, h, w, dim], for any h and w."""

    def forward(self, x: Tensor) -> Tensor:
        _, height, width, _ = x.shape
        return self.attend(x.flatten(1, 2), (height, width)).view(x.shape)
