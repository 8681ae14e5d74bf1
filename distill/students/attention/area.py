"""Area attention: tokens attend to areas of adjacent tokens as well as to single tokens.

Li et al. 2019, "Area Attention" (arXiv 1810.10126), sections 3.1 and 3.2; in vision transformers "An Image Is Worth
393 Areas".
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from distill.options import AttentionOptions, Grid, Key, Problem
from distill.registry import register
from distill.students.attention.area_pooling import Areas, coverage, pool, standard_deviation
from distill.students.attention.base import (
    AttentionContext,
    AttentionKind,
    AttentionMaps,
    PatchGrid,
    head_width,
    without_mask,
)
from distill.students.attention.cpu import attend, eager_on_cpu


class Options(AttentionOptions):
    kind: Literal["area"] = Field("area", description="Attention over areas of adjacent tokens (Li et al. 2019).")
    max_area: int | Annotated[list[int], Field(min_length=2, max_length=2)] = Field(
        2,
        description="Largest area: an int for runs of the token sequence, [height, width] for boxes of the patch grid.",
    )
    key_mode: Literal["mean", "max", "sample", "concat", "max_concat", "sum", "sample_concat", "sample_sum"] = Field(
        "mean", description="How an area's key is made of its tokens' keys."
    )
    value_mode: Literal["mean", "max", "sum"] = Field(
        "sum", description="How an area's value is made of its tokens' values."
    )
    top_k: int = Field(0, ge=0, description="Attend only to the k areas with the largest weights; 0: to all.")

    def check_grid(self, grid: Grid, recipe: Any, at: Key) -> Iterator[Problem]:
        yield from super().check_grid(grid, recipe, at)
        if grid.side is None:
            return
        involved = (
            (*at, "max_area"),
            ("student", "patch_size"),
            ("data", "resolution"),
            ("student", "distillation_token"),
        )
        tokens = grid.side**2 + grid.prefix_tokens
        if isinstance(self.max_area, list):
            if not all(1 <= side <= grid.side for side in self.max_area):
                yield Problem(
                    involved,
                    f"[height, width] from 1 to the {grid.side}x{grid.side} patch grid, got {self.max_area}",
                )
        elif not 1 <= self.max_area <= tokens:
            yield Problem(involved, f"from 1 to the {tokens} tokens, got {self.max_area}")


PLAIN_KEY_MODES = ("mean", "max", "sample")
LEARNED_KEY_MODES = ("concat", "max_concat", "sum", "sample_concat", "sample_sum")
VALUE_MODES = ("mean", "max", "sum")


def area_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    max_area: int | Sequence[int],
    grid: tuple[int, int] | None = None,
    num_prefix_tokens: int = 0,
    key_mode: str = "mean",
    value_mode: str = "sum",
    top_k: int = 0,
) -> Tensor:
    """One softmax over all areas: softmax(q . area key / sqrt(d)) @ area values.

    Args:
        query: [batch, heads, queries, head_dim]; key, value: [batch, heads, tokens, head_dim].
        max_area: an int: areas are runs of up to that many tokens of the whole sequence, prefix tokens included.
            (height, width): areas are boxes up to that size on the patch grid; each prefix token is its own area.
        grid: (H, W) of the patches, for boxes; tokens = num_prefix_tokens + H * W, prefix tokens first.
        key_mode: an area's key is the 'mean' or 'max' of its tokens' keys, or a 'sample': mean + standard deviation *
            noise.
        value_mode: an area's value is the 'sum', 'mean' or 'max' of its tokens' values.
        top_k: attend only to the areas whose weight is not below the k-th largest (ties keep more); 0: to all.

    Returns:
        [batch, heads, queries, head_dim].

    Raises:
        ValueError: an unknown mode, or a size or grid that does not fit the tokens.
    """
    areas = Areas.of(key.shape[-2], max_area, grid, num_prefix_tokens)
    if key_mode not in PLAIN_KEY_MODES:
        raise ValueError(f"key modes without parameters are {', '.join(PLAIN_KEY_MODES)}; got '{key_mode}'")
    if value_mode not in VALUE_MODES:
        raise ValueError(f"value modes are {', '.join(VALUE_MODES)}; got '{value_mode}'")
    if top_k < 0:
        raise ValueError(f"top_k counts areas, got {top_k}")
    if _pools_logits(query.device, key_mode, value_mode, top_k):
        return attend(query, key, value, areas=areas, mean_values=value_mode == "mean").transpose(1, 2)
    area_keys = _sampled(key, areas) if key_mode == "sample" else pool(key, areas, key_mode)
    return _attend(query, area_keys, pool(value, areas, value_mode), top_k)


def _pools_logits(device: torch.device, key_mode: str, value_mode: str, top_k: int) -> bool:
    """Whether to pool token logits instead of keys and values: much cheaper in eager mode on a CPU.

    Elsewhere fused kernels avoid the token x token matrix, and compilers and exports need standard operators.
    """
    return eager_on_cpu(device) and key_mode == "mean" and value_mode != "max" and not top_k


def _sampled(key: Tensor, areas: Areas) -> Tensor:
    deviation = standard_deviation(key, areas).to(key.dtype)
    return pool(key, areas, "mean") + deviation * torch.randn_like(deviation)


def _attend(query: Tensor, area_keys: Tensor, area_values: Tensor, top_k: int) -> Tensor:
    """Query [B, heads, Q, d], area keys and values [B, heads, areas, d] -> [B, heads, Q, d]."""
    if not top_k:
        if eager_on_cpu(query.device):
            return attend(query, area_keys, area_values, areas=Areas.of(area_keys.shape[-2], 1)).transpose(1, 2)
        return F.scaled_dot_product_attention(query, area_keys, area_values)
    logits = (query * query.shape[-1] ** -0.5) @ area_keys.transpose(-1, -2)
    return _kept(logits, top_k).softmax(-1) @ area_values


def _kept(logits: Tensor, top_k: int) -> Tensor:
    """Logits with -inf below the k-th largest. A softmax over these equals the paper's: softmax over all, then
    renormalised.
    """
    if not top_k:
        return logits
    smallest = logits.topk(min(top_k, logits.shape[-1])).values[..., -1:]
    return logits.masked_fill(logits < smallest, float("-inf"))


@register("attention", "area", Options)
class AreaAttention(AttentionKind):
    """Multi-head self-attention over areas, in place of timm's Attention: tokens [B, N, dim] -> [B, N, dim].

    The learned key modes apply a two-layer MLP, shared by all heads, to features of an area: mean, maximum or sample of
    its keys, their standard deviation, and an embedding of its height and width (half of head_dim each).
    'concat' and 'sum' take (mean, deviation, size), 'max_concat' (maximum, size), 'sample_concat' and 'sample_sum'
    (sample, size). Samples are drawn in training; in evaluation they are the mean. Parameters beside qkv and proj, at
    head_dim 64 and runs of 2: none, sum 8,416, max_concat 12,512, concat 16,608.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        max_area: int | Sequence[int] = 2,
        grid: PatchGrid | None = None,
        num_prefix_tokens: int = 0,
        key_mode: str = "mean",
        value_mode: str = "sum",
        top_k: int = 0,
        qkv_bias: bool = True,
    ) -> None:
        super().__init__()
        if key_mode not in (*PLAIN_KEY_MODES, *LEARNED_KEY_MODES):
            raise ValueError(f"key modes are {', '.join((*PLAIN_KEY_MODES, *LEARNED_KEY_MODES))}; got '{key_mode}'")
        self.num_heads = num_heads
        self.head_dim = head_width(dim, num_heads)
        self.max_area = max_area
        self.grid = grid
        self.num_prefix_tokens = num_prefix_tokens
        self.key_mode = key_mode
        self.value_mode = value_mode
        self.top_k = top_k
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop: nn.Module = nn.Identity()
        if key_mode in LEARNED_KEY_MODES:
            self._add_key_parameters()

    @classmethod
    def build(cls, context: AttentionContext, options: Options) -> AreaAttention:
        return cls(
            context.dim,
            context.num_heads,
            qkv_bias=context.qkv_bias,
            grid=context.grid,
            num_prefix_tokens=context.num_prefix_tokens,
            **options.model_dump(exclude={"kind", "blocks"}),
        )

    def _add_key_parameters(self) -> None:
        if self.head_dim % 2:
            raise ValueError(f"size embeddings take half of the head width each; {self.head_dim} is odd")
        max_height, max_width = (1, self.max_area) if isinstance(self.max_area, int) else self.max_area
        parts = {"concat": 3, "max_concat": 2, "sample_concat": 2}.get(self.key_mode, 1)
        self.height_embedding = nn.Parameter(torch.empty(max_height, self.head_dim // 2))
        self.width_embedding = nn.Parameter(torch.empty(max_width, self.head_dim // 2))
        first, second = nn.Linear(parts * self.head_dim, self.head_dim), nn.Linear(self.head_dim, self.head_dim)
        self.key_mlp = nn.Sequential(first, nn.ReLU(), second)
        # Glorot, as in the paper's code; with timm's 0.02 in two layers all initial keys would be almost equal.
        for matrix in (self.height_embedding, self.width_embedding, first.weight, second.weight):
            nn.init.xavier_uniform_(matrix)
        nn.init.zeros_(first.bias)
        nn.init.zeros_(second.bias)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Tokens [B, N, dim] -> [B, N, dim]; the other arguments come from timm's blocks and must be None and False."""
        without_mask("area", attn_mask, is_causal)
        batch, tokens, _ = x.shape
        qkv = self.qkv(x).view(batch, tokens, 3, self.num_heads, self.head_dim)
        areas = self.areas(tokens)
        grid = None if self.grid is None else (self.grid.height, self.grid.width)
        key_mode = "mean" if self.key_mode == "sample" and not self.training else self.key_mode
        if _pools_logits(x.device, key_mode, self.value_mode, self.top_k):
            attended = attend(qkv, areas=areas, mean_values=self.value_mode == "mean")
            return self.proj_drop(self.proj(attended.flatten(2)))
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        if key_mode in LEARNED_KEY_MODES:
            keys = self.area_keys(key, areas).to(query.dtype)
            attended = _attend(query, keys, pool(value, areas, self.value_mode), self.top_k)
        else:
            attended = area_attention(
                query, key, value,
                max_area=self.max_area, grid=grid, num_prefix_tokens=self.num_prefix_tokens,
                key_mode=key_mode, value_mode=self.value_mode, top_k=self.top_k,
            )  # fmt: skip
        return self.proj_drop(self.proj(attended.transpose(1, 2).flatten(2)))

    def areas(self, tokens: int) -> Areas:
        """The areas of a sequence of `tokens` tokens."""
        grid = None if self.grid is None else (self.grid.height, self.grid.width)
        return Areas.of(tokens, self.max_area, grid, self.num_prefix_tokens)

    def maps(self, x: Tensor, queries: int) -> AttentionMaps:
        batch, tokens, _ = x.shape
        areas = self.areas(tokens)
        qkv = self.qkv(x).view(batch, tokens, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        query, key, _ = qkv.unbind(0)
        if self.key_mode in LEARNED_KEY_MODES:
            keys = self.area_keys(key, areas)
        else:
            keys = pool(key, areas, "max" if self.key_mode == "max" else "mean")
        logits = (query[:, :, :queries] * self.head_dim**-0.5) @ keys.transpose(-1, -2)
        weights = _kept(logits, self.top_k).softmax(-1)
        return AttentionMaps(weights, coverage(areas).to(x.device), averages=self.value_mode == "mean")

    def no_weight_decay(self) -> set[str]:
        return {name for name, _ in self.named_parameters() if name.endswith("_embedding")}  # like position embeddings

    def area_keys(self, key: Tensor, areas: Areas) -> Tensor:
        """The learned keys: [B, heads, tokens, head_dim] -> [B, heads, areas, head_dim]."""
        mode = self.key_mode
        if mode.startswith("max"):
            pooled = pool(key, areas, "max")
        elif mode.startswith("sample") and self.training:
            pooled = _sampled(key, areas)
        else:
            pooled = pool(key, areas, "mean")
        features = [pooled]
        if mode in ("concat", "sum"):
            features.append(standard_deviation(key, areas).to(pooled.dtype))
        features.append(self._size_embedding(areas).to(pooled.dtype).expand_as(pooled))
        return self.key_mlp(torch.cat(features, -1) if mode.endswith("concat") else torch.stack(features).sum(0))

    def _size_embedding(self, areas: Areas) -> Tensor:
        """[areas, head_dim]; a prefix token is an area of 1 x 1."""
        rows = [
            torch.cat([self.height_embedding[h - 1], self.width_embedding[w - 1]]).expand(count, -1)
            for h, w, count in [(1, 1, areas.prefix), *areas.sizes()]
        ]
        return torch.cat(rows)
