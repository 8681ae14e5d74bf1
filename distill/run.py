"""Run directories: paths, lock, `status.json`, `environment.json`, `metrics.jsonl` and `train.log`."""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import re
import socket
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from distill import registry
from distill.console import LogFile
from distill.errors import InputError, Interrupted, RunFailed
from distill.files.durable import clear, describe_failure
from distill.files.metrics import MetricsFile, read_lines
from distill.files.plain_data import MOST_BYTES, parse_json, read_json, read_resolved
from distill.files.records import Environment, Status, check
from distill.files.regular import check_no_links, read_bytes, regular
from distill.files.text import write_text
from distill.recipe import OPERATIONAL_KEYS, Recipe, from_mapping
from distill.recipe.reading import short

RUNS = Path("runs")
MOST_OF_LOCK = 1000
"""Characters of a lock file that are read."""
LOCKED = (errno.EACCES, errno.EAGAIN)
"""Error numbers of a lock that another process holds."""
_held: set[tuple[int, int] | None] = set()
"""Lock files of this process's runs. Do not open them again: closing any descriptor of a file drops its locks."""
_log = logging.getLogger("distill")


class InUse(InputError):
    """Another living process holds the run directory."""


class Run:
    """One run directory. Every process has a `Run`; only the main process writes."""

    def __init__(self, path: Path, *, is_main: bool) -> None:
        self.path = path
        self.is_main = is_main
        self.checkpoints = path / "checkpoints"
        self.export = path / "export"
        self.metrics = MetricsFile(path / "metrics.jsonl")
        self.listeners: list[Callable[[dict[str, Any]], None]] = []
        """Called with each line of `metrics.jsonl`, on the main process."""
        self.predictions = path / "predictions.safetensors"
        self.report = path / "report.html"
        self._lock_path = path / ".lock"
        self._created: list[Path] = []
        self._status: dict[str, Any] = {}
        self.opened = False
        """Whether the run has begun, and is recorded."""
        self._ended = self._recorded_end = False
        self._lock: IO[str] | None = None
        self._log_file: logging.Handler | None = None
        self._failing: set[Path] = set()

    def claim(self) -> None:
        """Create the directory if missing, and lock it: no other run can start there.

        Raises:
            InUse: another process holds it.
            InputError: it cannot be written.
        """
        if not self.is_main:
            return
        missing = [path for path in (self.path, *self.path.parents) if not path.exists()]
        check_no_links(self.checkpoints, self.export, self.path / "control")
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._created = [*([] if self._lock_path.exists() else [self._lock_path]), *missing]
            self._take_lock()
            self._status = read_status(self.path)
        except OSError as error:
            raise _cannot_write(self.path, error) from None

    def open(
        self, recipe: Recipe, *, source: Path | None, environment: dict[str, Any], held_out: Sequence[str] = ()
    ) -> None:
        """Write recipe, environment and status to the claimed directory; removes leftovers of an earlier run.

        `held_out`: the images that `data.test` held out.

        Raises:
            InputError: the directory cannot be written.
        """
        if not self.is_main:
            return
        try:
            check_no_links(self.path / recipe.name)  # the folder of its TensorBoard
            self.checkpoints.mkdir(exist_ok=True)
            for leftover in (*self.path.glob(".*.tmp"), *self.path.glob(".export-*"), *self.checkpoints.glob(".*.tmp")):
                clear(leftover)  # of a process that was killed while it wrote
            self.metrics.repair()
            self.opened = True
            self.status("running")
            given = recipe.to_yaml() if source is None else source.read_text(encoding="utf-8")
            write_text(self.path / "recipe.yaml", given)
            write_text(self.path / "resolved.yaml", recipe.to_yaml())
            write_text(self.path / "environment.json", json.dumps(environment, indent=1))
            if held_out:
                write_text(self.path / "test_split.txt", "\n".join([*held_out, ""]))
            self._log_file = LogFile(self.path / "train.log")
        except OSError as error:
            raise _cannot_write(self.path, error) from None
        self._log_file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        _log.addHandler(self._log_file)

    def end(self, error: BaseException) -> bool:
        """Record in `status.json` that `error` ended the run; returns whether this process did so.

        That is the main process, or, if it died, the first other process to take its lock. Every process adds the stack
        trace of an unexpected error to the log. After an InputError before `open`, the directory is removed.
        """
        if self._ended:
            return self._recorded_end
        self._ended = True
        expected = isinstance(error, InputError | RunFailed | Interrupted)
        try:
            if isinstance(error, InputError) and not self.opened:
                self._remove_created()
                return self.is_main
            if not expected:
                with open(self.path / "train.log", "a", encoding="utf-8", opener=regular) as file:
                    file.write("".join(traceback.format_exception(error)))
            self._recorded_end = self.is_main or self._take_over()
            if not self._recorded_end or (self._status.get("state") == "finished" and self.opened):
                return self._recorded_end
            state = "interrupted" if isinstance(error, Interrupted) else "failed"
            self.status(state, reason=str(error) if expected else f"{type(error).__name__}: {error}")
        except (OSError, InputError) as problem:
            _log.error("%s: cannot record how the run ended: %s", self.path, problem)
        return self._recorded_end

    def _take_over(self) -> bool:
        """Become the writing process if the main one died during the run; returns whether it did."""
        if state_of(self.path) != "killed":
            return False
        try:
            self._take_lock()
        except InUse:
            return False  # another process took over
        self._status = read_status(self.path)
        self.is_main = self._status.get("state") == "running"
        return self.is_main

    def _remove_created(self) -> None:
        """Remove what `claim` created."""
        if self.is_main:
            with suppress(OSError):  # not empty any more
                for path in self._created:
                    path.rmdir() if path != self._lock_path else path.unlink()

    def close(self) -> None:
        """Release the lock and the log."""
        if self._log_file is not None:
            _log.removeHandler(self._log_file)
            with suppress(OSError):  # the disk may be full
                self._log_file.close()
        if self._lock is not None:
            _held.discard(_identity(self._lock_path))
            self._lock.close()

    def _take_lock(self) -> None:
        # The kernel releases the lock when its holder dies: there are no stale locks. A record lock, not flock, which
        # forked workers would keep.
        while True:
            if _identity(self._lock_path) in _held:
                check_free(self.path)
            lock = open(self._lock_path, "a", opener=regular)  # noqa: SIM115 (held until the end of the run)
            try:
                fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                lock.close()
                if error.errno not in LOCKED:
                    raise
                check_free(self.path)
                continue  # the holder has just ended
            if _is_same_file(lock, self._lock_path):
                break
            lock.close()  # its last holder removed it
        self._lock = lock
        _held.add(_identity(self._lock_path))
        lock.truncate(0)
        lock.write(f"process {os.getpid()} on {socket.gethostname()}")
        lock.flush()

    def status(self, state: str | None = None, **values: Any) -> None:
        """Merge `values` into `status.json`, atomically; `state` is running, finished, trained, interrupted or
        failed.

        Raises:
            RunFailed: `finished`, or the metrics before it, cannot be written. Other failures are warnings.
        """
        if not self.is_main:
            return
        self._status.update(values)
        if state is not None:
            self._status["state"] = state
            self._status["reason"] = values.get("reason")
        self._status["updated"] = time.strftime("%Y-%m-%dT%H:%M:%S%z")
        text = json.dumps(self._status, indent=1)
        needed = len(text) if state == "finished" else None
        if needed is not None:
            self._write(self.metrics.path, self.metrics.sync, needed=needed)
        status = self.path / "status.json"
        self._write(status, lambda: write_text(status, text), needed=needed)

    def log(self, event: str, *, step: int, epoch: float, **values: Any) -> None:
        """Append one line to `metrics.jsonl`; kept in memory while the disk is full."""
        if self.is_main:
            line = {"event": event, "step": step, "epoch": round(epoch, 4), "time": round(time.time(), 3), **values}
            self._write(self.metrics.path, lambda: self.metrics.append(line))
            for listener in self.listeners:
                listener(line)

    def metrics_size(self) -> int:
        """Size of `metrics.jsonl` in bytes, flushed to disk; stored in checkpoints."""
        self._write(self.metrics.path, self.metrics.sync)
        return self.metrics.size

    def cut_metrics(self, size: int) -> None:
        """Truncate `metrics.jsonl` to the size stored in a checkpoint."""
        if self.is_main:
            self.metrics.cut(size)

    def _write(self, path: Path, action: Callable[[], None], *, needed: int | None = None) -> None:
        """Write to `path`; failures in a row give one warning, or end the run if `needed` (bytes) is set."""
        try:
            action()
            self._failing.discard(path)
        except OSError as error:
            if needed is not None:
                raise RunFailed(describe_failure(path, error, needed)) from None
            if path not in self._failing:
                self._failing.add(path)
                _log.warning("%s: cannot be written: %s. The run continues and will retry.", path, error.strerror)


