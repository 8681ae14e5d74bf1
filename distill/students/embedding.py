"""The embedding of an image and of its places, from what a timm model's `forward_features` returns."""

from __future__ import annotations

from typing import Any

from timm.layers import ClNormMlpClassifierHead, NormMlpClassifierHead
from timm.models.deit import VisionTransformerDistilled
from torch import Tensor, nn


def embedding_of(model: Any, final: Any) -> Tensor:
    """[B, D], what the classifier takes: the class token after the final norm, or the pooled features.

    Of a model with class and distillation token the class token, not timm's mean of both.
    """
    if isinstance(model, VisionTransformerDistilled):
        return final[:, 0]
    return model.forward_head(final, pre_logits=True)


def regions_of(model: Any, final: Any) -> Tensor | None:
    """[B, N, E], row by row, without prefix tokens, after the final norm, which some of timm's models apply after
    pooling; None where a model has several final maps.
    """
    if not isinstance(final, Tensor) or final.dim() not in (3, 4):
        return None
    head = getattr(model, "head", None)
    if isinstance(head, NormMlpClassifierHead | ClNormMlpClassifierHead):
        final = head.norm(final)
    if final.dim() == 4:
        return final.flatten(1, 2) if getattr(model, "output_fmt", "NCHW") == "NHWC" else final.flatten(2).mT
    has_class_token = getattr(model, "cls_token", None) is not None
    tokens = final[:, getattr(model, "num_prefix_tokens", int(has_class_token)) :]
    norm = getattr(model, "fc_norm", None)
    return norm(tokens) if isinstance(norm, nn.Module) else tokens
