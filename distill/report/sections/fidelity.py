"""Fidelity: how far student and control follow the teacher."""

from __future__ import annotations

from distill.report.charts import Chart, short
from distill.report.comparison import Comparison, Row
from distill.report.fidelity import Fidelity, TwoByTwo, fidelity, inheritance
from distill.report.page import Cell, Part, Plot, Section, Table, number

PARTS = (
    ("corrected", "right", "#009e73"),
    ("other_mistakes", "another mistake", "#e69f00"),
    ("same_where_wrong", "the teacher's mistake", "#808080"),
)


def build(comparison: Comparison) -> Section | None:
    found: list[tuple[Row, Fidelity]] = []
    for row in comparison.rows:
        teacher = comparison.teacher_of(row.run)
        if row.model != "teacher" and teacher is not None:
            found.append((row, fidelity(row.logits, teacher.logits, comparison.labels)))
    if not found:
        return None
    tables = {
        name: inheritance(student.logits, control.logits, teacher.logits, comparison.labels)
        for name in comparison.runs
        if (teacher := comparison.teacher_of(name)) is not None
        and (student := comparison.row(name, "student")) is not None
        and (control := comparison.control_of(name)) is not None
    }
    parts: list[Part] = [_table(comparison, found)]
    wholes = [(row, values) for row, values in found if row.is_whole and values.teacher_wrong]
    if wholes:
        parts.append(
            Plot(
                "mistakes",
                "The teacher's mistakes",
                "What each model says of the images that the teacher has wrong.",
                _chart(comparison, wholes),
            )
        )
    for number_of_run, (name, pair) in enumerate(tables.items()):
        run = name if comparison.several else ""
        parts += [_two_by_two(f"inherits-{number_of_run}-{index}", run, table) for index, table in enumerate(pair)]
    return Section("fidelity", "Fidelity", _says(comparison, found, tables), parts, _data(comparison, found, tables))


def _says(comparison: Comparison, found: list[tuple[Row, Fidelity]], tables: dict[str, list[TwoByTwo]]) -> str:
    row, values = next((pair for pair in found if pair[0].is_whole), found[0])
    whose = f"{row.model} of {row.run}" if comparison.several else row.model
    says = f"The {whose} agrees with the teacher on {values.agreement:.2f} % of the images"
    if values.teacher_wrong:
        says += (
            f"; of the teacher's {values.teacher_wrong:,} mistakes {values.same_where_wrong:,} are made again and "
            f"{values.corrected:,} corrected"
        )
    pair = tables.get(row.run, [])
    if pair:
        made = pair[0].both + pair[0].control_only
        says += f" (the control makes {made:,} of them: {_more_or_less(pair[0])})"
    return says + "."


def _more_or_less(table: TwoByTwo) -> str:
    if table.verdict.words.startswith("no difference"):
        return f"no difference shown, p = {table.verdict.p:.3g}"
    more = "more" if table.verdict.points > 0 else "fewer"
    return f"the student makes {more} of them, {table.verdict.words.rsplit(', ', 1)[1]}"


def _table(comparison: Comparison, found: list[tuple[Row, Fidelity]]) -> Table:
    header = [
        "model", "agreement %", "where it is right %", "where it is wrong %", "KL", "same mistake", "other mistake",
        "corrected", "spoiled",
    ]  # fmt: skip
    rows = [
        [
            Cell(comparison.name(row)),
            number(values.agreement, ".2f"),
            number(values.agreement_where_right, ".2f"),
            number(values.agreement_where_wrong, ".2f"),
            number(values.kl, ".4f"),
            number(values.same_where_wrong, ",d"),
            number(values.other_mistakes, ",d"),
            number(values.corrected, ",d"),
            number(values.spoiled, ",d"),
        ]
        for row, values in found
    ]
    caption = (
        "Agreement with the teacher, overall and where it is right and wrong; KL of the teacher's probabilities to the "
        "model's, in nats. Spoiled: images that the teacher has right and the model wrong."
    )
    return Table("fidelity", caption, header, rows)


def _chart(comparison: Comparison, found: list[tuple[Row, Fidelity]]) -> Chart:
    chart = Chart(size=(4.7, 1.2 + 0.4 * len(found)))
    places = list(range(len(found)))
    left = [0.0] * len(found)
    for name, label, colour in PARTS:
        counts = [getattr(values, name) for _, values in found]
        shares = [100 * count / values.teacher_wrong for count, (_, values) in zip(counts, found, strict=True)]
        tips = [
            f"{comparison.model_name(row)}: {label} on {count:,} of {values.teacher_wrong:,}"
            for count, (row, values) in zip(counts, found, strict=True)
        ]
        chart.bars(places, shares, tips, left=left, color=colour, label=label)
        left = [start + share for start, share in zip(left, shares, strict=True)]
    axes = chart.axes[0]
    axes.set_yticks(places, [short(comparison.model_name(row), 22) for row, _ in found])
    axes.invert_yaxis()
    axes.set_xlim(0, 100)
    axes.grid(visible=False, axis="y")
    chart.label("% of the teacher's mistakes", "")
    chart.legend_below()
    return chart


def _two_by_two(name: str, run: str, table: TwoByTwo) -> Table:
    rows = [
        [Cell("student: yes"), number(table.both, ",d"), number(table.student_only, ",d")],
        [Cell("student: no"), number(table.control_only, ",d"), number(table.neither, ",d")],
    ]
    caption = (
        f"{f'{run}: ' if run else ''}of the teacher's mistakes, on how many student and control do so. Student against "
        f"control: {_more_or_less_of(table)}."
    )
    return Table(name, caption, [table.what, "control: yes", "control: no"], rows, span=1)


def _more_or_less_of(table: TwoByTwo) -> str:
    if table.verdict.words.startswith("no difference"):
        return table.verdict.words
    return f"{'more' if table.verdict.points > 0 else 'less'} often, {table.verdict.words.rsplit(', ', 1)[1]}"


def _data(comparison: Comparison, found: list[tuple[Row, Fidelity]], tables: dict[str, list[TwoByTwo]]) -> object:
    models = [
        {
            "model": comparison.name(row),
            "agreement": values.agreement,
            "agreement_where_right": values.agreement_where_right,
            "agreement_where_wrong": values.agreement_where_wrong,
            "kl": values.kl,
            "teacher_wrong": values.teacher_wrong,
            "same_mistakes": values.same_where_wrong,
            "other_mistakes": values.other_mistakes,
            "corrected": values.corrected,
            "spoiled": values.spoiled,
        }
        for row, values in found
    ]
    against = [
        {
            "run": name,
            "what": table.what,
            "both": table.both,
            "student_only": table.student_only,
            "control_only": table.control_only,
            "neither": table.neither,
            "p": table.verdict.p,
        }
        for name, pair in tables.items()
        for table in pair
    ]
    return {"models": models, "against_control": against}
