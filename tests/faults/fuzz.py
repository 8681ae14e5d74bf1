"""Seeded changes of exports, runs, checkpoints and packed files, and a watch over what reading them does."""

from __future__ import annotations

import copy
import json
import os
import random
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file, safe_open

from distill.files.checksum import CHECKSUM
from distill.files.digests import file_digest, state_digest
from distill.files.tensors import write_tensors
from distill.students.saved import CONFIG_DIGEST, WEIGHTS_DIGEST
from tests.faults.damage import damage
from tests.faults.hostile import as_bytes, deep

STARTS = ("subprocess.Popen", "os.system", "os.posix_spawn", "os.exec", "os.fork", "os.forkpty", "pty.spawn",
          "socket.connect", "webbrowser.open", "urllib.Request")  # fmt: skip
"""Audit events of a process that is started, or of a connection."""
CHANGES = {"os.remove": 1, "os.rmdir": 1, "os.rename": 2, "os.truncate": 1, "os.chmod": 1, "os.chown": 1, "os.mkdir": 1,
           "os.link": 2, "os.symlink": 2, "shutil.rmtree": 1, "shutil.move": 2}  # fmt: skip
"""Audit events of changes, and how many of their arguments are paths that change."""


class Watch:
    """An audit hook, which stays for the life of the process; it records within `over` only.

    The events tell what is attempted: whether a link was followed, the content of its target tells.
    """

    def __init__(self) -> None:
        self.seen: list[str] = []
        self._allowed: Path | None = None
        sys.addaudithook(self._hook)

    @contextmanager
    def over(self, folder: Path) -> Iterator[None]:
        """Within, record processes and connections, and changes of files outside `folder`."""
        self._allowed = folder.resolve()
        try:
            yield
        finally:
            self._allowed = None

    def _hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self._allowed is None:
            return
        if event in STARTS:
            self.seen.append(f"{event} {arguments!r}"[:300])
        elif event == "open":
            path, _, flags = arguments
            writes = flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC) if isinstance(flags, int) else 0
            if writes and isinstance(path, str | bytes | Path):
                self._changed(event, path)
        elif event in CHANGES:
            for path in arguments[: CHANGES[event]]:
                if isinstance(path, str | bytes | Path):
                    self._changed(event, path)

    def _changed(self, event: str, path: str | bytes | Path) -> None:
        allowed, self._allowed = self._allowed, None  # realpath may raise audit events of its own
        folder, name = os.path.split(os.path.abspath(os.fsdecode(path)))
        where = os.path.join(os.path.realpath(folder), name)
        if not where.startswith(f"{allowed}{os.sep}") and "__pycache__" not in where and where != os.devnull:
            self.seen.append(f"{event} {where}")
        self._allowed = allowed


VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 7, 3.5, -0.5, 1e308, -1e308, 10**9, 10**15, 2**63 - 1, -(2**63), 10**400,
    float("nan"), float("inf"), float("-inf"), "", "0", "a", "x" * 20_000, "\x00", "\u202e", "\ud800", "<b>", "[red]",
    "../../outside", "/outside", "pipe:touch outside", "http://127.0.0.1:9/", "local-dir:/", "hf-hub:a/b", "finished",
    "running", "nearest", "python", [], {}, [[]], [None], [1], ["a"], ["a", "a"], [1e400], {"a": 1}, {"": {}},
)  # fmt: skip
SHAPES = ((), (0,), (1,), (40,), (4, 0), (0, 4), (40, 10), (40, 1), (1, 3, 8, 8), (2, 2), (1, 1, 1, 1, 1))
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.uint8,
          torch.bool)  # fmt: skip


def change_value(content: Any, chance: random.Random) -> Any:
    """A copy of plain data with one value changed, moved, copied or removed, or a key renamed."""
    content = copy.deepcopy(content)
    places: list[tuple[Any, Any]] = []
    waiting = [content]
    while waiting:
        value = waiting.pop()
        keys = list(value) if isinstance(value, dict) else list(range(len(value)))
        places += [(value, key) for key in keys]
        waiting += [value[key] for key in keys if isinstance(value[key], dict | list)]
    if not places or chance.random() < 0.03:
        return chance.choice(VALUES)
    within, key = chance.choice(places)
    how = chance.choice(["value", "value", "value", "remove", "remove", "other", "rename", "scale"])
    if how == "remove":
        del within[key]
    elif how == "other":
        source, other = chance.choice(places)
        if other in source if isinstance(source, dict) else other < len(source):
            within[key] = copy.deepcopy(source[other])
    elif how == "rename" and isinstance(within, dict):
        within[str(chance.choice(VALUES))[:50]] = within.pop(key)
    elif how == "scale" and isinstance(within[key], int | float):
        within[key] = within[key] * chance.choice([-1, 0, 2, 10, 1000, 10**6])
    else:
        within[key] = copy.deepcopy(chance.choice(VALUES))
    return content


def change_json(path: Path, chance: random.Random) -> str:
    """Change a JSON file as such, or its text."""
    text = path.read_text()
    how = chance.choice(["value"] * 8 + ["values", "twice", "deep", "text"])
    if how in ("value", "values"):
        content = json.loads(text)
        for _ in range(1 if how == "value" else 4):
            content = change_value(content, chance)
        text = json.dumps(content)
    elif how == "twice":
        text = text.rstrip().removesuffix("}") + ', "state": 1, "state": 2}'
    elif how == "deep":
        at = text.rfind(":")
        text = text[: at + 1] + deep(chance.choice(["list", "object"]), chance.choice([60, 2000, 50_000])) + "}"
    else:
        at = chance.randrange(len(text) + 1)
        text = text[:at] + chance.choice(["\ud800", "9" * 400, "NaN", "{", '"', "\x00", "//", "1e999"]) + text[at:]
    path.write_bytes(as_bytes(text))
    return f"{path.name}: {how}"


