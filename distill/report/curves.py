"""Learning curves out of metrics.jsonl: one point an epoch."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

from distill.report.collapse import ENTROPY, KL
from distill.report.runs import Record, RunFiles

MEASURING = ("train", "eval")
"""Events with values of an epoch."""
LARGEST = 1e12
"""Of the values that are drawn: a chart cannot show some of 1e300 beside others."""


class Curve(NamedTuple):
    """`values` over `epochs`, of equal length, in rising order of epochs and finite throughout."""

    run: str
    model: str
    """'student' or 'control'."""
    variant: str
    """Which of the model's curves: the split and, for a moving average, the weights; the head; the part of the loss."""
    epochs: tuple[float, ...]
    values: tuple[float, ...]


Curves = Mapping[str, list[Curve]]
"""By what they show: `loss` (in training), its unweighted `parts`, `rate` (of learning), `speed` (images per second in
training); accuracy in percent on the split that checkpoints are chosen on, `top1` of the fused heads, `macro` where
checkpoints are chosen by it, `heads` of each alone, `knn` of nearest neighbours; `entropy` of the answers of a
moving-average teacher, and `kl` of the student's to them. Without a curve it is empty.
"""


def curves_of(runs: Mapping[str, RunFiles]) -> Curves:
    curves: dict[str, list[Curve]] = defaultdict(list)
    for name, run in runs.items():
        for model, part in run.models:
            measured = [event for event in part.events if event.get("event") in MEASURING]
            end = max((event["epoch"] for event in measured if event.get("epoch") is not None), default=math.inf)
            for kind, variant, events, key in _measured(part):
                if points := _means(_points(events, key), end):
                    epochs, values = zip(*sorted(points.items()), strict=True)
                    curves[kind].append(Curve(name, model, variant, epochs, values))
    return curves


def _measured(run: RunFiles) -> Iterator[tuple[str, str, list[Record], str]]:
    """Kind and variant of each curve, the lines of metrics.jsonl that may have points of it, and their key there."""
    trained = [event for event in run.events if event.get("event") == "train"]
    yield from (("loss", "", trained, "loss"), ("rate", "", trained, "lr"), ("speed", "", trained, "images_per_second"))
    for key in dict.fromkeys(key for event in trained for key in event if key.startswith("loss/")):
        yield "parts", key.removeprefix("loss/"), trained, key
    # The split that is measured every epoch; the test set is one only where the recipe says so.
    split = "test" if run.selected_on_test else "validation"
    lines = [event for event in run.events if event.get("event") == "eval" and event.get("split") == split]
    raw = [event for event in lines if event.get("weights") != "ema"]
    yield from (("heads", head, raw, f"student.{head}/top1") for head in ("cls", "dist"))
    averaged = [event for event in lines if event.get("weights") == "ema"]
    by_macro = run.status.get("selected_by") == "student/macro"
    for kind in ("top1", *(["macro"] if by_macro else []), "knn"):
        yield kind, split, raw, f"student/{kind}"
        yield kind, f"{split}, EMA", averaged, f"student/{kind}"
    for kind, ending in (("entropy", ENTROPY), ("kl", KL)):
        for key in dict.fromkeys(
            key for event in trained for key in event if key.endswith((f"/{ending}", f"_{ending}"))
        ):
            yield kind, key.removesuffix(ending).rstrip("/_").replace("/", ", "), trained, key


def _points(events: Iterable[Record], key: str) -> Iterator[tuple[float, float]]:
    """(epoch, value) of the lines that have both; a loss that is no number cannot be drawn."""
    for event in events:
        epoch, value = event.get("epoch"), event.get(key)
        if epoch is not None and isinstance(value, int | float) and abs(value) < LARGEST:  # not so with NaN
            yield epoch, value


def _means(points: Iterable[tuple[float, float]], end: float) -> dict[float, float]:
    """By whole epochs: what was logged at 2.3 and at 3.0 belongs to the third; the last one ends where the run did."""
    by_epoch: dict[float, list[float]] = defaultdict(list)
    for epoch, value in points:
        by_epoch[min(math.ceil(epoch), end)].append(value)
    return {epoch: sum(values) / len(values) for epoch, values in by_epoch.items()}
