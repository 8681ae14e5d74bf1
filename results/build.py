"""Builds results/README.md and its plots from the collected runs, results/runs, and from nothing else.

    python -m results.build

No number in it is typed: run `python -m results.campaign`, `python -m results.collect`, then this. The same runs give
the same bytes. What has not been run yet says so.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.ticker import MaxNLocator

from distill.errors import InputError
from distill.files.plain_data import read_json
from distill.files.text import markdown, write_text
from distill.recipe import Recipe
from distill.report.charts import COLOURS, Chart
from distill.report.curves import curves_of
from distill.report.runs import RunFiles
from distill.report.statistics import holm, p_value
from results.arms import HERE, PLAN, Block, Goal, Question, load_arm, says, seeds_of
from results.cells import Cells, Difference, difference, read_cells

NOT_RUN = "not run"
SPEED = HERE / "speed"
TRAINING_IMAGES = 50_000
"""Of CIFAR-10."""
STYLES = ("-", "--", ":")
Tests = Mapping[tuple[str, str], tuple[Difference, float]]
"""Of a block, by arm and the arm that it is tested against: the difference, and its p after Holm's adjustment."""
INTRODUCTION = """\
# Results

Built by `python -m results.build` out of the run files in [runs](runs); no number is typed by hand. `python -m
results.campaign cpu --runs DIR` (or `gpu`, `gpu-short`) runs what is missing, `python -m results.collect DIR` brings
its files here; [LOG.md](LOG.md) is the log of what was tried and learned. An arm is a recipe in [recipes](recipes), run
by `accelerate launch distill/train.py results/recipes/ARM.yaml seed=SEED`.

CIFAR-10, where a question says nothing else. Top-1 accuracy is that of the test images (of CIFAR-10 10,000), which each
run reads once, at its end, for the weights that were chosen on its validation images: mean and standard deviation over
the seeds. A difference is that of the answers under the seeds that both arms have. p is that of a sign-flip test over
the images, in which an image's answers under all seeds stay together (for one seed McNemar's exact test): it speaks of
the networks that were trained, on other images. "p over seeds", a paired t-test of their accuracies, asks how far other
seeds would agree, and over three seeds it shows only what is large. "p, Holm" is p adjusted for the tests of its table;
the other two are not. The interval of a difference is that of a bootstrap over images and seeds; the images are drawn
once for all seeds. "In common" says what the two arms share under each seed: the weights that they
began from, and the batches that they saw. Minutes are those of a run from its first step to its test, without its
pauses, whatever else the machine had to do."""


def main(*, runs: Path = HERE / "runs", to: Path = HERE) -> int:
    try:
        texts = build(read_cells(runs))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if len(texts) > 1:
        (to / "plots").mkdir(exist_ok=True)
    for old in (to / "plots").glob("*.svg"):
        if f"plots/{old.name}" not in texts:
            old.unlink()
    for name, text in texts.items():
        write_text(to / name, text)
    return 0


def build(cells: Cells) -> dict[str, str]:
    """The texts of all files, by their names."""
    plots = {f"plots/{block.name}.svg": chart for block in _blocks() if (chart := curves(cells, block)) is not None}
    parts = [INTRODUCTION, "## Goals", goals(cells)]
    for number, question in enumerate(PLAN.questions, start=1):
        parts += [f"## {number}. {question.title}", question.asks]
        for block in question.blocks:
            parts += [budget(cells, block), table(cells, block)]
            if f"plots/{block.name}.svg" in plots:
                caption = "Validation accuracy after each epoch, of the weights' moving average; means over the seeds."
                parts += [f"![Validation accuracy by epoch](plots/{block.name}.svg)", caption]
    return {"README.md": "\n\n".join(parts) + "\n", **{name: chart.to_svg_file() for name, chart in plots.items()}}


def _blocks() -> Iterator[Block]:
    return (block for question in PLAN.questions for block in question.blocks)


def _arms(block: Block) -> list[str]:
    return list(dict.fromkeys(row[0] for row in block.rows))


