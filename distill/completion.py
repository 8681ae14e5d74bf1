"""Completion of command lines by argcomplete: commands, options, keys and values of recipes, runs. Imports no torch."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, NoReturn

from argcomplete.finders import CompletionFinder

RUNS = "runs"
RUN, STUDENT = ("status.json",), ("status.json", "config.json")
"""Files by which a folder is a run, or the student of a run or an export."""
YAML = (".yaml", ".yml")
Completer = Callable[..., Iterable[str]]


def finder(commands: Mapping[str, str], add_arguments: Callable[[argparse.ArgumentParser, str], None]) -> Finder:
    """What completes the command line.

    Args:
        commands: name and summary of each.
        add_arguments: adds those of a command of this name to a parser.
    """
    parser = argparse.ArgumentParser(prog="distill")
    own = parser.add_subparsers(metavar="COMMAND")
    for name, summary in commands.items():
        command = own.add_parser(name, help=summary)
        add_arguments(command, name)
        for action in command._actions:
            if (completer := _completer(name, action)) is not None:
                action.completer = completer  # type: ignore[attr-defined]
    return Finder(parser, always_complete_options=False)


class Finder(CompletionFinder):
    """As argcomplete's, but recipes and overrides may come after options, too."""

    def answer(self) -> NoReturn:
        """Answer the question that the shell asks in the environment, and end the process."""
        assert self._parser is not None
        self(self._parser, always_complete_options=False)
        raise AssertionError("argcomplete ends the process")

    def collect_completions(
        self, active_parsers: list[argparse.ArgumentParser], parsed_args: argparse.Namespace, cword_prefix: str
    ) -> list[str]:
        found: list[str] = super().collect_completions(active_parsers, parsed_args, cword_prefix)
        parser = active_parsers[-1]
        words = next((action for action in parser._actions if action.dest == "arguments"), None)
        if words is not None and not parser.active_actions and not cword_prefix.startswith("-"):  # type: ignore[attr-defined]
            offered = words.completer(prefix=cword_prefix, parsed_args=parsed_args)  # type: ignore[attr-defined]
            found += [word for word in offered if word.startswith(cword_prefix)]
        return found


def _completer(command: str, action: argparse.Action) -> Completer | None:
    """Of an argument; None: its choices, or files."""
    match command, action.dest:
        case ("train" | "validate" | "sweep", "arguments"):
            return partial(_words, targets=partial(_paths, suffixes=YAML))
        case "evaluate", "arguments":
            return partial(_words, targets=_evaluated, following=_paths)
        case "teachers", "arguments":
            return partial(_words, targets=lambda prefix: [*_paths(prefix, suffixes=YAML), *_teachers(prefix)])
        case ("show" | "compare" | "export", "run" | "runs"):
            return lambda prefix, **_: _students(prefix, RUN)
        case "predict", "folder":
            return lambda prefix, **_: _students(prefix)
        case "train", "resume":
            return lambda prefix, **_: ["auto", *_students(prefix, RUN)]
        case "recipes", "names":
            return lambda **_: _recipes()
        case _, "teachers":
            return lambda prefix, **_: _list(prefix, _teachers)
    return None


def _words(
    prefix: str,
    parsed_args: argparse.Namespace,
    targets: Callable[[str], Iterable[str]],
    following: Callable[[str], Iterable[str]] | None = None,
    **_: Any,
) -> Iterator[str]:
    """Targets until one is given, then perhaps what follows it, and keys of a recipe; behind a key's '=' its values."""
    key, equals, value = prefix.partition("=")
    if equals:
        yield from (f"{key}={found}" for found in _values(key, value))
        return
    given = [word for word in getattr(parsed_args, "arguments", None) or () if "=" not in word]
    offered = dict(enumerate([targets, following])).get(len(given))
    found = [path for path in offered(prefix) if path.startswith(prefix)] if offered else []
    keys = [*_keys(prefix)] if prefix or given else []
    # A shell adds a space after a single word: offer what is behind its dot.
    while not found and len(keys) == 1 and keys[0].endswith("."):
        keys = [*_keys(keys[0])]
    yield from (*found, *keys)