def read_environment(path: Path) -> dict[str, Any]:
    """What is known of `environment.json` of the run directory at `path`; empty if missing or unreadable."""
    file = path / "environment.json"
    try:
        return check(Environment, read_json(file) or {}, str(file)).model_dump(exclude_unset=True)
    except InputError:
        return {}


def read_status(path: Path) -> dict[str, Any]:
    """`status.json` of the run directory at `path`; empty if missing.

    Raises:
        InputError: it is unreadable, or its values are not what belongs there.
    """
    file = path / "status.json"
    text = read_bytes(file, MOST_BYTES)
    try:
        status = {} if text is None else parse_json(text, str(file))
        check(Status, status, str(file))
        return status
    except InputError as error:
        raise InputError(f'{error} Write {{"state": "interrupted"}} there to resume from its checkpoints.') from None


def is_finished(path: Path) -> bool:
    """Whether there is a finished run at `path`."""
    return read_status(path).get("state") == "finished"


def read_metrics(path: Path, event: str) -> Iterator[dict[str, Any]]:
    """The lines of one kind in the `metrics.jsonl` of the run directory at `path`, in order."""
    return (line for line in read_lines(path / "metrics.jsonl") if line["event"] == event)


def read_recipe(path: Path) -> Recipe:
    """The resolved recipe of the run directory at `path`.

    Raises:
        InputError: there is none: `path` is no run directory.
    """
    file = path / "resolved.yaml"
    raw = read_resolved(path)
    if raw is None:
        raise InputError(f"{path}: not a run directory (it has no resolved.yaml).")
    registry.check_available(read_environment(path).get("variants", {}), str(path))
    return from_mapping(raw, source=str(file))


