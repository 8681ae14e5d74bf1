"""Whether a model is as often right as it says: reliability, expected calibration error, temperature."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax

from distill.report.metrics import Floats, Ints

BINS = 15
LARGEST_TEMPERATURE = 20.0


@dataclass(frozen=True)
class Bin:
    """Images whose answer has about the same probability."""

    samples: int
    confidence: float
    """Mean probability of the answer."""
    accuracy: float
    """Share of right answers; both in [0, 1]."""


@dataclass(frozen=True)
class Calibration:
    bins: tuple[Bin, ...]
    """15 of equal width, empty ones left out, by rising confidence."""
    ece: float
    """Expected calibration error in percentage points (Guo et al. 2017, arXiv 1706.04599)."""
    temperature: float | None = None
    """By which the logits are divided to minimise the NLL on the validation split; None without one."""
    ece_fitted: float | None = None
    """On the test set, with that temperature."""
    nll_fitted: float | None = None


def calibration(logits: Floats, labels: Ints, validation: tuple[Floats, Ints] | None = None) -> Calibration:
    """Of logits [N, classes] on the test set; the temperature from `validation`, its logits and labels."""
    bins, ece = reliability(logits, labels)
    if validation is None:
        return Calibration(bins, ece)
    temperature = fit_temperature(*validation)
    _, ece_fitted = reliability(logits / temperature, labels)
    return Calibration(bins, ece, temperature, ece_fitted, _nll(logits, labels, temperature))


def reliability(logits: Floats, labels: Ints) -> tuple[tuple[Bin, ...], float]:
    """Bins and ECE; a confidence on the border of two bins belongs to the lower one."""
    probabilities = np.exp(log_softmax(logits.astype(np.float64), axis=1))
    confidence, right = probabilities.max(1), logits.argmax(1) == labels
    places = np.clip(np.ceil(confidence * BINS).astype(int) - 1, 0, BINS - 1)
    counts = np.bincount(places, minlength=BINS)
    sums = np.bincount(places, confidence, BINS)
    hits = np.bincount(places, right, BINS)
    bins = tuple(
        Bin(int(count), float(total / count), float(hit / count))
        for count, total, hit in zip(counts, sums, hits, strict=True)
        if count
    )
    return bins, float(100 * np.abs(hits - sums).sum() / len(labels))


def fit_temperature(logits: Floats, labels: Ints) -> float:
    """Between 1/20 and 20, where the mean NLL of logits / temperature is smallest; it has one minimum."""
    bound = float(np.log(LARGEST_TEMPERATURE))
    found = minimize_scalar(
        lambda log_t: _nll(logits, labels, float(np.exp(log_t))),
        bounds=(-bound, bound),
        method="bounded",
        options={"xatol": 1e-5},
    )
    return float(np.exp(found.x))


def _nll(logits: Floats, labels: Ints, temperature: float) -> float:
    scaled = log_softmax(logits.astype(np.float64) / temperature, axis=1)
    return float(-np.take_along_axis(scaled, labels[:, None], axis=1).mean())
