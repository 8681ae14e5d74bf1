# PYTHON_ARGCOMPLETE_OK
"""The `distill` command. Subcommands import what they need when they run, to start fast."""

from __future__ import annotations

import argparse
import atexit
import json
import os
import re
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from io import TextIOWrapper
from pathlib import Path
from typing import NoReturn

from distill.errors import InputError, Interrupted
from distill.files.regular import reachable
from distill.files.text import visible
from distill.launching.exit_messages import EXIT_CTRL_C, exit_code, exit_message, print_message, write_interruption
from distill.launching.launcher import is_local_main_process, is_main_process
from distill.launching.signals import StopRequest
from distill.scaffold.rules import GOALS
from distill.version import __version__


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code. User errors are one message, printed by one process.

    Without arguments: run the command line of this process, and exit.
    """
    if arguments is None:
        if "_ARGCOMPLETE" in os.environ:
            from distill.completion import finder

            finder({name: summary for name, (summary, _, _) in COMMANDS.items()}, add_arguments).answer()
        run(sys.argv[1:])
    if isinstance(sys.stdout, TextIOWrapper):  # without some characters it shows their numbers, as standard error does
        sys.stdout.reconfigure(errors="backslashreplace")
    parser = build_parser()
    command, rest = _split(list(arguments))
    if command not in COMMANDS:
        parser.parse_args([*([command] if command else []), *rest] or ["--help"])
        return 0
    function = COMMANDS[command][2]
    own = argparse.ArgumentParser(prog=f"distill {command}", description=function.__doc__)
    add_arguments(own, command)
    options = own.parse_intermixed_args(rest)
    if getattr(options, "arguments", None):
        _take_target(own, options)
    try:
        if function is not train:  # which handles signals before it imports anything
            _load_plugins(options)
            with reachable():
                return function(options) or 0
        return function(options) or 0
    except InputError as error:
        # Only these two run on all processes of a launch.
        if function not in (train, evaluate) or is_main_process() or error.process is not None:
            print(f"error: {visible(str(error))}", file=sys.stderr)
        return exit_code(error)
    except KeyboardInterrupt:  # of `train`, signals are exceptions of its own
        print("interrupted", file=sys.stderr)
        return EXIT_CTRL_C


def run(arguments: Sequence[str]) -> NoReturn:
    """Run `main`, then exit the process at once, without the seconds that Python takes to unload torch."""
    code = main(arguments)
    if sys.flags.interactive:  # `python -i` continues
        sys.exit(code)
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):  # a closed terminal
            stream.flush()
    os._exit(code)


def build_parser() -> argparse.ArgumentParser:
    """The top-level parser; each command has its own."""
    listing = "\n".join(f"  {name:10} {summary}" for name, (summary, _, _) in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="distill",
        description="Distil a pretrained CNN into a small vision transformer.",
        epilog=f"commands:\n{listing}\n\n`distill COMMAND --help` explains one.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=__version__)
    parser.add_argument("command", choices=sorted(COMMANDS), metavar="COMMAND")
    return parser


def add_arguments(parser: argparse.ArgumentParser, command: str) -> None:
    """Add all arguments of a command to its parser."""
    COMMANDS[command][1](parser)
    parser.add_argument(
        "--plugin",
        action="append",
        default=[],
        metavar="MODULE|FILE.py",
        help="code that registers attention kinds, students, methods, teachers or datasets; may be repeated",
    )


def _split(arguments: list[str]) -> tuple[str | None, list[str]]:
    return (arguments[0], arguments[1:]) if arguments and not arguments[0].startswith("-") else (None, arguments)


def _take_target(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Separate the RECIPE or TARGET, and what may follow it, from the key=value overrides, which may be anywhere."""
    targets = [text for text in options.arguments if not is_override(text)]
    name, following = parser.get_default("target_name"), parser.get_default("following")
    if not 0 < len(targets) <= (2 if following else 1):
        parser.error(f"give one {name}{f' and one {following}' * bool(following)}, not: {' '.join(targets) or 'none'}")
    options.target, *others = targets
    options.following = others[0] if others else None
    options.overrides = [text for text in options.arguments if is_override(text)]


