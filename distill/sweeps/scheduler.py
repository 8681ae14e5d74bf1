"""Runs the trials of a sweep, then finishes the chosen ones; survives kills of itself and of its trials."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distill import run
from distill.console import say
from distill.errors import Interrupted, RunFailed
from distill.launching.exit_messages import EXIT_BAD_INPUT, EXIT_INTERRUPTED
from distill.sweeps.jobs import Elsewhere, Executor, Job, training_command
from distill.sweeps.progress import Progress
from distill.sweeps.schema import Sweep
from distill.sweeps.study import Study, Trial

POLL = 0.2
"""Seconds."""
GRACE = 60.0
"""Seconds that trials have to save their checkpoints when the sweep is stopped."""
RETRIES = 1
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@dataclass
class Running:
    trial: Trial
    job: Job
    step: int
    """When it was started."""
    stopped: bool = False


class Scheduler:
    """One sweep's trials under `folder`."""

    def __init__(self, sweep: Sweep, study: Study, executor: Executor, folder: Path, recipe: Path) -> None:
        self.sweep, self.study, self.executor, self.folder, self.recipe = sweep, study, executor, folder, recipe
        self.running: dict[int, Running] = {}
        self._signal: str | None = None
        self._sizes: dict[int, int] = {}

    def path(self, trial: Trial) -> Path:
        return self.folder / "trials" / trial.name

    def log(self, trial: Trial) -> Path:
        return self.folder / "logs" / f"{trial.name}.log"

    def progress(self, trial: Trial) -> Progress:
        return Progress.of(self.path(trial))

    def command(self, trial: Trial, *, tested: bool) -> list[str]:
        """As a user would start it."""
        options = self.sweep.options
        given = [*self.sweep.overrides(trial.values, trial.seed), f"train.test={str(tested).lower()}"]
        if self.executor.threads is not None and self.sweep.resolved.train.threads is None:
            given.append(f"train.threads={self.executor.threads}")
        if self.executor.workers is not None and self.sweep.resolved.data.workers is None:
            given.append(f"data.workers={self.executor.workers}")
        plugins = [word for plugin in self.sweep.plugins for word in ("--plugin", plugin)]
        out = ["--out", str(self.path(trial)), "--resume", "auto"]
        return [*training_command(options.command), str(self.recipe), *given, *plugins, *out]

    def search(self) -> None:
        """Run all trials, without their tests.

        Raises:
            Interrupted: by a signal; all trials are stopped, resumable.
        """
        self.study.plan()
        self._loop(self._waiting(), self._watch, tested=False)

    def finish(self, trials: Sequence[Trial]) -> None:
        """Test these trials, and train and test their controls.

        Raises:
            Interrupted: as above.
            RunFailed: one of them failed twice.
        """
        left = [trial for trial in trials if not run.is_finished(self.path(trial))]
        failures = dict.fromkeys((trial.number for trial in left), 0)

        def watch(one: Running) -> bool:
            if (code := one.job.poll()) is None:
                return True
            if run.is_finished(self.path(one.trial)):
                say(f"{one.trial.name}: tested")
                return False
            if not isinstance(one.job, Elsewhere) and code != EXIT_INTERRUPTED:
                failures[one.trial.number] += 1
            if failures[one.trial.number] > RETRIES or code == EXIT_BAD_INPUT:
                raise RunFailed(f"{one.trial.name}: its test failed with exit code {code}; see {self.log(one.trial)}")
            self._launch(one.trial, tested=True)
            return True

        self._loop(iter(left), watch, tested=True)

    def _waiting(self) -> Iterator[Trial]:
        """Trials to start: first those that a killed sweep had begun."""
        begun = self.study.running()
        for trial in begun:
            if not self._is_over(trial):
                yield trial
        while (new := self.study.next()) is not None:
            yield new

    def _is_over(self, trial: Trial) -> bool:
        """Whether an earlier sweep was killed between the end of this trial and its record; records it."""
        progress = self.progress(trial)
        return progress.trained and self._complete(trial, progress)

    def _loop(self, waiting: Iterator[Trial], watch: Callable[[Running], bool], *, tested: bool) -> None:
        left = True
        try:
            while (left or self.running) and self._signal is None:
                while left and len(self.running) < self.executor.parallel and self._signal is None:
                    if (trial := next(waiting, None)) is None:
                        left = False
                    else:
                        self._launch(trial, tested=tested)
                time.sleep(POLL)
                for number, one in list(self.running.items()):
                    if not watch(one):
                        del self.running[number]
        finally:
            self._stop_all()
        if self._signal is not None:
            raise Interrupted(self._signal)

    def _launch(self, trial: Trial, *, tested: bool) -> None:
        path = self.path(trial)
        job: Job = Elsewhere(path)
        if not run.holder_of(path):
            if trial.number not in self.running:
                say(f"{time.strftime('%H:%M:%S')} {trial.name}: {'goes on' if path.exists() else 'begins'}")
            job = self.executor.start(self.command(trial, tested=tested), path, self.log(trial))
        self.running[trial.number] = Running(trial, job, self.progress(trial).step)

    def _watch(self, one: Running) -> bool:
        """Look at a trial; returns whether it goes on."""
        trial, code = one.trial, one.job.poll()
        if one.stopped:  # its end is recorded already
            return code is None
        if code is None:
            if self._has_news(trial):
                self._judge(one)
            return True
        if run.holder_of(self.path(trial)):  # by another process, or its launcher ended first
            one.job = Elsewhere(self.path(trial))
            return True
        progress = self.progress(trial)
        if progress.trained:
            return not self._complete(trial, progress)
        if isinstance(one.job, Elsewhere) or (code == EXIT_INTERRUPTED and progress.step > one.step):
            self._launch(trial, tested=False)
            return True
        return self._failed(one, code, progress)

    def _has_news(self, trial: Trial) -> bool:
        """Whether a running trial has written lines since it was last looked at, or may be over its time."""
        if self.sweep.options.minutes is not None:
            return True
        try:
            size = (self.path(trial) / "metrics.jsonl").stat().st_size
        except OSError:
            return False
        known, self._sizes[trial.number] = self._sizes.get(trial.number), size
        return size != known

    def _judge(self, one: Running) -> None:
        """Stop a running trial that cannot be ranked, falls behind, or has had its time."""
        progress, minutes = self.progress(one.trial), self.sweep.options.minutes
        if progress.samples == 0:
            self._end(one, "fail", None, "no validation images to rank it on; set data.validation")
        elif minutes is not None and progress.training_minutes() >= minutes and not progress.trained:
            if progress.value is None:
                self._end(one, "fail", None, f"no evaluation within {minutes:g} minutes; give more")
            else:
                self._end(one, "complete", progress.value, f"after {minutes:g} minutes")
        elif self.sweep.options.stop is not None and self.study.report(one.trial, progress.rungs()):
            self._end(one, "pruned", progress.value, f"stopped early, after epoch {progress.epoch:.4g}")

    def _end(self, one: Running, state: str, value: float | None, note: str) -> None:
        self.study.end(one.trial, state, value, note)
        one.stopped = True
        one.job.stop()
        say(f"{time.strftime('%H:%M:%S')} {one.trial.name}: {note}")

    def _complete(self, trial: Trial, progress: Progress) -> bool:
        value = progress.value
        if value is None:
            self.study.end(trial, "fail", note="no validation images to rank it on; set data.validation")
            return True
        if self.sweep.options.stop is not None:
            self.study.report(trial, progress.rungs())
        self.study.end(trial, "complete", value)
        say(f"{time.strftime('%H:%M:%S')} {trial.name}: {progress.metric} {value:.2f} % on validation")
        return True

    def _failed(self, one: Running, code: int, progress: Progress) -> bool:
        """Try a trial whose process died once more; returns whether it goes on."""
        trial, failures = one.trial, self.study.trial(one.trial.number).failures + 1
        self.study.note(trial, failures=failures)
        died = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        if failures <= RETRIES and code != EXIT_BAD_INPUT:
            say(f"{time.strftime('%H:%M:%S')} {trial.name}: {died}; once more")
            self._launch(trial, tested=False)
            return True
        reason = progress.reason.partition("\n")[0] or _last_line(self.log(trial))
        self.study.end(trial, "fail", note=f"{died}: {reason}")
        say(f"{time.strftime('%H:%M:%S')} {trial.name}: failed, {died}; see {self.log(trial)}")
        return False

    def _stop_all(self) -> None:
        """Ask all that runs to save and end, and wait for it."""
        for one in self.running.values():
            one.job.stop()
        deadline = time.monotonic() + GRACE
        while any(one.job.poll() is None for one in self.running.values()) and time.monotonic() < deadline:
            time.sleep(POLL)
        for one in self.running.values():
            one.job.kill()
        self.running.clear()

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Note signals instead of ending by them; on the main thread, which alone can."""

        def note(number: int, frame: Any) -> None:
            self._signal = signal.Signals(number).name

        is_main = threading.current_thread() is threading.main_thread()
        before = {number: signal.signal(number, note) for number in SIGNALS} if is_main else {}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, signal.SIG_DFL if handler is None else handler)


def _last_line(log: Path) -> str:
    try:
        lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    except OSError:
        return ""
    return lines[-1][:300] if lines else ""
