"""What a report opens with: the answer in one paragraph, and one table."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from distill.report.comparison import Comparison, Row
from distill.report.page import Cell, Table, number
from distill.report.sections.cost import Costs, costs_of
from distill.report.statistics import SIGNIFICANT, Verdict, p_text


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
    told = (
        f"{whose} answers {student.metrics.top1:.2f} % of {comparison.samples:,} test images correctly (95 % interval "
        f"{low:.2f} to {high:.2f} %)"
    )
    if teacher is not None:
        told += f", {_against(comparison.verdict(student, teacher))} its teacher ({teacher.metrics.top1:.2f} %)"
    yield f"{told}."
    if control is None:
        if teacher is not None:
            yield "Without a control nobody can tell how much of that is due to the teacher."
        return
    verdict = comparison.verdict(student, control)
    told = f"The same network trained without the teacher reaches {control.metrics.top1:.2f} %: "
    if verdict.p >= SIGNIFICANT:
        yield f"{told}no effect of distillation is shown ({verdict.points:+.2f} points, {p_text(verdict.p)})."
    else:
        what = "gains" if verdict.points > 0 else "costs"
        yield f"{told}under this seed distillation {what} {abs(verdict.points):.2f} points ({p_text(verdict.p)})."


def _against(verdict: Verdict) -> str:
    if verdict.p >= SIGNIFICANT:
        return f"with no difference shown ({verdict.points:+.2f} points, {p_text(verdict.p)}) from"
    return f"{abs(verdict.points):.2f} points {'above' if verdict.points > 0 else 'below'} ({p_text(verdict.p)})"


def main_table(comparison: Comparison) -> Table:
    """A line for each model and head; columns that nothing is known of are left out."""
    columns: list[tuple[str, Callable[[Row, Costs], Cell]]] = [
        ("top-1 %", lambda row, _: number(row.metrics.top1, ".2f")),
        ("95 % interval", lambda row, _: Cell("{:.2f} to {:.2f}".format(*row.top1_interval), row.top1_interval[0])),
        (f"top-{comparison.k} %", lambda row, _: number(row.metrics.topk, ".2f")),
        ("NLL", lambda row, _: number(row.metrics.nll, ".4f")),
        ("agreement %", lambda row, _: number(row.metrics.agreement, ".2f")),
        ("parameters", lambda row, _: number(row.parameters, ",d")),
        ("GFLOPs", lambda row, costs: number(costs.gflops if row.is_whole else None, ".4f")),
        ("images/s", lambda row, costs: number(costs.images_per_second if row.is_whole else None, ",.1f")),
        ("one image, ms", lambda row, costs: number(costs.latency_ms if row.is_whole else None, ".2f")),
        ("file, MB", lambda row, costs: number(costs.megabytes if row.is_whole else None, ".2f")),
    ]
    costs = [costs_of(comparison, row) for row in comparison.rows]
    filled = {
        name: [cell(row, cost) for row, cost in zip(comparison.rows, costs, strict=True)] for name, cell in columns
    }
    filled = {name: cells for name, cells in filled.items() if any(cell.text for cell in cells)}
    rows = [
        [*([Cell(row.run)] if comparison.several else []), Cell(row.label), *cells]
        for row, cells in zip(comparison.rows, zip(*filled.values(), strict=True), strict=True)
    ]
    header = [*(["run"] if comparison.several else []), "model", *filled]
    return Table("models", caption(comparison), header, rows, text_columns=2 if comparison.several else 1)


def caption(comparison: Comparison) -> str:
    """What the columns are."""
    text = (
        f"{comparison.samples:,} test images; intervals are Wilson's. NLL: negative log-likelihood of the labels, in "
        "nats."
    )
    if any(row.metrics.agreement is not None for row in comparison.rows):
        text += " Agreement: share of images on which the teacher decides the same."
    batches = {
        run.costs("student")["batch"]: str(run.environment.get("device_name") or run.analysis.values["device"])
        for run in comparison.runs.values()
        if run.analysis is not None
    }
    if batches:
        on = "; ".join(f"batches of {batch} on {device}" for batch, device in batches.items())
        text += (
            f" Speed: in evaluation, float32, {on}; teacher and student in turns, medians of five rounds. The control "
            "is the same network as the student."
        )
    return text