def is_override(text: str) -> bool:
    """Whether an argument is key=value, and no path."""
    return re.match(r"[\w.]+=", text) is not None


def _target_arguments(
    parser: argparse.ArgumentParser,
    name: str,
    explanation: str,
    *,
    number: str = "+",
    following: str | None = None,
    options: str = "[options]",
) -> None:
    """Add a target of that name, perhaps another word after it, and overrides, which `_take_target` separates."""
    parser.set_defaults(target_name=name, following=following)
    words = [name if number == "+" else f"[{name}]", *([f"[{following}]"] if following else []), "[key=value ...]"]
    parser.usage = f"{parser.prog} {' '.join(words)} {options}"
    parser.add_argument("arguments", nargs=number, metavar=name, help=explanation)


def _load_plugins(options: argparse.Namespace) -> None:
    if options.plugin:
        from distill.registry import load_plugin

        for target in options.plugin:
            load_plugin(target)


def _recipe_arguments(parser: argparse.ArgumentParser) -> None:
    explanation = "a YAML file, and overrides of single values, such as train.epochs=10; in any order"
    _target_arguments(parser, "RECIPE", explanation)


def _init_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, metavar="DIR", help="images: DIR/train/CLASS, DIR/test/CLASS or DIR/CLASS")
    parser.add_argument(
        "--teacher",
        metavar="NAME|FILE",
        help="a model as in teacher.model, or a file with its weights (default: the recipe trains one)",
    )
    parser.add_argument(
        "--goal", choices=GOALS, default=GOALS[0], help=f"what matters most of the student; default: {GOALS[0]}"
    )
    parser.add_argument("--out", type=Path, metavar="RECIPE.yaml", help="default: named after the folder")


def init(options: argparse.Namespace) -> None:
    """Write a recipe for a folder of images, by what is in it, the teacher and this machine."""
    from distill import api
    from distill.console import say

    begun = api.begin(options.folder, teacher=options.teacher, goal=options.goal, out=options.out)
    for key, value in begun.facts:
        say(f"{key:<9} {value}")
    for warning in begun.warnings:
        print(f"warning: {visible(warning)}", file=sys.stderr)
    say(f"next: {begun.command}")


def _train_arguments(parser: argparse.ArgumentParser) -> None:
    _recipe_arguments(parser)
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="the run directory itself (default: runs/<name>-<time>)"
    )
    parser.add_argument(
        "--resume",
        metavar="auto|PATH",
        help="continue from the newest intact checkpoint, or from that run or checkpoint",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="build everything, run preflight and a few steps, create no run"
    )


def train(options: argparse.Namespace) -> int:
    """Train the student of a recipe, as `accelerate launch distill/train.py` does."""
    arguments = sys.argv[2:] if sys.argv[1:2] == ["train"] else sys.argv[1:]
    plugins = [word for target in options.plugin for word in ("--plugin", target)]
    resuming = [options.target, *options.overrides, *plugins]

    def end(error: BaseException) -> int:
        directories = [run.path for run in stop.runs]
        recorded = [run.end(error) for run in reversed(stop.runs)]
        out = None if options.dry_run else options.out
        if isinstance(error, Interrupted) and not stop.runs and out and is_main_process():
            write_interruption(error, out)
            directories = [out]
        if is_main_process() or any(recorded) or (stop.isolated and is_local_main_process()):
            print_message(visible(exit_message(error, directories, arguments, resuming)), stop.launcher)
        return exit_code(error)

    stop = StopRequest(end)
    try:
        from distill.recipe import load

        _load_plugins(options)
        load(options.target, options.overrides)  # reports bad recipes before torch is imported
        from distill import api

        if options.dry_run:
            api.dry_run(options.target, overrides=options.overrides)
        else:
            run = api.train(
                options.target,
                out=options.out,
                resume=options.resume,
                overrides=options.overrides,
                plugins=options.plugin,
            )
            if is_main_process():
                _show(run.path)
    except BaseException as error:
        return end(stop.exit_cause(error))
    return 0


