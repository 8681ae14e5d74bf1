"""What is wrong with a sweep is one message before anything runs, with exit code 2."""

from __future__ import annotations

from typing import Any

import pytest

from tests.conftest import some
from tests.sweeps.conftest import Sweeps

LR = {"optim.lr": [1.0e-3, 3.0e-3]}
BAD: list[tuple[dict[str, Any], list[str]]] = [
    ({"keys": {"optim.lrr": [1]}}, ["optim.lrr: unknown key; did you mean 'lr'?"]),
    ({"keys": {"optim.lr": ["fast"]}}, ["optim.lr: should be a valid number, got 'fast'"]),
    ({"keys": {"optim.lr": [0.1] * 2}}, ["optim.lr: a value is given twice"]),
    ({"keys": {"optim.lr": []}}, ["optim.lr: an empty list"]),
    ({"keys": {"optim.lr": 0.1}}, ["optim.lr: should be a list of values, or a range"]),
    ({"keys": {"optim.lr": {"low": 2.0, "high": 1.0}}}, ["optim.lr: an empty range, from 2.0 to 1.0"]),
    ({"keys": {"optim.lr": {"low": 1.0, "high": 2.0}}}, ["optim.lr: a grid needs values"]),
    ({"keys": {"optim.lr": {"low": 1.0, "high": 2.0, "lg": True}}}, ["optim.lr.lg: unknown key of a range"]),
    (
        {"search": "random", "trials": 2, "keys": {"optim.lr": {"low": 0, "high": 1.0, "log": True}}},
        ["optim.lr: `log` needs a `low` above 0"],
    ),
    ({"keys": {"seed": [-1]}}, ["seed: should be greater than or equal to 0, got -1"]),
    ({"keys": {"train.test": [True, False]}}, ["train.test: is set by the sweep itself"]),
    ({"keys": {"seed": {"low": 1, "high": 101}}}, ["keys: 101 trials, more than --max-trials 100"]),
    ({"search": "annealing"}, ["search: should be 'grid', 'random' or 'tpe', got 'annealing'"]),
    ({"search": "tpe"}, ["trials: missing; tpe needs a number of runs"]),
    ({"search": "random", "trials": 3, "keys": {**LR, "seed": [0, 1]}}, ["each configuration has 2 seeds"]),
    ({"trials": 3}, ["trials: a grid has one for each combination"]),
    ({"serch": "grid"}, ["serch: unknown key; did you mean 'search'?"]),
    ({"stop": "median"}, ["stop.method: should be 'hyperband', got 'median'"]),
    ({"base": "elsewhere.yaml"}, ["elsewhere.yaml: cannot read the recipe: no such file"]),
    ({"base": None}, ["base: missing"]),
    (  # all at once
        {"search": "best", "parallel": 0, "keys": {"optim.lrr": [1], "train.epochs": []}},
        ["search: should be", "parallel: should be", "train.epochs: an empty list"],
    ),
    ({"keys": {"train.select": ["top1", "macro"]}}, ["train.select: trials are ranked by it"]),
    ({"keys": {"optim.lrr": [1], "train.epochs": []}}, ["optim.lrr: unknown key", "train.epochs: an empty list"]),
    ({"executor": "slurm"}, ['executor: slurm: Could not detect "srun"']),
    ({"executor": "local", "options": {"memory": 3}}, ["executor: local: Parameter 'memory' need to be prefixed"]),
]


@pytest.mark.parametrize(("changes", "messages"), BAD, ids=[str(number) for number in range(len(BAD))])
def test_a_bad_sweep_is_one_message(sweeps: Sweeps, changes: dict[str, Any], messages: list[str]) -> None:
    sweeps.write(**{"keys": LR, **changes})
    code, output = sweeps.run()
    assert code == 2, output
    assert output.count("error: ") == 1
    assert "Traceback" not in output
    for message in messages:
        assert message in output
    assert not sweeps.out.exists()
    assert sweeps.notes() == []


def test_a_grid_may_be_larger_if_that_is_said(sweeps: Sweeps) -> None:
    sweeps.write(keys={"seed": {"low": 0, "high": 2}}, minutes=5)
    assert sweeps.run("sweep.yaml", "--max-trials", "2")[0] == 2
    assert sweeps.run("sweep.yaml", "--max-trials", "3")[0] == 0


@pytest.mark.parametrize("damage", some(["not json\nat all\n", "{}\n{}\n", '{"op_code": 99}\n{"op_code": 0}\n']))
def test_a_broken_storage_is_named_and_left_as_it_is(sweeps: Sweeps, damage: str) -> None:
    sweeps.write(keys=LR, minutes=5)
    sweeps.search()
    journal = sweeps.out / "optuna.journal"
    journal.write_text(damage)
    code, output = sweeps.run()
    assert code == 2
    assert f"error: out/{journal.name}: cannot be read" in output
    assert journal.read_text() == damage


def test_a_changed_sweep_does_not_go_on(sweeps: Sweeps) -> None:
    sweeps.write(keys=LR, minutes=5)
    sweeps.search()
    sweeps.write(keys={"optim.lr": [1.0e-3, 4.0e-3]}, minutes=5)
    code, output = sweeps.run()
    assert code == 2
    assert "sweep.yaml has changed since this sweep began: keys" in output
    sweeps.write(keys=LR, minutes=5, parallel=2)
    assert sweeps.run()[0] == 0
    (sweeps.folder / "recipe.yaml").write_text("data: {name: digits}\n")
    code, output = sweeps.run()
    assert code == 2
    assert "began: recipe" in output


def test_a_folder_of_something_else_is_left_alone(sweeps: Sweeps) -> None:
    sweeps.write(keys=LR)
    sweeps.out.mkdir()
    (sweeps.out / "thesis.txt").write_text("mine")
    code, output = sweeps.run()
    assert code == 2
    assert "out: exists and is no sweep (it has thesis.txt)" in output
    assert [path.name for path in sweeps.out.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize("others", some([[], ["status.json", ".lock"]]))
def test_a_recipe_of_the_user_is_neither_removed_nor_replaced(sweeps: Sweeps, others: list[str]) -> None:
    sweeps.write(keys=LR)
    sweeps.out.mkdir()
    for name in ("recipe.yaml", *others):
        (sweeps.out / name).write_text("# mine\n")
    code, output = sweeps.run()
    assert code == 2
    assert "out: exists and is no sweep" in output
    assert {path.name: path.read_text() for path in sweeps.out.iterdir()} == dict.fromkeys(
        ["recipe.yaml", *others], "# mine\n"
    )


def test_two_sweeps_do_not_share_a_folder(sweeps: Sweeps) -> None:
    sweeps.write(keys=LR, minutes=5)
    sweeps.trainer = {"seconds": 0.5}
    first = sweeps.start()
    while not sweeps.notes("begun"):
        assert first.processes[0].is_alive()
    code, output = sweeps.run()
    assert code == 2
    assert "out: another sweep runs there" in output
    assert first.wait() == [0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["recipe.yaml", "--teachers", "no_such_net,resnet18"], "no_such_net"),
        (["recipe.yaml", "--teachers", "resnet18,resnet18"], "teacher: a value is given twice"),
        (["recipe.yaml", "--minutes", "3"], "--minutes: how long each pilot of --teachers trains"),
        (["recipe.yaml", "--seeds", "200"], "200 trials, more than --max-trials 100"),
    ],
)
def test_bad_options(sweeps: Sweeps, arguments: list[str], message: str) -> None:
    code, output = sweeps.run(*arguments)
    assert code == 2
    assert message in output
    assert not sweeps.out.exists()