def check_free(path: Path) -> None:
    """Raise InUse if a living process holds the run directory."""
    if holder := holder_of(path):
        raise InUse(f"{path}: in use by {holder}. Wait for it or choose another --out.")


def holder_of(path: Path) -> str | None:
    """Which living process holds the lock of the run directory; None: none."""
    try:
        if _identity(path / ".lock") in _held:
            return f"this process, {os.getpid()}"
        with open(path / ".lock", opener=regular, errors="replace") as file:
            try:
                fcntl.lockf(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except OSError as error:
                return short(file.read(MOST_OF_LOCK)) or "another process" if error.errno in LOCKED else None
    except OSError:
        pass
    return None


def state_of(path: Path) -> str | None:
    """The actual state of the run at `path`: 'killed' if it is recorded as running but no process holds it."""
    state = read_status(path).get("state")
    return "killed" if state == "running" and holder_of(path) is None else state


def check_new(path: Path) -> None:
    """Raise InputError if there is a run, or anything else, at `path`."""
    check_free(path)
    if (state := state_of(path)) is not None:
        advice = "Choose" if state == "finished" else "Continue it with --resume auto, or choose"
        raise InputError(f"{path}: there is a run already, and it is {state}. {advice} another --out.")
    # Left by a run that was killed before its first status.
    leftovers = {path / ".lock", path / "checkpoints", *path.glob(".*.tmp")}
    if any((path / "checkpoints").glob("step_*")):
        leftovers = set()
    if path.exists() and (not path.is_dir() or any(child not in leftovers for child in path.iterdir())):
        raise InputError(f"{path}: exists and is no run directory. Choose another --out.")


def _identity(path: Path) -> tuple[int, int] | None:
    """Device and inode of a file; None if it does not exist."""
    with suppress(OSError):
        status = path.stat()
        return status.st_dev, status.st_ino
    return None


def _is_same_file(file: IO[str], path: Path) -> bool:
    try:
        return os.fstat(file.fileno()).st_ino == path.stat().st_ino
    except FileNotFoundError:
        return False


def _cannot_write(path: Path, error: OSError) -> InputError:
    reason = error.strerror or error
    return InputError(
        f"{path}: cannot write the run directory: {reason}. Make it writable, with room, or choose another --out."
    )


def check_resumable(path: Path, recipe: Recipe) -> None:
    """Raise InputError if the run at `path` is in use, finished, or of a recipe that has changed."""
    check_free(path)
    if is_finished(path):
        raise InputError(f"{path}: this run is finished; there is nothing to resume. Choose another --out.")
    if not (path / "resolved.yaml").exists():
        return  # killed before it wrote its recipe
    before, after = read_recipe(path).flat(), recipe.flat()
    changes = [
        f"  {key}: {before.get(key, '(absent)')!r} -> {after.get(key, '(absent)')!r}"
        for key in dict.fromkeys([*before, *after])
        if before.get(key) != after.get(key) and key not in OPERATIONAL_KEYS
    ]
    if changes:
        listing = "\n".join(changes)
        raise InputError(
            f"{path}: the recipe has changed since this run began:\n{listing}\n"
            f"Resume with the recipe as it was ({path}/resolved.yaml), or start a new run with another --out."
        )


def newest_unfinished(recipe: Recipe) -> Path | None:
    """The newest unfinished run directory under `runs/` with this recipe's name."""
    named = re.compile(re.escape(recipe.name) + r"-\d{8}-\d{6}")
    candidates = [
        path
        for path in RUNS.glob(f"{recipe.name}-*")
        if named.fullmatch(path.name) and read_status(path).get("state", "finished") != "finished"
    ]
    return max(candidates, key=lambda path: path.name, default=None)


def new_path(recipe: Recipe) -> Path:
    """A new path `runs/<name>-<time>`."""
    while (path := RUNS / f"{recipe.name}-{time.strftime('%Y%m%d-%H%M%S')}").exists():
        time.sleep(0.1)  # another run of this name started in this second
    return path
