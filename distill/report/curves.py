"""Learning curves out of metrics.jsonl: one point an epoch."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from distill.report.runs import Record, RunFiles


@dataclass(frozen=True)
class Curve:
    """`values` over `epochs`, of equal length, in rising order of epochs and finite throughout."""

    run: str
    model: str
    """'student' or 'control'."""
    variant: str
    """Which of the model's curves: the split and, for a moving average, the weights; empty for the loss."""
    epochs: tuple[float, ...]
    values: tuple[float, ...]


@dataclass(frozen=True)
class Curves:
    loss: tuple[Curve, ...]
    """Training loss: the mean of an epoch's logged losses."""
    top1: tuple[Curve, ...]
    """Accuracy (percent) of the fused heads on the split that checkpoints are chosen on."""
    heads: tuple[Curve, ...]
    """Accuracy (percent) of each head alone, on that split."""
    parts: tuple[Curve, ...]
    """The unweighted parts of the training loss; the variant is the part's name."""
    rate: tuple[Curve, ...]
    """Learning rate."""
    speed: tuple[Curve, ...]
    """Images per second in training."""


def curves_of(runs: Mapping[str, RunFiles]) -> Curves:
    loss: list[Curve] = []
    top1: list[Curve] = []
    heads: list[Curve] = []
    parts: list[Curve] = []
    rate: list[Curve] = []
    speed: list[Curve] = []
    for name, run in runs.items():
        for model, part in (("student", run), ("control", run.control)):
            if part is None:
                continue
            losses = [event for event in part.events if event.get("event") == "train"]
            for curves, key in ((loss, "loss"), (rate, "lr"), (speed, "images_per_second")):
                if curve := _curve(name, model, "", _means(_points(losses, key))):
                    curves.append(curve)
            for key in dict.fromkeys(key for event in losses for key in event if key.startswith("loss/")):
                if curve := _curve(name, model, key.removeprefix("loss/"), _means(_points(losses, key))):
                    parts.append(curve)
            _, measured = next(_evaluations(part))
            for head in ("cls", "dist"):
                if curve := _curve(name, model, head, dict(_points(measured, f"student.{head}/top1"))):
                    heads.append(curve)
            for variant, lines in _evaluations(part):
                if curve := _curve(name, model, variant, dict(_points(lines, "student/top1"))):
                    top1.append(curve)
    return Curves(tuple(loss), tuple(top1), tuple(heads), tuple(parts), tuple(rate), tuple(speed))


def _evaluations(run: RunFiles) -> Iterator[tuple[str, list[Record]]]:
    """Evaluation lines by variant: the weights themselves, then their moving average."""
    # The split that is measured every epoch; the test set is one only where the recipe says so.
    split = "test" if run.selected_on_test else "validation"
    lines = [event for event in run.events if event.get("event") == "eval" and event.get("split") == split]
    yield split, [event for event in lines if event.get("weights") != "ema"]
    yield f"{split}, EMA", [event for event in lines if event.get("weights") == "ema"]


def _points(events: Iterable[Record], key: str) -> Iterator[tuple[float, float]]:
    """(epoch, value) of the lines that have both; a loss that is no number cannot be drawn."""
    for event in events:
        epoch, value = event.get("epoch"), event.get(key)
        if isinstance(epoch, int | float) and isinstance(value, int | float) and math.isfinite(value):
            yield epoch, value


def _means(points: Iterable[tuple[float, float]]) -> dict[float, float]:
    """By whole epochs: what was logged at 2.3 and at 3.0 belongs to the third."""
    by_epoch: dict[float, list[float]] = {}
    for epoch, value in points:
        by_epoch.setdefault(math.ceil(epoch), []).append(value)
    return {epoch: sum(values) / len(values) for epoch, values in by_epoch.items()}


def _curve(run: str, model: str, variant: str, points: Mapping[float, float]) -> Curve | None:
    if not points:
        return None
    epochs, values = zip(*sorted(points.items()), strict=True)
    return Curve(run, model, variant, epochs, values)
