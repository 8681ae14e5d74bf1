"""`distill.sweep`: what it returns and raises, and what it leaves behind."""

from __future__ import annotations

import os
import signal
import threading
from typing import Any

import optuna
import pytest

import distill
from tests.sweeps.conftest import Sweeps

NUMBERS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@pytest.fixture
def mapping(sweeps: Sweeps, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A sweep of two learning rates and two seeds, cut short so that nothing is tested."""
    monkeypatch.chdir(sweeps.folder)
    keys = {"optim.lr": [1.0e-3, 3.0e-3], "seed": [0, 1]}
    sweeps.configure()
    return {"base": "recipe.yaml", "keys": keys, "minutes": 5, "command": sweeps.command}


def state() -> list[Any]:
    handlers = [signal.getsignal(number) for number in NUMBERS]
    return [handlers, optuna.logging.get_verbosity(), threading.active_count(), dict(os.environ)]


@pytest.mark.parametrize("main", [True, False])
def test_trials_and_the_winner_are_returned(main: bool, sweeps: Sweeps, mapping: dict[str, Any]) -> None:
    before, found = state(), []
    if main:
        found.append(distill.sweep(mapping, out=sweeps.out))
    else:
        thread = threading.Thread(target=lambda: found.append(distill.sweep(mapping, out=sweeps.out)))
        thread.start()
        thread.join()
    assert state() == before
    (swept,) = found
    assert isinstance(swept, distill.Sweep)
    assert [(trial.values, trial.seed) for trial in swept.trials] == [
        ({"optim.lr": rate}, seed) for rate in (1.0e-3, 3.0e-3) for seed in (0, 1)
    ]
    assert {trial.state for trial in swept.trials} == {"complete"}
    assert swept.winner is not None
    assert swept.winner.values == {"optim.lr": 3.0e-3}
    best = [trial for trial in swept.trials if trial.values == {"optim.lr": 3.0e-3}]
    assert [run.path for run in swept.winner.runs] == [trial.run for trial in best]
    assert swept.winner.validation == pytest.approx(sum(trial.validation or 0.0 for trial in best) / 2)
    assert swept.report is None
    assert distill.Sweep(sweeps.out).record == swept.record
    assert repr(swept).endswith("4 trials")


def test_a_signal_is_an_exception_and_the_same_call_goes_on(sweeps: Sweeps, mapping: dict[str, Any]) -> None:
    sweeps.configure(seconds=0.3)
    before = state()
    timer = threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    with pytest.raises(distill.Interrupted, match="SIGINT"):
        distill.sweep(mapping, out=sweeps.out)
    timer.join()
    assert state() == before
    with pytest.raises(distill.InputError, match="no sweep has come to its ranking"):
        distill.Sweep(sweeps.out)
    sweeps.configure()
    assert {trial.state for trial in distill.sweep(mapping, out=sweeps.out).trials} == {"complete"}
    assert len(sweeps.notes("trained")) == 4


def test_seeds_of_a_recipe_and_what_is_refused(sweeps: Sweeps, mapping: dict[str, Any]) -> None:
    for given, message in (
        ({"seeds": 101}, "101 trials, more than --max-trials 100"),
        ({"seeds": 2, "teachers": ["resnet18"]}, "--seeds, --teachers: give one of them"),
        ({"minutes": 3}, "only with them"),
    ):
        with pytest.raises(distill.InputError, match=message):
            distill.sweep("recipe.yaml", out=sweeps.out, **given)  # type: ignore[arg-type]
    with pytest.raises(distill.InputError, match="give the path of its file"):
        distill.sweep(mapping, out=sweeps.out, seeds=2)
    with pytest.raises(distill.InputError, match=r"optim\.lrr: unknown key; did you mean 'lr'"):
        distill.sweep(mapping | {"keys": {"optim.lrr": [1]}}, out=sweeps.out)
    assert not sweeps.out.exists()


def test_failures_of_all_trials_are_one_exception(sweeps: Sweeps, mapping: dict[str, Any]) -> None:
    sweeps.configure(bad=["000", "001", "002", "003"])
    with pytest.raises(distill.RunFailed, match=r"no trial is complete; .*exit code 2"):
        distill.sweep(mapping, out=sweeps.out)