def lines(header: Sequence[str], rows: Sequence[Sequence[str]], *, words: Sequence[int]) -> str:
    """A table in Markdown; the columns `words` are words, the others numbers. Cells are Markdown already."""
    rules = [":---" if index in words else "---:" for index in range(len(header))]
    return "\n".join(f"| {' | '.join(row)} |" for row in [header, rules, *rows])


def table(cells: Cells, block: Block) -> str:
    """A block's arms; where none of them has been run, their names."""
    names = _arms(block)
    if not any(name in cells.runs for name in names):
        return f"None of these has been run: {', '.join(f'`{name}`' for name in names)}."
    if block.costs:
        return _table_with_costs(cells, block)
    if block.features:
        return _table_of_features(cells, block)
    if block.classes:
        return _table_of_classes(cells, block)
    header = ["arm", "", "seeds", "top-1 %", "validation %", "against", "points", "95 % interval", "p", "p, Holm",
              "p over seeds", "in common", "minutes"]  # fmt: skip
    tested = _tests(cells, block)
    rows = [_row(cells, tested, *row) for row in block.rows]
    return lines(header, rows, words=(0, 1, 5, 11))


def _tests(cells: Cells, block: Block) -> Tests:
    pairs = dict.fromkeys((row[0], row[1]) for row in block.rows if len(row) > 1)
    measured = ((pair, difference(cells.rights(pair[0]), cells.rights(pair[1]))) for pair in pairs)
    found = {pair: test for pair, test in measured if test is not None}
    adjusted = holm([test.p for test in found.values()])
    return {pair: (test, p) for (pair, test), p in zip(found.items(), adjusted, strict=True)}


def _table_with_costs(cells: Cells, block: Block) -> str:
    """The arms with what their students cost, on a quiet machine."""
    measured: dict[str, Any] = read_json(SPEED / f"{block.name}.json")
    header = ["arm", "", "parameters", "GFLOPs", "images/s", "epochs", "minutes", "seeds", "top-1 %", "agreement %",
              "against", "points", "95 % interval", "p", "p, Holm", "p over seeds"]  # fmt: skip
    rows, tests = [], _tests(cells, block)
    for row in block.rows:
        name, says, seeds, top1, _, against, *tested, _, _ = _row(cells, tests, *row)
        cost, recipe = measured["arms"][row[0]], load_arm(row[0], 0)
        minutes = (1 - recipe.data.validation) * TRAINING_IMAGES * recipe.train.epochs / cost["images_per_second"] / 60
        agreement = _number(cells.agreement(row[0]), ".2f") if top1 != NOT_RUN else NOT_RUN
        costs = [f"{cost['parameters'] / 1e6:.2f} M", f"{cost['gflops']:.3f}", f"{cost['images_per_second']:.0f}"]
        epochs = str(recipe.train.epochs)
        rows.append([name, says, *costs, epochs, f"{minutes:.0f}", seeds, top1, agreement, against, *tested])
    machine = measured["machine"]
    said = (
        f"GFLOPs of one image's forward pass; images a second of training, its teacher included, and the minutes that "
        f"follow from them, on a quiet {machine['device_name']} in {machine['precision']} with {machine['threads']} "
        "thread(s), by `python -m results.speed`. Agreement: test images that student and teacher decide alike."
    )
    return f"{lines(header, rows, words=(0, 1, 10))}\n\n{said}"


def _table_of_features(cells: Cells, block: Block) -> str:
    header = ["arm", "", "epochs", "seeds", "k-NN %", "linear %", "top-1 %", "against", "points", "95 % interval", "p",
              "p, Holm", "p over seeds"]  # fmt: skip
    rows, tests = [], _tests(cells, block)
    for row in block.rows:
        name, says, seeds, _, _, against, *tested, _, _ = _row(cells, tests, *row)
        found = [cells.tested(row[0], f"student/{measure}") for measure in ("knn", "linear", "top1")]
        told = [_spread(values) if values else "" if cells.of(row[0]) else NOT_RUN for values in found]
        rows.append([name, says, f"{load_arm(row[0], 0).train.epochs:g}", seeds, *told, against, *tested])
    if (pixels := cells.pixels(_arms(block))) is not None:
        images, correct = pixels
        knn = f"{100 * correct / images:.2f}"
        rows.append(["raw pixels", f"of {images:,} test images", "", "", knn, *[""] * 8])
    said = (
        "Votes of the 20 nearest training images, and a linear classifier, on frozen features; on the test images. "
        "Differences and their tests are of top-1, of two runs without labels of k-NN."
    )
    return f"{lines(header, rows, words=(0, 1, 7))}\n\n{said}"


