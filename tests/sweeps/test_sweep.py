"""Sweeps by the real command, of trials that a small script makes up: search, seeds, stopping, killing, failing."""

from __future__ import annotations

import itertools
import json
import os
import random
import signal
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from scipy import stats

from distill.sweeps.jobs import DEVICES, Processes
from tests.conftest import Counted, some
from tests.sweeps.conftest import Sweeps

RATES = [1.0e-3, 3.0e-3, 2.0e-3]


def test_a_grid_ranks_configurations_by_their_mean_over_the_seeds(sweeps: Sweeps) -> None:
    sweeps.write(keys={"optim.lr": RATES, "seed": [0, 1, 4]}, parallel=2, minutes=5)
    sweeps.trainer = {"seconds": 0.15}
    found = sweeps.search()
    assert [trial["seed"] for trial in found["trials"]] == [0, 1, 4] * 3
    assert [rank["values"]["optim.lr"] for rank in found["ranking"]] == [3.0e-3, 2.0e-3, 1.0e-3]
    first = found["ranking"][0]
    values = [50 + 15 + 4 + 0.5 * seed for seed in (0, 1, 4)]
    assert first["validation"] == values
    assert first["mean"] == pytest.approx(sum(values) / 3)
    expected = stats.t.interval(0.95, 2, loc=sum(values) / 3, scale=stats.sem(values))
    assert first["interval"] == pytest.approx(expected)
    assert found["chosen"]["trials"] == [3, 4, 5]
    assert found["importance"] == {"optim.lr": pytest.approx(1.0)}
    given = [note["given"] for note in sweeps.notes("begun")]
    assert {one["train.test"] for one in given} == {"false"}
    assert {one["control"] for one in given} == {"false"}  # of plain training there is none
    assert sweeps.notes("tested") == []
    assert len(list((sweeps.out / "trials").iterdir())) == 9
    # Two at a time: some begin before the one before them has ended, however busy the machine is.
    moments = sorted((note["time"], note["what"]) for note in sweeps.notes())
    running = itertools.accumulate(1 if what == "begun" else -1 for _, what in moments)
    assert max(running) == 2


def test_a_single_seed_has_the_interval_of_its_images(sweeps: Sweeps) -> None:
    sweeps.write(keys={"optim.lr": [1.0e-3]}, minutes=5)
    (rank,) = sweeps.search()["ranking"]
    expected = stats.binomtest(118, 200).proportion_ci(method="wilson")
    assert rank["mean"] == 59.0
    assert rank["interval"] == pytest.approx([100 * expected.low, 100 * expected.high])


@pytest.mark.parametrize("search", some(["tpe", "random"]))
def test_each_drawn_configuration_has_all_seeds_and_a_sweep_that_goes_on_repeats_none(
    sweeps: Sweeps, search: str
) -> None:
    keys = {"optim.lr": {"low": 1.0e-4, "high": 5.0e-3, "log": True}, "train.batch_size": {"low": 8, "high": 64}}
    sweeps.write(search=search, keys={**keys, "seed": [0, 1]}, trials=8, minutes=5)
    sweeps.trainer = {"seconds": 0.05}
    launched = sweeps.start()
    _until(lambda: len(sweeps.notes("trained")) >= 3)
    launched.processes[0].kill()
    launched.wait()
    found = sweeps.search()
    by_configuration: dict[int, list[dict[str, Any]]] = {}
    for trial in found["trials"]:
        by_configuration.setdefault(trial["configuration"], []).append(trial)
    assert [[trial["seed"] for trial in group] for group in by_configuration.values()] == [[0, 1]] * 4
    drawn = [group[0]["values"] for group in by_configuration.values()]
    assert all(group[0]["values"] == group[1]["values"] for group in by_configuration.values())
    assert len({values["optim.lr"] for values in drawn}) == 4
    assert all(1.0e-4 <= values["optim.lr"] <= 5.0e-3 for values in drawn)
    assert all(8 <= values["train.batch_size"] <= 64 for values in drawn)
    assert Counter(note["trial"] for note in sweeps.notes("trained")) == dict.fromkeys(
        (trial["name"] for trial in found["trials"]), 1
    )