def _show(run: Path) -> None:
    """Print the table of a finished run, and the paths of its files; of one without a test, how to go on."""
    from distill.console import console, say
    from distill.run import is_finished

    if not is_finished(run):
        say(f"trained  {run} (train.test is false: no test, control or report; --resume with true does them)")
        return
    from distill.report.comparison import compare
    from distill.report.tables import render_console

    console.print(render_console(compare([run])))
    for label, path in (("student", run / "export"), ("report", run / "report.html"), ("run", run)):
        if path.exists():
            say(f"{label:8} {path}")


def validate(options: argparse.Namespace) -> None:
    """Check a recipe, and that what it names is there, and print it fully resolved."""
    from distill.recipe import load
    from distill.recipe.loading import Problem, listed
    from distill.validation import doubtful, missing

    recipe = load(options.target, options.overrides)
    if problems := [Problem.of(found) for found in missing(recipe, plugins=bool(options.plugin))]:
        raise InputError(listed(problems, options.target))
    for warning in doubtful(recipe):
        print(f"warning: {visible(warning)}", file=sys.stderr)
    print(recipe.to_yaml(), end="")


def schema(options: argparse.Namespace) -> None:
    """Print the JSON schema of recipes, for editors."""
    from distill.recipe import recipe_model

    print(json.dumps(recipe_model({}).model_json_schema(), indent=2))


def _evaluate_arguments(parser: argparse.ArgumentParser) -> None:
    explanation = (
        "a run, an export, a recipe (for its teacher) or a teacher's name; a folder DIR of other images, DIR/CLASS or "
        "DIR/test/CLASS, in place of the recipe's data; and overrides such as data.root=DIR"
    )
    _target_arguments(parser, "TARGET", explanation, following="DIR")
    parser.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="a new folder for predictions and report (default: the run itself; for other data, one under evaluations)",
    )


def evaluate(options: argparse.Namespace) -> None:
    """Evaluate the student of a run or an export on its test set or on other data of its classes, or a teacher."""
    from distill import api
    from distill.console import console, say
    from distill.evaluate_command import tables

    found = api.evaluate(options.target, data=options.following, out=options.out, overrides=options.overrides)
    if is_main_process():
        console.print(*tables(found))
        if found.report is not None:
            say(f"report   {found.report}")


def _compare_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="finished run directories")
    parser.add_argument("--out", type=Path, default=Path("report.html"), metavar="HTML", help="default: report.html")
    parser.add_argument(
        "--measure", action="store_true", help="measure the speed of all their networks together, on this machine"
    )


def compare(options: argparse.Namespace) -> None:
    """Compare teacher, student and control of one or more runs in a report."""
    from distill import api
    from distill.console import console, say
    from distill.report.tables import render_console

    report = api.compare(options.runs, options.out, measure=options.measure)
    console.print(render_console(report.comparison))
    for path in report.files:
        say(str(path))


def _export_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, metavar="RUN", help="a finished run directory")
    parser.add_argument("--to", type=Path, required=True, metavar="DIR", help="the timm folder to write")
    parser.add_argument("--onnx", action="store_true", help="with model.onnx: pixels in [0, 1] to logits, in float32")
    parser.add_argument("--fp16", action="store_true", help="store the weights as float16: half the file")
    parser.add_argument(
        "--head", choices=("fused", "cls", "dist"), default="fused", help="only one of the two heads (default: both)"
    )
    parser.add_argument(
        "--int8", action="store_true", help="with model.int8.onnx too, calibrated and measured on the run's data"
    )
    parser.add_argument(
        "--max-drop", type=float, default=0.5, metavar="POINTS", help="of top-1 that int8 may lose; default: 0.5"
    )
    parser.add_argument(
        "--keep-float",
        action="append",
        default=[],
        metavar="LAYER",
        help="a layer, or all of a part such as blocks.5, that int8 leaves in float32; may be repeated",
    )
    parser.add_argument("--license", default="unknown", metavar="ID", help="for the model card, such as apache-2.0")


def export(options: argparse.Namespace) -> None:
    """Write a run's student as a timm folder, optionally with ONNX, in float16 or with one head."""
    from distill import api
    from distill.console import say

    if options.keep_float and not options.int8:
        raise InputError("--keep-float: without --int8 all layers are in floating point; leave it away, or add --int8.")
    say(
        str(
            api.export(
                options.run,
                options.to,
                onnx=options.onnx,
                half=options.fp16,
                head=options.head,
                license=options.license,
                int8=options.int8,
                max_drop=options.max_drop,
                keep_float=options.keep_float,
            )
        )
    )