def _table_of_classes(cells: Cells, block: Block) -> str:
    """The arms with averages over the classes."""
    header = ["arm", "", "seeds", "top-1 %", "macro %", "worst class %", "against", "points", "95 % interval", "p",
              "p, Holm", "p over seeds", "minutes"]  # fmt: skip
    rows, tests = [], _tests(cells, block)
    for row in block.rows:
        name, says, seeds, top1, _, against, *tested, _, minutes = _row(cells, tests, *row)
        metrics = cells.metrics(row[0])
        found = [[getattr(of_run, key) for of_run in metrics] for key in ("macro", "worst_class")]
        averages = [_spread(values) if values else NOT_RUN for values in found]
        rows.append([name, says, seeds, top1, *averages, against, *tested, minutes])
    said = (
        "Macro: the mean of the accuracies of the classes on the test images; worst class: the lowest of them. "
        "Differences and their tests are of top-1."
    )
    return f"{lines(header, rows, words=(0, 1, 6))}\n\n{said}"


def _row(cells: Cells, tests: Tests, arm: str, against: str | None = None) -> list[str]:
    values = cells.top1(arm)
    tested = ["none", "", "", "", "", "", ""]
    if against is not None:
        found = tests.get((arm, against))
        told = [NOT_RUN] * 6 if found is None else _tested(cells, arm, against, *found)
        tested = [f"`{against}`", *told]
    measured = [_spread(values), _number(cells.validation(arm), ".2f")] if values else [NOT_RUN, NOT_RUN]
    minutes = _number(cells.minutes(arm), ".1f") if values else NOT_RUN
    return [f"`{arm}`", markdown(says(arm)), f"{len(values)} of {len(seeds_of(arm))}", *measured, *tested, minutes]


def _tested(cells: Cells, arm: str, against: str, found: Difference, adjusted: float) -> list[str]:
    over_seeds = "" if found.p_over_seeds is None else p_value(found.p_over_seeds)
    interval = "{:+.2f} to {:+.2f}".format(*found.interval)
    ps = [p_value(found.p), p_value(adjusted), over_seeds]
    return [f"{found.points:+.2f}", interval, *ps, cells.matched(arm, against) or "neither"]


def _spread(values: Sequence[float]) -> str:
    """'61.20 ± 0.35'; of one seed there is no deviation."""
    return f"{np.mean(values):.2f}" + (f" ± {np.std(values, ddof=1):.2f}" if len(values) > 1 else "")


def _number(value: float | None, form: str) -> str:
    return "unknown" if value is None else format(value, form)


def budget(cells: Cells, block: Block) -> str:
    """What the arms of a block have to learn with, as recipes and runs say it."""
    names = _arms(block)
    found: dict[str, list[str]] = {}
    for name in names:
        recipe = load_arm(name, 0)
        epochs = "" if block.costs or block.features else f"{recipe.train.epochs:g} epochs "  # those have a column
        found.setdefault(f"{_model(recipe)}, {epochs}{_schedule(recipe)}", []).append(name)
    machines = list(dict.fromkeys(filter(None, (_machine(cells, name) for name in names))))
    teachers = list(dict.fromkeys(filter(None, (_teacher(cells, name) for name in names))))
    budgets = [
        f"**Budget: {text}**" + (f" ({', '.join(f'`{name}`' for name in arms)})" if len(found) > 1 else "")
        for text, arms in found.items()
    ]
    told = [f"Run on {' and '.join(machines)}."] if machines else []
    told += [f"Teacher: {' and '.join(teachers)}."] if teachers else []
    return " ".join([f"{'; '.join(budgets)}.", *told])


