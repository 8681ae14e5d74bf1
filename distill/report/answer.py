"""What a report opens with: the answer in one paragraph, and one table."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from distill.recipe.imbalance import is_unbalanced
from distill.report.comparison import Comparison
from distill.report.networks import TOGETHER
from distill.report.page import Column, Table
from distill.report.roles import CONTROL, STUDENT
from distill.report.sections.int8 import HEADS
from distill.report.statistics import EQUAL, SIGNIFICANT, PairedTest, p_text, wilson

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
    if student is None or (student.role == CONTROL and STUDENT in comparison.roles.values()):
        return  # what a control reaches is told with its student
    whose = f"The {student.role} of {name}" if comparison.several else f"The {student.role}"
    whose += f" ({student.architecture})" if student.architecture else ""
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
        called = f"its teacher {teacher.architecture}" if teacher.architecture else "its teacher"
        told += f", {_against(comparison.test(student, teacher))} {called} ({teacher.metrics.top1:.2f} %)"
    yield f"{told}."
    if control is None:
        if teacher is not None and not student.by_neighbours and student.role == STUDENT:
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
        *([] if narrow else [("network", "network", "")]),
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
        ("speed", "measured_apart", str),
        ("file, MB", "megabytes", ".2f"),
    ]
    if narrow:
        wide = ("top1_interval", "macro", "gflops", "images_per_second", "latency_ms", "measured_apart", "megabytes")
        columns = [column for column in columns if column[1] not in wide]
    return Table.of("models", _caption(comparison, narrow=narrow), list(main_records(comparison)), columns)


def main_records(comparison: Comparison) -> Iterator[dict[str, Any]]:
    """What the lines of `main_table` show; that of an int8 file comes after its run's student."""
    rows = comparison.rows
    for row, following in zip(rows, [*rows[1:], None], strict=True):
        yield {"label": row.label, **comparison.record(row)}
        last = following is None or (following.run, following.model) != (row.run, row.model)
        if row.model == "student" and last and (int8 := comparison.runs[row.run].int8) is not None:
            correct, images = int8["correct"][1], int8["images"]
            yield {
                "run": row.run,
                "model": row.role,
                "label": f"{row.role}, int8{HEADS[int8['head']]}",
                "network": row.architecture,
                "top1": 100 * correct / images,
                "top1_interval": wilson(correct, images),
                "parameters": row.parameters,
                "megabytes": int8["bytes"][1] / 1e6,
            }


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
    if not narrow and comparison.measured:
        first = comparison.measured[0]
        batch = next(iter(first.costs.values()))["batch"]
        when = "all in turns for this report" if first.where == TOGETHER else f"in turns at the end of {first.where}"
        text += (
            f" Speed: in evaluation, float32, batches of {batch} on {first.machine}, {when}, medians of five rounds. "
            "Models of the same network are measured once, so a control has the speed of its student."
        )
        if any(comparison.costs(row)["measured_apart"] for row in comparison.rows):
            text += (
                ' "Apart": measured at the end of another run, so compare it with nothing but its own teacher; '
                "`distill compare --measure` measures all together."
            )
    if any(run.int8 is not None for run in comparison.runs.values()):
        text += " int8: the file of the newest `distill export --int8`; its own section has the rest."
    if any(comparison.costs(row)["gflops"] is not None for row in comparison.rows):
        text += f" {COUNTED}"
    return text