def _keys(prefix: str) -> Iterator[str]:
    """Keys, and sections with a dot, that begin with `prefix`: one level of sections at a time."""
    from distill.recipe.keys import recipe_keys

    *before, last = prefix.split(".")
    plain, typed = _plain(before), "".join(f"{part}." for part in before)
    offered: dict[str, None] = {}
    for path, _, is_value in recipe_keys():
        if path[: len(plain)] == plain and len(path) > len(plain) and (name := path[len(plain)]).startswith(last):
            if len(path) > len(plain) + 1:
                offered[f"{typed}{name}."] = None
            elif is_value:
                offered[f"{typed}{name}="] = None
    yield from offered


def _plain(path: Iterable[str]) -> tuple[str, ...]:
    """The path of a key, as `recipe_keys` has it."""
    return tuple("0" if part.isdigit() else part for part in path)


def _values(key: str, prefix: str) -> Iterable[str]:
    from distill.recipe.keys import recipe_keys

    *_, last = key.split(".")
    match key:
        case "data.name":
            from distill.recipe import reader_names

            return [*reader_names(), *_paths(prefix, suffixes=(".csv", ".safetensors"))]
        case "student.model":
            from distill.recipe.installed import own_students, timm_models

            return [*own_students(), *(timm_models() if prefix else ())]
        case "teacher.model":
            from distill.recipe.installed import timm_models

            return [*_teachers(prefix), *(timm_models() if prefix else ())]
        case "optim.name":
            from distill.recipe.installed import optimizers

            return sorted(optimizers())
    if last in ("root", "cache", "weights", "unlabelled", "recipe", "base"):
        return _paths(prefix, suffixes=YAML if last in ("recipe", "base") else None)
    return next((found.values for found in recipe_keys() if found.path == _plain(key.split("."))), ())


def _list(prefix: str, of: Callable[[str], Iterable[str]]) -> list[str]:
    """The last of names with commas between them."""
    before, comma, last = prefix.rpartition(",")
    return [f"{before}{comma}{name}" for name in of(last)]


def _evaluated(prefix: str) -> list[str]:
    return [*_students(prefix, suffixes=YAML), *_teachers(prefix)]


def _teachers(prefix: str) -> list[str]:
    from teachers.zoo import RECOMMENDED, ZOO

    return [*ZOO, *RECOMMENDED]


def _recipes() -> Iterable[str]:
    from distill.shipped import shipped_recipes

    return shipped_recipes()


def _students(prefix: str, holding: Sequence[str] = STUDENT, suffixes: tuple[str, ...] = ()) -> list[str]:
    """Folders with one of these files, those under `runs` first, folders on the way, and files of these suffixes."""
    under = [*_paths(f"{RUNS}/", holding=holding)] if f"{RUNS}/".startswith(prefix) else []
    here = _paths(prefix, holding=holding, suffixes=suffixes)
    return under if under and not prefix else [*under, *here]


def _paths(prefix: str, *, suffixes: tuple[str, ...] | None = (), holding: Sequence[str] = ()) -> Iterator[str]:
    """Folders and files beside what is typed.

    Args:
        suffixes: of the files; None: all of them.
        holding: files of which one marks a folder as what is looked for; others end in a slash, to go on.
    """
    folder, name = os.path.split(prefix)
    with suppress(OSError):
        for entry in sorted(os.scandir(folder or "."), key=lambda entry: entry.name):
            path = os.path.join(folder, entry.name)
            if entry.name.startswith(".") and not name.startswith("."):
                continue
            if entry.is_dir():
                found = any(os.path.exists(os.path.join(path, file)) for file in holding)
                yield path if found else f"{path}/"
            elif suffixes is None or path.endswith(suffixes):
                yield path
