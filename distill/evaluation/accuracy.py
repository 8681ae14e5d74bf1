"""Accuracies of classifiers from their logits, under the names of `metrics.jsonl`."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from torch import Tensor

from distill.features import mean_over_heads
from distill.report.metrics import are_numbers, measure

_log = logging.getLogger("distill")


def named_heads(logits: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`student.HEAD` for each head, and `student.fused`, their mean."""
    return {f"student.{head}": of_head for head, of_head in logits.items()} | {"student.fused": mean_over_heads(logits)}


def accuracies(predictions: Mapping[str, Tensor], labels: Tensor) -> dict[str, float]:
    """Metrics under the names of `metrics.jsonl`; `student/top1` is that of the mean over heads."""
    teacher = predictions.get("teacher")
    values: dict[str, float] = {}
    warn_of_missing(predictions)
    for name, logits in predictions.items():
        key = "student" if name == "student.fused" else name
        metrics = measure(logits.numpy(), labels.numpy(), None if teacher is None else teacher.numpy())
        values |= {f"{key}/top1": metrics.top1, f"{key}/top5": metrics.topk, f"{key}/nll": metrics.nll}
        values |= {f"{key}/macro": metrics.macro, f"{key}/worst_class": metrics.worst_class}
        if key == "student" and metrics.agreement is not None:
            values["agreement"] = metrics.agreement
    return values


def warn_of_missing(predictions: Mapping[str, Tensor]) -> None:
    """Log for which outputs rows of logits [N, classes] are not numbers."""
    for name, logits in predictions.items():
        if missing := int((~are_numbers(logits.numpy())).sum()):
            _log.warning(
                "%s: %d of %d rows of logits are not numbers; they count as wrong answers", name, missing, len(logits)
            )