def _model(recipe: Recipe) -> str:
    student = recipe.student
    patches = f" on patches of {student.patch_size}" if student.patch_size else ""
    return f"{student.model}{patches} at {recipe.data.resolution} px"


def _schedule(recipe: Recipe) -> str:
    train, held_out = recipe.train, recipe.data.validation
    share = f"{100 * held_out:g} %" if held_out < 1 else f"{held_out:,g}"
    chosen_on = f"{share} of the training images held out" if recipe.data.name != "folder" else "a folder to choose on"
    return f"in batches of {train.batch_size:,}, {chosen_on}"


def _machine(cells: Cells, arm: str) -> str | None:
    for run in cells.of(arm):
        environment = run.environment
        threads = f", {environment['threads']} thread(s) a run" if environment["device"] == "cpu" else ""
        return markdown(f"{environment['device_name']} in {environment['precision']}{threads}")
    return None


def _teacher(cells: Cells, arm: str) -> str | None:
    for run in cells.of(arm):
        if (teacher := cells.teacher(run)) is not None:
            return f"{markdown(teacher[0])}, {teacher[1]:.2f} %"
    return None


def goals(cells: Cells) -> str:
    rows = [
        _goal(cells, question, goal) for question in PLAN.questions for block in question.blocks for goal in block.goals
    ]
    return lines(["question", "goal", "arm", "measured", "met"], rows, words=(0, 1, 2, 3, 4))


def _goal(cells: Cells, question: Question, goal: Goal) -> list[str]:
    measured, met = _measured(cells, goal)
    return [question.title, markdown(goal.says), f"`{goal.arm}`", measured, met]


def _measured(cells: Cells, goal: Goal) -> tuple[str, str]:
    """What there is of it, and whether it is met: 'yes', 'no' or 'not run'."""
    values, minutes = cells.top1(goal.arm), cells.minutes(goal.arm)
    if not values:
        return NOT_RUN, NOT_RUN
    said, met = [], True
    if goal.top1 is not None:
        said.append(f"{_spread(values)} %")
        met = met and float(np.mean(values)) >= goal.top1
    if goal.minutes is not None:
        said.append(f"{_number(minutes, '.1f')} min")
        met = met and minutes is not None and minutes <= goal.minutes
    if goal.against is not None:
        is_teacher = goal.against == "teacher"
        theirs = cells.rights_of_teacher(goal.arm) if is_teacher else cells.rights(goal.against)
        found = difference(cells.rights(goal.arm), theirs)
        if found is None:
            return NOT_RUN, NOT_RUN
        said.append(f"{found.words}, {found.seeds} seed(s)")
        met = met and found.points > 0 and found.points >= goal.points and (goal.p is None or found.p < goal.p)
    return ", ".join(said), "yes" if met else "no"


def curves(cells: Cells, block: Block) -> Chart | None:
    """Validation accuracy by epoch of a block's arms; None where none has been run."""
    chart = Chart("epoch", "validation top-1 (%)", size=(7.5, 4.2))
    chart.axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    names = _arms(block)
    drawn = False
    for index, name in enumerate(names):
        points = _points(cells.of(name))
        if points:
            drawn = True
            chart.line(
                list(points), list(points.values()), [], label=name,
                color=COLOURS[index % len(COLOURS)], linestyle=STYLES[index // len(COLOURS) % len(STYLES)],
            )  # fmt: skip
    if not drawn:
        return None
    chart.legend()
    return chart


def _points(runs: Sequence[RunFiles]) -> dict[float, float]:
    """Mean accuracy by epoch, where all runs have one; of the moving average, if there is one."""
    found = []
    for run in runs:
        measured = curves_of({run.path.name: run})["top1"]
        averaged = [curve for curve in measured if curve.variant.endswith("EMA")]
        found += [dict(zip(curve.epochs, curve.values, strict=True)) for curve in (averaged or measured)[:1]]
    common = [epoch for epoch in found[0] if all(epoch in points for points in found)] if found else []
    return {epoch: float(np.mean([points[epoch] for points in found])) for epoch in common}


if __name__ == "__main__":
    sys.exit(main())
