"""Features without their classifier: nearest neighbours, linear probe, raw pixels, and pictures of neighbours."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from scipy.special import softmax

from distill.report.comparison import Comparison, Row
from distill.report.metrics import NO_ANSWER, as_numbers, decisions
from distill.report.page import Column, Neighbour, Neighbourhoods, Part, Picture, Section, Table
from distill.report.runs import Record, RunFiles
from distill.report.sections.pictures import to_address
from distill.report.statistics import wilson

COLUMNS: list[Column] = [
    ("features", "model", ""),
    ("k-NN %", "knn", ".2f"),
    ("95 % interval", "interval", "{0[0]:.2f} to {0[1]:.2f}".format),
    ("linear probe %", "linear", ".2f"),
    ("spread", "spread", ".4f"),
    ("test images", "images", ",d"),
]
MEASURED = {"knn": "nearest neighbours", "linear": "a linear probe"}


def build(comparison: Comparison) -> Section | None:
    records = [
        record
        for name, run in comparison.runs.items()
        for model, files in run.models
        if (record := _record(comparison.called(name, model), files.tested, comparison.samples)) is not None
    ]
    if not records:
        return None
    records += _pixels(comparison)
    caption = (
        "Accuracy by frozen features. k-NN: votes of the nearest training images, weighted by exp(cosine / "
        "temperature); linear probe: logistic regression on the features. Spread: 0 if all features have one "
        "direction, near 1 if they have none in common."
    )
    parts: list[Part] = [Table.of("features", caption, records, COLUMNS)]
    for name, run in comparison.runs.items():
        if (shown := _neighbourhoods(comparison, name, run, len(parts))) is not None:
            parts.append(shown)
    said = [f"{records[0][key]:.2f} % by {what}" for key, what in MEASURED.items() if key in records[0]]
    says = f"What the features of the {records[0]['model']} tell of the classes: {', '.join(said)}."
    return Section("features", "Features", says, parts, records)


def _record(model: str, tested: Record, samples: int) -> dict[str, Any] | None:
    """The figures of one model's features; None where they were not evaluated."""
    values = {key: tested.get(f"student/{key}") for key in ("knn", "linear", "spread")}
    known = {key: float(value) for key, value in values.items() if isinstance(value, int | float)}
    if not known.keys() & MEASURED.keys():
        return None
    record: dict[str, Any] = {"model": model, **known, "images": samples}
    if 0 <= known.get("knn", -1) <= 100:
        record["interval"] = wilson(round(known["knn"] * samples / 100), samples)
    return record


def _pixels(comparison: Comparison) -> list[dict[str, Any]]:
    """The same of raw pixels: of the first run that measured it, since it depends on the data only."""
    for run in comparison.runs.values():
        if run.analysis is not None and (pixels := run.analysis.values.get("pixels")) is not None:
            images, correct = pixels["images"], pixels["correct"]
            knn = 100 * correct / images
            return [{"model": "raw pixels", "knn": knn, "interval": wilson(correct, images), "images": images}]
    return []


def _neighbourhoods(comparison: Comparison, name: str, run: RunFiles, number: int) -> Neighbourhoods | None:
    row = comparison.row(name, "student")
    if run.analysis is None or row is None or "neighbours.images" not in run.analysis.tensors:
        return None
    tensors, names = run.analysis.tensors, run.class_names
    pictures = []
    for index, (test, image) in enumerate(
        zip(tensors["neighbours.indices"].tolist(), tensors["neighbours.images"], strict=True)
    ):
        label = int(comparison.labels[test])
        nearest = [
            Neighbour(to_address(picture), names[of], float(cosine), of == label)
            for picture, of, cosine in zip(
                tensors["nearest.images"][index],
                tensors["nearest.labels"][index].tolist(),
                tensors["nearest.cosines"][index],
                strict=True,
            )
        ]
        answers = _answers(row, test, names, label)
        pictures.append((Picture(to_address(image), names[label], answers, "", test), nearest))
    title = comparison.called(name, "Nearest neighbours") if comparison.several else "Nearest neighbours"
    return Neighbourhoods(f"neighbours-{number}", title, pictures)


def _answers(row: Row, test: int, names: Sequence[str], label: int) -> list[tuple[str, str, float, bool]]:
    """The class with the most votes and its share of them in percent, where the run has recorded the votes."""
    if not row.by_neighbours:
        return []
    decided = int(decisions(row.logits[[test]])[0])
    if decided == NO_ANSWER:
        return [(row.model, "no answer", 0.0, False)]
    share = float(softmax(as_numbers(row.logits[[test]]), axis=1).max())
    return [(row.model, names[decided], 100 * share, decided == label)]
