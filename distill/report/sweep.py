"""The section of a report on what a sweep tried, and its table for the console; from the record in `sweep.json`."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from rich.table import Table as ConsoleTable

from distill.report.charts import COLOURS, TEACHER_COLOUR, Chart
from distill.report.page import Column, Part, Plot, Section, Table
from distill.report.statistics import p_value
from distill.report.tables import console_table

Record = Mapping[str, Any]
MOST_LINES = 200
"""Of the parallel coordinates."""
MOST_ON_CONSOLE = 20


def sweep_section(record: Record) -> Section:
    """What was tried, the ranking, the importance of each key, and parallel coordinates."""
    parts: list[Part] = [ranking_table(record), *_plots(record), _tried(record)]
    return Section("sweep", "The sweep", summary(record), parts, dict(record))


def summary(record: Record) -> str:
    """Sentences: how many trials there were, what was chosen, and what its figure is worth."""
    trials, ranking = record["trials"], record["ranking"]
    counts = {state: sum(trial["state"] == state for trial in trials) for state in ("complete", "pruned", "fail")}
    told = [f"{len(trials)} trials of {record['base']} ({record['search']}): {counts['complete']} complete"]
    told += [f"{counts['pruned']} stopped early"] * bool(counts["pruned"]) + [f"{counts['fail']} failed"] * bool(
        counts["fail"]
    )
    sentences = [f"{', '.join(told)}."]
    if ranking:
        best = ranking[0]
        with_what = f" has {described(best['labels'])}" if record["keys"] else " is that of the recipe as it is"
        sentences.append(f"The best on validation, {best['mean']:.2f} %,{with_what}.")
        if len(ranking) > 1:
            sentences.append("That figure is optimistic, being the largest of several.")
        if "test" in record["chosen"]:
            sentences.append("No other trial has seen the test images.")
    return " ".join([*sentences, *record["told"]])


def described(labels: Mapping[str, str]) -> str:
    return ", ".join(f"{key} {value}" for key, value in labels.items())


def ranking_table(record: Record) -> Table:
    seeds = len(record["seeds"])
    rows = [
        {**rank["labels"], **rank, "rank": str(rank["rank"]), "runs": len(rank["seeds"])} for rank in record["ranking"]
    ]
    teachers = {trial["number"]: trial["teacher"] for trial in record["trials"]}
    for row in rows:
        row["teacher"] = teachers[row["trials"][0]]
    columns: list[Column] = [("rank", "rank", ""), *((key, key, "") for key in record["keys"])]
    columns += [
        ("seeds", "runs", "d"),
        ("validation %", "mean", ".2f"),
        ("sd", "deviation", ".2f"),
        ("95 % interval", "interval", "{0[0]:.2f} to {0[1]:.2f}".format),
        ("p against the first", "p_against_best", p_value),
    ]
    if "teacher" in record["keys"]:
        columns.append(("its teacher's own %", "teacher", ".2f"))
    images = record["validation_images"]
    how = (
        "Student's t interval of the mean over the seeds, and a paired t-test over them"
        if seeds > 1
        else f"Wilson's interval over {images:,} validation images"
        if images
        else "no interval"
    )
    return Table.of("sweep", f"Configurations by {record['metric']} on validation: {how}.", rows, columns)


def render_sweep(record: Record) -> ConsoleTable:
    """The first of the ranking."""
    table = ranking_table(record)
    return console_table(replace(table, rows=table.rows[:MOST_ON_CONSOLE]))


def _tried(record: Record) -> Table:
    rows = [{**trial["labels"], **trial} for trial in record["trials"]]
    columns: list[Column] = [("trial", "name", ""), *((key, key, "") for key in record["keys"]), ("state", "state", "")]
    columns += [("note", "note", ""), ("seed", "seed", "d"), ("validation %", "validation", ".2f")]
    columns += [("epochs", "epoch", ".4g"), ("minutes", "minutes", ".1f"), ("died", "failures", "d")]
    return Table.of("sweep-trials", "All trials.", rows, columns, folded=True)


def _plots(record: Record) -> Iterator[Plot]:
    if record["importance"]:
        yield Plot("sweep-importance", "Importance", "Share of the variance on validation that each key explains, by "
                   "fANOVA (Hutter et al. 2014).", _importance(record["importance"]))  # fmt: skip
    known = [trial for trial in record["trials"] if trial["validation"] is not None][:MOST_LINES]
    if record["keys"] and len(known) > 1:
        yield Plot("sweep-coordinates", "What was tried", "A line a trial, from its values to its accuracy on "
                   "validation; blue for the chosen configuration.", _coordinates(record, known))  # fmt: skip


def _importance(shares: Mapping[str, float]) -> Chart:
    keys = sorted(shares, key=lambda key: shares[key])
    chart = Chart("share", "", size=(4.7, 0.9 + 0.35 * len(keys)))
    chart.axes.barh(range(len(keys)), [shares[key] for key in keys], height=0.6, color=COLOURS[0])
    chart.axes.set_yticks(range(len(keys)), keys)
    chart.axes.set_xlim(0, 1)
    return chart


def _coordinates(record: Record, trials: list[Record]) -> Chart:
    names = [*record["keys"], *(["seed"] if len(record["seeds"]) > 1 else []), record["metric"]]
    columns = [_positions([_value(trial, name, record) for trial in trials]) for name in names]
    chart = Chart("", "", size=(max(4.7, 1.6 * len(names)), 3.2))
    axis, chosen = chart.axes, (record["chosen"] or {}).get("trials", [])
    for index, trial in sorted(enumerate(trials), key=lambda pair: pair[1]["number"] in chosen):
        best = trial["number"] in chosen
        tip = f"{trial['name']}: {trial['validation']:.2f} %"
        chart.line(
            range(len(names)),
            [heights[index] for heights, _ in columns],
            [tip] * len(names),
            label=trial["name"],
            color=COLOURS[0] if best else TEACHER_COLOUR,
            linewidth=2.0 if best else 0.9,
            alpha=1.0 if best else 0.6,
        )
    for place, (_, ticks) in enumerate(columns):
        for height, text in ticks:
            axis.annotate(text, (place, height), xytext=(4, 3), textcoords="offset points", fontsize=8)
    axis.set_xticks(range(len(names)), names)
    axis.set_yticks([])
    axis.margins(x=0.12, y=0.08)
    return chart


def _value(trial: Record, name: str, record: Record) -> Any:
    if name == record["metric"]:
        return trial["validation"]
    if name == "seed":
        return trial["seed"]
    value = trial["values"][name]
    return value if _is_number(value) else trial["labels"][name]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _positions(values: list[Any]) -> tuple[list[float], list[tuple[float, str]]]:
    """Heights from 0 to 1 of the values on one axis, and its ticks: numbers in scale, others evenly, in their order."""
    numbers = [value for value in values if _is_number(value)]
    if len(numbers) == len(values) and min(numbers) < max(numbers):
        logarithmic = min(numbers) > 0 and max(numbers) >= 10 * min(numbers)
        scaled = [math.log(number) if logarithmic else float(number) for number in numbers]
        low, high = min(scaled), max(scaled)
        heights = [(number - low) / (high - low) for number in scaled]
        return heights, [(0.0, f"{min(numbers):.4g}"), (1.0, f"{max(numbers):.4g}")]
    words = [str(value) for value in values]
    distinct = list(dict.fromkeys(words))
    place = {word: index / max(1, len(distinct) - 1) for index, word in enumerate(distinct)}
    return [place[word] for word in words], [(place[word], word) for word in distinct]