def _predict_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, metavar="STUDENT", help="an exported student, or a run directory")
    parser.add_argument(
        "images",
        nargs="+",
        metavar="IMAGE",
        help="image files, folders, patterns such as 'photos/*.jpg', or -: standard input, an image or a path a line",
    )
    parser.add_argument("--top", type=_count, default=5, metavar="N", help="classes of each image; default: 5")
    parser.add_argument("--batch", type=_count, default=64, metavar="N", help="images at a time; default: 64")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--csv", dest="form", action="store_const", const="csv", help="print CSV, a line an image")
    form.add_argument("--json", dest="form", action="store_const", const="json", help="print JSON, an object a line")


def _count(text: str) -> int:
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"1 or more, got {number}")
    return number


def predict(options: argparse.Namespace) -> int:
    """Print the most probable classes of images. An image that cannot be read costs a line, and exit code 2."""
    from distill import api
    from distill.exports.prediction_command import export_folder
    from distill.exports.prediction_command import predict as print_answers

    student = api.load_student(export_folder(options.folder))
    problems = print_answers(student, options.images, form=options.form, top=options.top, batch=options.batch)
    return 2 if problems else 0


def _teachers_arguments(parser: argparse.ArgumentParser) -> None:
    explanation = "a teacher's name, or a recipe (for its teacher), and overrides such as teacher.size=64"
    _target_arguments(parser, "NAME", explanation, number="*")


def teachers(options: argparse.Namespace) -> None:
    """List the known teachers; with NAME, its zoo entry and feature maps."""
    from distill.console import console, say
    from distill.recipe import load, load_teachers_recipe
    from teachers.listing import known_teachers, one_teacher

    if not options.arguments:
        console.print(*known_teachers())
        return
    recipe = load_teachers_recipe(options.target, options.overrides)
    if not recipe.teachers:
        raise InputError(
            f"{options.target}: names no model as its teacher; name one under teacher.model, or ask by name."
        )
    for spec in recipe.teachers:
        if spec.recipe is not None:
            trained = load(spec.recipe)
            say(f"{spec.recipe} trains it: {trained.student.model} at {trained.data.resolution} px")
            changes = {"recipe": None, "model": trained.student.model, "size": spec.size or trained.data.resolution}
            *_, maps = one_teacher(spec.model_copy(update=changes), recipe.data.resolution)
            console.print(maps)  # what else is known is of other weights
        else:
            console.print(*one_teacher(spec, recipe.data.resolution))


def _runs_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", nargs="?", type=Path, default=Path("runs"), metavar="DIR", help="default: runs")
    parser.add_argument("--watch", action="store_true", help="go on, every two seconds, until Ctrl-C")


def runs(options: argparse.Namespace) -> None:
    """List the runs in a folder: state, age, epoch, accuracy, teacher and size."""
    from distill.listing import show_runs

    show_runs(options.folder, watch=options.watch)


def _show_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, metavar="RUN", help="a run directory")


def show(options: argparse.Namespace) -> None:
    """Print what a run has recorded, and how to go on with it."""
    from distill.listing import show_run

    show_run(options.run)


def _recipes_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("names", nargs="*", metavar="NAME", help="a recipe to copy to recipes/NAME.yaml")


def recipes(options: argparse.Namespace) -> None:
    """List the recipes of this package; with NAME, copy it and what it needs to recipes/ in this folder."""
    from distill.console import console, say
    from distill.shipped import copy_recipe, shipped_recipes, table

    if not options.names:
        console.print(table(shipped_recipes()))
        return
    for name in options.names:
        copied = copy_recipe(name, Path())
        for path in copied:
            say(str(path))
        say(f"next: distill train {copied[0]}")


