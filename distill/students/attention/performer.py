"""Attention by positive random features, linear in the number of tokens (Choromanski et al. 2021, "Rethinking Attention
with Performers", arXiv 2009.14794).
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any, Literal, cast

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from distill.options import AttentionOptions
from distill.registry import register
from distill.students.attention.base import AttentionContext, AttentionKind, AttentionMaps, head_width, without_mask

RELU_EPSILON = 1e-3
Kernel = Literal["softmax", "relu"]


class Options(AttentionOptions):
    kind: Literal["performer"] = Field(
        "performer", description="Attention by random features, linear in the tokens (Choromanski et al. 2021)."
    )
    features: int | None = Field(
        None,
        ge=1,
        description="Random features of a head; null: d ln d, of heads d wide. With 32 of them a layer of vit_nano "
        "costs 1.1 of softmax attention's at 66 tokens and 0.5 at 258.",
    )
    kernel: Literal["softmax", "relu"] = Field("softmax", description="What the features stand for.")
    redraw: int = Field(
        1000, ge=0, description="Forward passes in training after which new features are drawn; 0: never."
    )


def favor_attention(
    query: Tensor, key: Tensor, value: Tensor, features: Tensor, *, epsilon: float = 1e-4, kernel: Kernel = "softmax"
) -> Tensor:
    """FAVOR+: phi(q) (phi(k)^T v) / (phi(q) sum phi(k)), with u = features x / d^(1/4), h = |x|^2 / (2 sqrt(d)) and

        phi(x) = (exp(u - h - max(u - h)) + epsilon) / sqrt(m)

    where the maximum is one for each query, and one for all keys of an image and head. It is a constant to the
    gradient. (The published maximum is that of u. For queries and keys of ordinary length the differences are then so
    negative that all features are epsilon: uniform attention, without gradients.)

    Args:
        query: [B, heads, Q, d]; key, value: [B, heads, N, d].
        features: [m, d].
        kernel: "relu": phi(x) = relu(u) + 1e-3.

    Returns:
        [B, heads, Q, d], in the value's type, computed in float32 at least.
    """
    exact = torch.promote_types(value.dtype, torch.float32)
    with torch.autocast(value.device.type, enabled=False):
        by_query, by_key = _random_features(query.to(exact), key.to(exact), features.to(exact), epsilon, kernel)
        # The sums of the keys' features are the product with a value that is 1.
        products = by_key.transpose(-1, -2) @ F.pad(value.to(exact), (0, 1), value=1.0)
        numerator, denominator = (by_query @ products).split([value.shape[-1], 1], -1)
        return (numerator / denominator).to(value.dtype)


def _random_features(
    query: Tensor, key: Tensor, features: Tensor, epsilon: float, kernel: Kernel
) -> tuple[Tensor, Tensor]:
    """phi of queries and keys [B, heads, N, d] -> [B, heads, N, m] each, up to factors that cancel out."""
    scaled = features.transpose(0, 1) * query.shape[-1] ** -0.25
    if kernel == "relu":
        return F.relu(query @ scaled) + RELU_EPSILON, F.relu(key @ scaled) + RELU_EPSILON
    half = 0.5 * query.shape[-1] ** -0.5
    exponents = [x @ scaled - half * x.square().sum(-1, keepdim=True) for x in (query, key)]
    largest = exponents[0].detach().amax(-1, keepdim=True), exponents[1].detach().amax((-1, -2), keepdim=True)
    by_query, by_key = ((u - most).exp() + epsilon for u, most in zip(exponents, largest, strict=True))
    return by_query, by_key


def draw_features(number: int, dim: int, generator: torch.Generator) -> Tensor:
    """float64 [number, dim]: orthogonal directions in blocks of `dim`, Haar-distributed, with the lengths of normal
    vectors."""
    normal = partial(torch.randn, generator=generator, dtype=torch.float64, device="cpu")
    blocks = []
    for _ in range(math.ceil(number / dim)):
        q, r = torch.linalg.qr(normal(dim, dim))
        # Only with a positive diagonal of R is Q uniform over the orthogonal matrices (Mezzadri 2007).
        blocks.append((q * r.diagonal().sign()).T)
    return torch.cat(blocks)[:number] * normal(number, dim).norm(dim=1, keepdim=True)


@register("attention", "performer", Options)
class PerformerAttention(AttentionKind):
    """FAVOR+ attention (see `favor_attention`), in place of timm's Attention: tokens [B, N, dim] -> [B, N, dim].

    It has no parameters beside qkv and proj; the random features are a buffer, and in training other ones are drawn
    after every `redraw` forward passes, at the end of a step. Which ones depends on `seed` and on the number of passes
    only, both buffers: a resumed run draws the same, as do all processes. It is a method to train with: few features
    do not approximate the softmax of a network that was trained with it.
    Cost: 4 N m dim + N m heads multiply-adds, with m features, where softmax attention has 2 N^2 dim.
    """

    features: Tensor
    seed: Tensor
    passes: Tensor

    def __init__(self, context: AttentionContext, options: Options) -> None:
        super().__init__()
        dim, heads = context.dim, context.num_heads
        self.num_heads, self.head_dim = heads, head_width(dim, heads)
        self.kernel, self.redraw = options.kernel, options.redraw
        self.qkv = nn.Linear(dim, 3 * dim, bias=context.qkv_bias)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop: nn.Module = nn.Identity()
        number = options.features or max(1, int(self.head_dim * math.log(self.head_dim)))
        self.register_buffer("features", torch.empty(number, self.head_dim))
        self.register_buffer("seed", torch.empty((), dtype=torch.long).random_())
        self.register_buffer("passes", torch.zeros((), dtype=torch.long))
        self._passes: int | None = 0
        """`passes` on the host, so that no step waits for the device; None: not known."""
        if not self.seed.is_meta:
            self._draw(0)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Tokens [B, N, dim] -> [B, N, dim]; the other arguments come from timm's blocks and must be None and False."""
        without_mask("performer", attn_mask, is_causal)
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_dim))
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        attended = favor_attention(query, key, value, self.features, kernel=self.kernel)
        return cast(Tensor, self.proj_drop(self.proj(attended.transpose(1, 2).flatten(2))))

    def after_step(self, passes: int) -> None:
        if self._passes is None:
            self._passes = int(self.passes)
        before, self._passes = self._passes, self._passes + passes
        self.passes.fill_(self._passes)
        if self.redraw and (draw := self._passes // self.redraw) > before // self.redraw:
            self._draw(draw)

    @torch.no_grad()
    def _draw(self, redraws: int) -> None:
        """The features after so many redraws, in place: compiled code has their address."""
        generator = torch.Generator("cpu").manual_seed((int(self.seed) + redraws) % 2**63)
        number_of_features, dim = self.features.shape
        self.features.copy_(draw_features(number_of_features, dim, generator))

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._passes = None

    def maps(self, x: Tensor, queries: int) -> AttentionMaps:
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_dim)).permute(2, 0, 3, 1, 4)
        query, key, _ = qkv.unbind(0)
        count = x.shape[1]
        ones = torch.eye(count, dtype=x.dtype, device=x.device).expand(*key.shape[:2], -1, -1)
        weights = favor_attention(query[:, :, :queries], key, ones, self.features, kernel=self.kernel)
        return AttentionMaps(weights, torch.eye(count, device=x.device))

    def not_averaged(self) -> set[str]:
        return {"features"}
