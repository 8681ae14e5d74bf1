"""What a report opens with: the answer in one paragraph, and one table."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from distill.recipe.imbalance import is_unbalanced
from distill.report.comparison import Comparison
from distill.report.page import Column, Table
from distill.report.statistics import EQUAL, SIGNIFICANT, PairedTest, p_text

COUNTED = (
    "GFLOPs: two operations for each multiply-add of matrix products and convolutions, by one algorithm on any device: "
    "areas with mean keys and summed or averaged values are sums of the tokens' logits and weights, which "
    "count nothing; other areas have a pooled key and value each, which count as further tokens."
)


def answer(comparison: Comparison) -> str:
    """Sentences on every run: how good its student is, beside its teacher and its control."""
    return " ".join(sentence for name in comparison.runs for sentence in _sentences(comparison, name))


def _sentences(comparison: Comparison, name: str) -> Iterator[str]:
    student, control = comparison.row(name, "student"), comparison.control_of(name)
    teacher = comparison.teacher_of(name)
    if student is None:
        return
    whose = f"The student of {name}" if comparison.several else "The student"
    low, high = student.top1_interval
    if student.by_neighbours:
        told = (
            f"{whose} was trained without labels: by its features, the nearest training images give "
            f"{student.metrics.top1:.2f} % of {comparison.samples:,} test images the right class (95 % interval "
            f"{low:.2f} to {high:.2f} %)"
        )
        if isinstance(linear := student.source.tested.get("student/linear"), int | float):
            told += f", a linear probe {linear:.2f} %"
    else:
        told = (
            f"{whose} answers {student.metrics.top1:.2f} % of {comparison.samples:,} test images correctly (95 % "
            f"interval {low:.2f} to {high:.2f} %)"
        )
    if teacher is not None:
        told += "; by neighbours" if student.by_neighbours else ""
        told += f", {_against(comparison.test(student, teacher))} its teacher ({teacher.metrics.top1:.2f} %)"
    yield f"{told}."
    if control is None:
        if teacher is not None and not student.by_neighbours:
            yield "Without a control nobody can tell how much of that is due to the teacher."
        return
    test = comparison.test(student, control)
    told = f"The same network trained without the teacher reaches {control.metrics.top1:.2f} %: "
    if test.p >= SIGNIFICANT:
        yield f"{told}no effect of distillation is shown ({test.points:+.2f} points, {_sure(test)})."
    else:
        what = "gains" if test.points > 0 else "costs"
        yield f"{told}under this seed distillation {what} {abs(test.points):.2f} points ({_sure(test)})."


def _against(test: PairedTest) -> str:
    if test.p >= SIGNIFICANT:
        shown = f"equal within {EQUAL:g} point" if test.p_equal < SIGNIFICANT else "with no difference shown"
        return f"{shown} ({test.points:+.2f} points, {_sure(test)}) from"
    return f"{abs(test.points):.2f} points {'above' if test.points > 0 else 'below'} ({_sure(test)})"


def _sure(test: PairedTest) -> str:
    return f"95 % interval {test.low:+.2f} to {test.high:+.2f}, {p_text(test.p)}"


def main_table(comparison: Comparison, *, narrow: bool = False) -> Table:
    """A line for each model and head; `narrow`: the columns that fit a console."""
    columns: list[Column] = [
        *([("run", "run", "")] if comparison.several else []),
        ("model", "label", ""),
        ("top-1 %", "top1", ".2f"),
        ("95 % interval", "top1_interval", "{0[0]:.2f} to {0[1]:.2f}".format),
        *([("macro %", "macro", ".2f")] if _unbalanced(comparison) else []),
        (f"top-{comparison.k} %", "topk", ".2f"),
        ("NLL", "nll", ".4f"),
        ("agreement %", "agreement", ".2f"),
        ("parameters", "parameters", ",d"),
        ("GFLOPs", "gflops", ".4f"),
        ("images/s", "images_per_second", ",.1f"),
        ("one image, ms", "latency_ms", ".2f"),
        ("file, MB", "megabytes", ".2f"),
    ]
    if narrow:
        wide = ("top1_interval", "macro", "gflops", "images_per_second", "latency_ms", "megabytes")
        columns = [column for column in columns if column[1] not in wide]
    records = [{"label": row.label, **comparison.record(row)} for row in comparison.rows]
    return Table.of("models", _caption(comparison, narrow=narrow), records, columns)


def _unbalanced(comparison: Comparison) -> bool:
    """Whether some classes have so many test images that accuracy is mostly theirs."""
    return is_unbalanced(np.bincount(comparison.labels).tolist())


def _caption(comparison: Comparison, *, narrow: bool) -> str:
    """What the columns are."""
    text = (
        f"{comparison.samples:,} test images; intervals are Wilson's. NLL: negative log-likelihood of the labels, in "
        "nats."
    )
    if not narrow and _unbalanced(comparison):
        text += " Macro: mean of the accuracies of the classes, which have different numbers of test images."
    if any(row.by_neighbours for row in comparison.rows):
        text += (
            " k-NN: the answer is the class with the most votes of the nearest training images; its probabilities are "
            "shares of the votes, at least 1e-6."
        )
    if any(row.metrics.agreement is not None for row in comparison.rows):
        text += " Agreement: share of images on which the teacher decides the same."
    batches = {
        run.costs("student")["batch"]: str(run.environment.get("device_name") or run.analysis.values["device"])
        for run in comparison.runs.values()
        if run.analysis is not None
    }
    if batches and not narrow:
        on = "; ".join(f"batches of {batch} on {device}" for batch, device in batches.items())
        text += (
            f" Speed: in evaluation, float32, {on}; teacher and student in turns, medians of five rounds. The control "
            "is the same network as the student."
        )
        if sum(run.analysis is not None for run in comparison.runs.values()) > 1:
            text += (
                " Each run was measured at its own end: compare speeds within a run; between runs they also differ by "
                "what else the machine did, up to a tenth or more."
            )
    if any(comparison.costs(row)["gflops"] is not None for row in comparison.rows):
        text += f" {COUNTED}"
    return text