def change_yaml(path: Path, chance: random.Random) -> str:
    """Change a YAML file as such."""
    content = change_value(yaml.safe_load(path.read_text()), chance)
    path.write_bytes(as_bytes(yaml.safe_dump(content)))
    return f"{path.name}: value"


def change_lines(path: Path, chance: random.Random) -> str:
    """Change a line of a file of JSON lines."""
    lines = path.read_text().splitlines()
    at = chance.randrange(len(lines))
    lines[at] = json.dumps(change_value(json.loads(lines[at]), chance))
    path.write_bytes(as_bytes("\n".join(lines) + "\n"))
    return f"{path.name}: line {at}"


def change_tensors(path: Path, chance: random.Random) -> str:
    """Change a tensor or the metadata of a .safetensors file, and write it with a checksum that fits."""
    with safe_open(path, framework="pt") as file:
        metadata = dict(file.metadata() or {})
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    name = chance.choice(sorted(tensors))
    how = chance.choice(["shape", "shape", "dtype", "values", "values", "remove", "add", "metadata", "swap"])
    if how == "shape":
        tensors[name] = torch.zeros(chance.choice(SHAPES)).to(tensors[name].dtype)
    elif how == "dtype":
        tensors[name] = tensors[name].to(chance.choice(DTYPES))
    elif how == "values":
        value = chance.choice([float("nan"), float("inf"), -1, 0, 255, 10**6, 3e38])
        flat = tensors[name].reshape(-1)
        if len(flat) and (tensors[name].is_floating_point() or abs(value) < 2**31):
            limit = torch.iinfo(flat.dtype) if not flat.is_floating_point() and flat.dtype != torch.bool else None
            flat[chance.randrange(len(flat))] = value if limit is None else min(max(int(value), limit.min), limit.max)
    elif how == "remove":
        del tensors[name]
    elif how == "add":
        tensors[chance.choice(["../../x", "a" * 1000, "", "teacher", "validation.teacher"])] = tensors[name].clone()
    elif how == "swap":
        other = chance.choice(sorted(tensors))
        tensors[name], tensors[other] = tensors[other], tensors[name]
    elif metadata:
        key = chance.choice(sorted(metadata))
        metadata[key] = str(chance.choice(VALUES)).encode("utf-8", "replace").decode()
    write_tensors(path, tensors, metadata | ({CHECKSUM: ""} if CHECKSUM in metadata else {}))
    return f"{path.name}: {how} of {name}"


def replace(path: Path, chance: random.Random, outside: Path) -> str:
    """Put something else in the place of a file."""
    how = chance.choice(["folder", "pipe", "link", "link", "hard link", "loop", "device", "missing"])
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()
    match how:
        case "folder":
            path.mkdir()
        case "pipe":
            os.mkfifo(path)
        case "link":
            path.symlink_to(outside)
        case "hard link":
            os.link(outside, path)
        case "loop":
            path.symlink_to(path.name)
        case "device":
            path.symlink_to("/dev/zero")
    return f"{path.name}: {how}"


def mutate(folder: Path, chance: random.Random, outside: Path) -> tuple[str, bool]:
    """Change one file under `folder`, or two; returns what was done, and whether checksums were made to fit."""
    told, sealed = [], False
    for _ in range(chance.choice([1, 1, 1, 2])):
        files = sorted(path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
        files = [path for path in files if path.stat().st_nlink == 1]  # a change would go through a hard link
        if not files:
            break
        path = chance.choice(files)
        if chance.random() < 0.1:
            told.append(replace(path, chance, outside))
            continue
        kinds = {".json": change_json, ".jsonl": change_lines, ".yaml": change_yaml, ".safetensors": change_tensors}
        change = kinds.get(path.suffix)
        try:
            if change is None or chance.random() < 0.2:
                told.append(damage(path, chance) if path.stat().st_size else "nothing")
            else:
                told.append(change(path, chance))
                sealed |= change is change_tensors
        except (ValueError, LookupError, TypeError, RuntimeError, SafetensorError, yaml.YAMLError, RecursionError):
            told.append("nothing")  # it had been changed before into what cannot be changed as such
        if chance.random() < 0.8:
            _seal(path.parent)
            sealed = True
    return "; ".join(told), sealed


def _seal(folder: Path) -> None:
    """Make digests fit: those of an export, and those of a checkpoint."""
    config, weights, manifest = folder / "config.json", folder / "model.safetensors", folder / "manifest.json"
    try:
        if config.is_file() and weights.is_file() and not weights.is_symlink():
            with safe_open(weights, framework="pt") as file:
                metadata = dict(file.metadata() or {})
            tensors = {name: tensor.clone() for name, tensor in load_file(weights).items()}
            digests = {WEIGHTS_DIGEST: state_digest(tensors), CONFIG_DIGEST: file_digest(config)}
            write_tensors(weights, tensors, metadata | digests | {CHECKSUM: ""})
        if manifest.is_file() and not manifest.is_symlink():
            names = sorted(path for path in folder.iterdir() if path != manifest and path.is_file())
            digests = {path.name: file_digest(path) for path in names if not os.path.islink(path)}
            manifest.write_text(json.dumps(digests, indent=1, sort_keys=True))
    except (OSError, SafetensorError, RuntimeError, ValueError):
        pass  # no such file any more
