"""The search, by Optuna: which trials there are, what they try and what came out, in a journal that survives kills."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from distill.errors import InputError
from distill.files.metrics import MetricsFile
from distill.sweeps import axes
from distill.sweeps.axes import Axis, Values
from distill.sweeps.schema import Sweep

try:
    import optuna
    from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
    from optuna.storages.journal import JournalFileBackend
    from optuna.trial import FrozenTrial, TrialState
except ImportError as error:
    raise InputError(
        f'distill sweep needs Optuna ({error}). Install it: python -m pip install "distill-vit[sweep]".'
    ) from None

JOURNAL = "optuna.journal"
STUDY = "sweep"
SCALAR = (int, float, str, bool, type(None))


@dataclass(frozen=True)
class Trial:
    """One run of a sweep."""

    number: int
    values: dict[str, Any]
    """By dotted key of the recipe, without the seed."""
    seed: int
    configuration: int
    """The same for trials that differ in their seed only."""
    state: str
    """'waiting', 'running', 'complete', 'pruned' or 'fail'."""
    value: float | None
    """Of the metric on validation, the best of the run, in percent."""
    failures: int
    note: str
    """Why it failed or was stopped."""

    @property
    def name(self) -> str:
        return axes.name_of(self.number, {**self.values, axes.SEED: self.seed})


class Study:
    """The study of one sweep. One process at a time."""

    def __init__(self, sweep: Sweep, folder: Path) -> None:
        """Open the study under `folder`, or create it.

        Raises:
            InputError: its journal cannot be read.
        """
        self.sweep, journal = sweep, folder / JOURNAL
        for lock in folder.glob(f"{JOURNAL}.lock*"):  # of a process that was killed
            lock.unlink()
        try:
            MetricsFile(journal).repair()  # one object a line there, too
            self._storage = optuna.storages.JournalStorage(JournalFileBackend(str(journal)))
            self._study = optuna.create_study(
                study_name=STUDY,
                storage=self._storage,
                sampler=self._sampler(0),
                pruner=self._pruner(),
                direction="maximize",
                load_if_exists=True,
            )
            self.trials()
        except Exception as error:  # whatever Optuna makes of a damaged journal
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            raise InputError(
                f"{journal}: cannot be read ({reason}). The trials are intact; put the file back, or begin another "
                "sweep with another --out."
            ) from None
        self._distributions = {one.key: _distribution(one) for one in sweep.axes}

    def _sampler(self, begun: int) -> optuna.samplers.BaseSampler:
        """Random numbers are a function of the seed and the number of trials, so that a sweep that goes on repeats
        none.
        """
        seed = int(np.random.SeedSequence([self.sweep.options.seed, begun]).generate_state(1)[0])
        if self.sweep.options.search == "tpe":
            return optuna.samplers.TPESampler(seed=seed, constant_liar=True)
        return optuna.samplers.RandomSampler(seed=seed)

    def _pruner(self) -> optuna.pruners.BasePruner:
        stop = self.sweep.options.stop
        if stop is None:
            return optuna.pruners.NopPruner()
        return optuna.pruners.HyperbandPruner(
            min_resource=stop.min_epochs,
            max_resource=max(stop.min_epochs, math.ceil(self.sweep.resolved.train.epochs)),
            reduction_factor=stop.factor,
        )

    def plan(self) -> None:
        """Enter what is to be run and not entered yet: all of a grid, and the other seeds of each configuration."""
        sweep, known = self.sweep, {(trial.configuration, trial.seed) for trial in self.trials()}
        if sweep.options.search == "grid":
            configurations = dict(enumerate(sweep.cells))
        else:
            configurations = {trial.configuration: trial.values for trial in self.trials()}
        for (number, values), seed in itertools.product(configurations.items(), sweep.seeds):
            if (number, seed) not in known:
                self._study.enqueue_trial(
                    {key: _choice(value) for key, value in values.items()},
                    user_attrs={"configuration": number, "seed": seed},
                )

    def next(self) -> Trial | None:
        """A trial to begin, recorded as running; None: all have begun."""
        trials = self.trials()
        if not any(trial.state == "waiting" for trial in trials) and len(trials) >= self.sweep.total:
            return None
        self._study.sampler = self._sampler(len(trials))
        asked = self._study.ask(self._distributions)
        self.plan()
        return self.trial(asked.number)

    def running(self) -> list[Trial]:
        """Trials that have begun and not ended, those of an earlier, killed process among them."""
        found = self._study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
        for frozen in found:  # killed while it was asked for
            if self._distributions.keys() - frozen.params.keys():
                self._study.sampler = self._sampler(frozen.number)
                live = optuna.trial.Trial(self._study, frozen._trial_id)
                for key, distribution in self._distributions.items():
                    live._suggest(key, distribution)
        return [trial for trial in self.trials() if trial.state == "running"]

    def trials(self) -> list[Trial]:
        return [self._of(frozen) for frozen in self._study.get_trials(deepcopy=False)]

    def trial(self, number: int) -> Trial:
        return self.trials()[number]

    def report(self, trial: Trial, values: Iterator[tuple[int, float]]) -> bool:
        """Record the best value after so many epochs; returns whether the trial should stop."""
        frozen = self._study.get_trials(deepcopy=False)[trial.number]
        live = optuna.trial.Trial(self._study, frozen._trial_id)
        for epoch, value in values:
            if epoch not in frozen.intermediate_values:
                live.report(value, epoch)
        return bool(live.should_prune())

    def end(self, trial: Trial, state: str, value: float | None = None, note: str = "") -> None:
        """Record how a trial ended: 'complete' with its value, 'pruned' or 'fail'."""
        self.note(trial, note=note)
        if state == "pruned" and value is not None:
            self.note(trial, reached=value)
        self._study.tell(trial.number, value if state == "complete" else None, state=TrialState[state.upper()])

    def note(self, trial: Trial, **values: Any) -> None:
        """Store values beside the trial."""
        frozen = self._study.get_trials(deepcopy=False)[trial.number]
        for key, value in values.items():
            if frozen.user_attrs.get(key) != value:
                self._storage.set_trial_user_attr(frozen._trial_id, key, value)

    def importance(self) -> dict[str, float]:
        """Share of the variance of the value that each key explains, by fANOVA (Hutter et al. 2014); empty where there
        are too few trials to tell.
        """
        complete = [trial for trial in self.trials() if trial.state == "complete"]
        varied = [
            key for key in self._distributions if len({axes.text_of(trial.values[key]) for trial in complete}) > 1
        ]
        if len(varied) < 1 or len({trial.value for trial in complete}) < 2:
            return {}
        evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0)
        found = optuna.importance.get_param_importances(self._study, evaluator=evaluator, params=varied)
        return {key: float(share) for key, share in found.items()}

    def _of(self, frozen: FrozenTrial) -> Trial:
        given = frozen.params | frozen.system_attrs.get("fixed_params", {})
        attributes, state = frozen.user_attrs, frozen.state.name.lower()
        return Trial(
            number=frozen.number,
            values={one.key: _value(one, given[one.key]) for one in self.sweep.axes if one.key in given},
            seed=attributes.get("seed", self.sweep.seeds[0]),
            configuration=attributes.get("configuration", frozen.number),
            state=state,
            value=frozen.value if state == "complete" else attributes.get("reached"),
            failures=attributes.get("failures", 0),
            note=attributes.get("note", ""),
        )


@contextmanager
def quiet() -> Iterator[None]:
    """Within, Optuna logs errors alone."""
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        yield
    finally:
        optuna.logging.set_verbosity(before)


def _distribution(one: Axis) -> BaseDistribution:
    if isinstance(one, Values):
        return CategoricalDistribution([_choice(value) for value in one.values])
    if one.whole:
        return IntDistribution(int(one.low), int(one.high), log=one.log, step=int(one.step or 1))
    return FloatDistribution(one.low, one.high, log=one.log, step=one.step)


def _choice(value: Any) -> Any:
    """A value as Optuna stores it: lists and sections as YAML."""
    return value if isinstance(value, SCALAR) else axes.text_of(value)


def _value(one: Axis, stored: Any) -> Any:
    if isinstance(one, Values):
        return next((value for value in one.values if _same(_choice(value), stored)), stored)
    return stored


def _same(one: Any, other: Any) -> bool:
    return type(one) is type(other) and bool(one == other)