def test_hyperband_stops_what_falls_behind_and_does_not_rank_it(sweeps: Sweeps) -> None:
    keys = {"optim.lr": [3.0e-3, 1.0e-3, 1.1e-3, 1.2e-3]}
    sweeps.write(keys=keys, stop={"method": "hyperband", "factor": 2}, minutes=5)
    sweeps.trainer = {"seconds": 0.3}
    found = sweeps.search()
    pruned = [trial for trial in found["trials"] if trial["state"] == "pruned"]
    assert pruned
    assert all(trial["epoch"] < 4 and "stopped early" in trial["note"] for trial in pruned)
    assert found["ranking"][0]["values"] == {"optim.lr": 3.0e-3}
    ranked = {number for rank in found["ranking"] for number in rank["trials"]}
    assert ranked.isdisjoint(trial["number"] for trial in pruned)
    assert {note["trial"] for note in sweeps.notes("stopped")} == {trial["name"] for trial in pruned}


def test_minutes_stop_every_trial_and_rank_it_by_what_it_reached(sweeps: Sweeps) -> None:
    sweeps.write(keys={"optim.lr": [1.0e-3, 3.0e-3]}, parallel=2, minutes=0.02)
    sweeps.trainer = {"seconds": 0.8}
    found = sweeps.search()
    assert [trial["note"] for trial in found["trials"]] == ["after 0.02 minutes"] * 2
    assert all(1 <= trial["epoch"] < 4 for trial in found["trials"])
    assert [rank["values"]["optim.lr"] for rank in found["ranking"]] == [3.0e-3, 1.0e-3]
    assert sweeps.notes("trained") == []


def test_a_pause_is_no_training(sweeps: Sweeps) -> None:
    sweeps.write(keys={"optim.lr": [1.0e-3]}, minutes=0.05)
    sweeps.trainer = {"seconds": 0.4, "loading": 0.5}
    launched = sweeps.start()
    _until(lambda: bool(_steps(sweeps)) and min(_steps(sweeps)) >= 10)
    launched.processes[0].kill()
    launched.wait()
    time.sleep(3.0)
    (trial,) = sweeps.search()["trials"]
    assert (trial["epoch"], trial["note"]) == (4, "")
    assert trial["minutes"] < 0.05


def test_a_trial_that_dies_is_tried_once_more_and_the_others_go_on(sweeps: Sweeps) -> None:
    sweeps.write(keys={"optim.lr": [1.0e-3, 2.0e-3, 3.0e-3]}, minutes=5)
    sweeps.trainer = {"dying": ["001"], "bad": ["002"]}
    found = sweeps.search()
    assert [trial["state"] for trial in found["trials"]] == ["complete", "fail", "fail"]
    assert len([note for note in sweeps.notes("died") if note["trial"].startswith("001")]) == 2
    assert found["trials"][1]["note"].startswith("killed by SIGKILL")
    assert found["trials"][2]["note"] == "exit code 2: error: data.root: no such folder"
    assert found["trials"][2]["failures"] == 1  # bad input is not tried again
    assert "002-lr-0.003-seed-0: failed, exit code 2" in found["output"]
    assert len(sweeps.search()["ranking"]) == 1
    assert len(sweeps.notes("died")) == 2  # nor later


def test_nothing_complete_is_said_with_the_reason(sweeps: Sweeps) -> None:
    sweeps.write(keys={"optim.lr": [1.0e-3]}, minutes=5)
    sweeps.trainer = {"validation": 0, "seconds": 0.3}
    code, output = sweeps.run()
    assert code == 3
    assert "no validation images to rank it on; set data.validation" in output


@pytest.mark.parametrize("number", some([signal.SIGINT, signal.SIGTERM]))
def test_a_signal_stops_the_trials_and_the_same_command_goes_on(sweeps: Sweeps, number: signal.Signals) -> None:
    sweeps.write(keys={"optim.lr": [1.0e-3, 3.0e-3]}, parallel=2, minutes=5)
    sweeps.trainer = {"seconds": 0.3}
    launched = sweeps.start()
    _until(lambda: len(_steps(sweeps)) == 2 and min(_steps(sweeps)) >= 10)
    os.kill(launched.processes[0].pid or 0, number)
    assert launched.wait() == [75]
    assert f"interrupted: {number.name}; the same command goes on" in launched.output
    assert len(sweeps.notes("stopped")) == 2
    found = sweeps.search()
    assert [trial["state"] for trial in found["trials"]] == ["complete"] * 2
    assert len(sweeps.notes("resumed")) == len(sweeps.notes("trained")) == 2


def _steps(sweeps: Sweeps) -> list[int]:
    return [json.loads(path.read_text()).get("step", 0) for path in sweeps.out.glob("trials/*/status.json")]


def _until(condition: Any, seconds: float = 60.0) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.02)


