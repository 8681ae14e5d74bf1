"""Evaluation: predictions of a split, accuracies of classifiers, nearest neighbours and linear probes on features."""

from distill.evaluation.accuracy import accuracies, named_heads, warn_of_missing
from distill.evaluation.evaluators import (
    Classification,
    Evaluator,
    LabelFree,
    Tested,
    build_evaluator,
    described_answers,
)
from distill.evaluation.prediction import SMALLEST_BATCH, predict, save_predictions

__all__ = [
    "SMALLEST_BATCH",
    "Classification",
    "Evaluator",
    "LabelFree",
    "Tested",
    "accuracies",
    "build_evaluator",
    "described_answers",
    "named_heads",
    "predict",
    "save_predictions",
    "warn_of_missing",
]