def _bench_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("suite", nargs="?", choices=SUITES, metavar="SUITE", help=f"one of {', '.join(SUITES)}")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    parser.add_argument("--size", choices=("nano", "micro", "tiny", "small"), help="only this student, vit_SIZE")
    parser.add_argument(
        "--json",
        type=Path,
        metavar="FILE",
        help="write the figures to this file, and the table beside it, after every row",
    )
    parser.add_argument("--only", metavar="PATTERN", help="only rows whose name has this in it; * stands for anything")
    parser.add_argument("--repetitions", type=int, default=3, metavar="N", help="rounds of every row; default: 3")
    parser.add_argument("--minutes", type=float, metavar="M", help="begin no other row after so many minutes")


def bench(options: argparse.Namespace) -> None:
    """Measure speed and memory on this machine, as ratios; all suites take some fifteen minutes on two cores."""
    from distill.bench import bench as measure

    measure(
        [options.suite] if options.suite else SUITES,
        device=options.device,
        size=options.size,
        output=options.json,
        repetitions=options.repetitions,
        minutes=options.minutes,
        only=options.only,
    )


def _sweep_arguments(parser: argparse.ArgumentParser) -> None:
    explanation = "a YAML file of a sweep, or with --teachers or --seeds a recipe; and overrides of the recipe"
    _target_arguments(parser, "SWEEP", explanation, options="--out DIR [options]")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where the sweep is, and goes on")
    parser.add_argument(
        "--max-trials", type=_count, default=100, metavar="N", help="refuse a sweep of more runs; default: 100"
    )
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument("--seeds", type=_count, metavar="N", help="the recipe itself, under so many seeds")
    instead.add_argument(
        "--teachers", metavar="A,B,...", help="short pilots of the recipe with each of these teachers: names or recipes"
    )
    parser.add_argument("--minutes", type=float, metavar="M", help="training of each pilot of --teachers; default: 10")


def sweep(options: argparse.Namespace) -> int:
    """Run a recipe under other keys, methods, teachers and seeds, ranked on validation; the best one is tested. The
    same command goes on with a sweep that was stopped or killed."""
    from distill import api
    from distill.errors import RunFailed
    from distill.launching.exit_messages import EXIT_FAILED, EXIT_INTERRUPTED

    teachers = options.teachers and [name.strip() for name in options.teachers.split(",") if name.strip()]
    try:
        api.sweep(
            options.target,
            out=options.out,
            seeds=options.seeds,
            teachers=teachers,
            minutes=options.minutes,
            overrides=options.overrides,
            max_trials=options.max_trials,
            plugins=options.plugin,
        )
    except Interrupted as stopped:
        print(f"interrupted: {stopped}; the same command goes on with {visible(str(options.out))}", file=sys.stderr)
        return EXIT_INTERRUPTED
    except RunFailed as error:
        print(f"failed: {visible(str(error))}", file=sys.stderr)
        return EXIT_FAILED
    return 0


def _no_arguments(parser: argparse.ArgumentParser) -> None:
    pass


SUITES = ("step", "pipeline", "teacher", "attention", "inference", "memory", "augment", "startup", "shared")
"""The most important first: a limit of time cuts the last ones."""

COMMANDS: dict[
    str, tuple[str, Callable[[argparse.ArgumentParser], None], Callable[[argparse.Namespace], int | None]]
] = {
    "init": ("write a recipe for a folder of images", _init_arguments, init),
    "train": ("train the student of a recipe", _train_arguments, train),
    "validate": ("check a recipe and print it resolved", _recipe_arguments, validate),
    "schema": ("print the JSON schema of recipes", _no_arguments, schema),
    "evaluate": ("evaluate a student, or a teacher", _evaluate_arguments, evaluate),
    "compare": ("compare runs in a report", _compare_arguments, compare),
    "export": ("write a run's student as a timm folder", _export_arguments, export),
    "predict": ("classify images with an exported student", _predict_arguments, predict),
    "runs": ("list runs with their state and accuracy", _runs_arguments, runs),
    "show": ("print what a run has recorded", _show_arguments, show),
    "recipes": ("list the recipes of this package, or copy one", _recipes_arguments, recipes),
    "sweep": ("run a recipe under other keys, teachers and seeds", _sweep_arguments, sweep),
    "bench": ("measure speed and memory on this machine", _bench_arguments, bench),
    "teachers": ("list the known teachers, or one's feature maps", _teachers_arguments, teachers),
}

if __name__ == "__main__":
    main()