@pytest.mark.parametrize("kills", [3, pytest.param(60, marks=pytest.mark.soak)])
def test_killed_anywhere_every_trial_is_trained_once(sweeps: Sweeps, kills: int, counted: Counted) -> None:
    """Kills at random moments, in sweeps of six trials; three to a sweep."""
    dice, done, rounds = random.Random(kills), 0, kills // 3
    for _ in range(rounds):
        sweeps.write(keys={"optim.lr": RATES, "seed": [0, 1]}, parallel=2, minutes=5)
        sweeps.trainer = {"seconds": 0.1}
        for _ in range(3):
            launched = sweeps.start()
            launched.processes[0].join(dice.uniform(0.3, 3.0))
            launched.processes[0].kill()
            launched.wait()
        found = sweeps.search()
        trained = Counter(note["trial"] for note in sweeps.notes("trained"))
        done += trained == dict.fromkeys((trial["name"] for trial in found["trials"]), 1) and len(trained) == 6
        sweeps.clear()
    counted("a sweep killed three times trains every trial once", done=done, of=rounds)


def test_submitit_runs_trials_as_jobs(sweeps: Sweeps) -> None:
    sweeps.write(keys={"optim.lr": [1.0e-3, 3.0e-3]}, parallel=2, minutes=5, executor="local")
    found = sweeps.search()
    assert [trial["state"] for trial in found["trials"]] == ["complete"] * 2
    assert len(list((sweeps.out / "jobs").glob("*_result.pkl"))) == 2


def test_trials_have_a_gpu_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    monkeypatch.setenv(DEVICES, "4,7")
    executor = Processes(None)
    assert executor.parallel == 2
    jobs = [executor.start(["sh", "-c", f"echo ${DEVICES}; sleep 0.5"], tmp_path, tmp_path / str(n)) for n in range(2)]
    _until(lambda: all(job.poll() == 0 for job in jobs))
    assert [(tmp_path / str(n)).read_text().strip() for n in range(2)] == ["4", "7"]


def test_values_of_one_name_are_told_apart(sweeps: Sweeps) -> None:
    weights = [[{"method": "hard", "weight": weight}] for weight in (0.5, 1.0)]
    sweeps.write(keys={"distill": [*weights, [{"method": "soft"}]]}, minutes=5)
    recipe = sweeps.folder / "recipe.yaml"
    recipe.write_text(recipe.read_text() + "teacher: {model: resnet18}\n")
    labels = [trial["labels"]["distill"] for trial in sweeps.search()["trials"]]
    assert labels == ["[{method: hard, weight: 0.5}]", "[{method: hard, weight: 1.0}]", "soft"]


def test_runs_without_labels_have_no_control(sweeps: Sweeps) -> None:
    recipe = sweeps.folder / "recipe.yaml"
    recipe.write_text(recipe.read_text() + "teacher: {model: resnet18}\n")
    sweeps.write(keys={"label_weight": [0], "distill": [[{"method": "guide"}]]}, minutes=5)
    sweeps.search()
    assert [note["given"]["control"] for note in sweeps.notes("begun")] == ["false"]


def test_the_seed_of_a_search_changes_what_is_drawn(sweeps: Sweeps) -> None:
    drawn = []
    for seed in (0, 1):
        keys = {"optim.lr": {"low": 1.0e-4, "high": 5.0e-3}}
        sweeps.write(keys=keys, search="random", trials=4, seed=seed, minutes=5)
        drawn.append({trial["values"]["optim.lr"] for trial in sweeps.search()["trials"]})
        sweeps.clear()
    assert not drawn[0] & drawn[1]


def test_the_study_opens_in_optuna(sweeps: Sweeps) -> None:
    optuna = pytest.importorskip("optuna")
    sweeps.write(keys={"distill": [[], [{"method": "hard"}]], "optim.lr": [1.0e-3]}, minutes=5)
    recipe = sweeps.folder / "recipe.yaml"
    recipe.write_text(recipe.read_text() + "teacher: {model: resnet18}\n")
    found = sweeps.search()
    assert [trial["labels"]["distill"] for trial in found["trials"]] == ["none", "hard"]
    assert [note["given"]["control"] for note in sweeps.notes("begun")] == ["false", "true"]
    backend = optuna.storages.journal.JournalFileBackend(str(sweeps.out / "optuna.journal"))
    study = optuna.load_study(study_name="sweep", storage=optuna.storages.JournalStorage(backend))
    assert study.best_value == 59.0
    assert [trial.params["distill"] for trial in study.trials] == ["[]", "[{method: hard}]"]
