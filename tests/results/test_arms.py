"""The arms: each a valid recipe, no two the same, all in some question, and the controls those of the students."""

from __future__ import annotations

from pathlib import Path

import pytest

from distill.recipe import load
from results.arms import ARMS, CAMPAIGNS, QUESTIONS, SEEDS, Arm, all_cells, cells, identity


@pytest.mark.parametrize("name", ARMS)
def test_an_arm_is_a_valid_recipe_without_a_control_of_its_own(name: str) -> None:
    recipe = ARMS[name].load(1, ["data.root=elsewhere"])
    assert (recipe.seed, recipe.control, recipe.data.root) == (1, False, "elsewhere")
    assert recipe.data.select_on == "validation"
    assert recipe.data.validation > 0


def test_no_two_cells_are_the_same() -> None:
    names = [f"{arm.name}-{seed}" for arm, seed in all_cells()]
    assert len(set(names)) == len(names)
    assert len({identity(arm.load(seed)) for arm, seed in all_cells()}) == len(names)


def test_every_arm_is_in_a_campaign_and_in_a_question() -> None:
    asked = {name for question in QUESTIONS for block in question.blocks for name, _ in block.rows}
    tested = {other for question in QUESTIONS for block in question.blocks for _, other in block.rows if other}
    assert asked == set(ARMS) == {arm.name for arm, _ in all_cells()}
    assert tested <= asked
    named = {goal.arm for question in QUESTIONS for block in question.blocks for goal in block.goals}
    assert named <= asked
    files = [block.name for question in QUESTIONS for block in question.blocks]
    assert len(set(files)) == len(files)


METHODS = ("hard-guide", "hard", "guide", "soft-t1", "soft-t2", "soft-t3", "soft-t4")


@pytest.mark.parametrize("name", [name for name in ARMS if name.partition("-")[2] in METHODS])
def test_the_control_is_that_of_every_method(name: str) -> None:
    control = ARMS[name].load(2).as_control()
    assert identity(control) == identity(ARMS[f"{name[:4]}-control"].load(2))


def test_other_controls_are_those_of_their_students() -> None:
    for student, control in (("nano-plain", "nano-plain-control"), ("flagship", "flagship-control")):
        assert identity(ARMS[student].load(0).as_control()) == identity(ARMS[control].load(0))


def test_the_recipes_of_the_readme_are_arms() -> None:
    assert identity(load("recipes/cifar10/nano.yaml", ["seed=2"])) == identity(ARMS["nano-soft-t3"].load(2))
    assert identity(load("recipes/cifar10/nano_guide.yaml")) == identity(ARMS["nano-hard-guide"].load(0))


@pytest.mark.parametrize(
    "arm", [arm for arm in ARMS.values() if arm.recipe.endswith("tiny.yaml")], ids=lambda arm: arm.name
)
def test_the_last_tenth_of_every_tiny_run_is_unmixed(arm: Arm) -> None:
    recipe = arm.load(0)
    assert recipe.data.augment.mix_off_epoch == 0.9 * recipe.train.epochs


def test_where_data_and_weights_lie_is_not_what_is_learned() -> None:
    arm = ARMS["nano-hard-guide"]
    elsewhere = arm.load(0, ["data.root=x", "teacher.weights=y.th", "train.precision=fp32", "name=z"])
    assert identity(elsewhere) == identity(arm.load(0))
    assert identity(arm.load(0, ["train.epochs=7"])) != identity(arm.load(0))
    assert identity(ARMS["nano-control"].load(0, ["teacher.weights=y.th"])) == identity(ARMS["nano-control"].load(0))


def test_the_goal_of_the_first_question_is_run_first_under_all_seeds() -> None:
    first = [(arm.name, seed) for arm, seed in cells("cpu")][:6]
    assert first == [(name, seed) for name in ("nano-hard-guide", "nano-control") for seed in SEEDS]
    assert CAMPAIGNS["gpu"][0] == ("flagship", (0,))


def test_the_cpu_campaign_takes_five_hours_on_two_cores_beside_the_laptops_hour() -> None:
    assert sum(arm.minutes for arm, _ in cells("cpu") if not arm.alone) / 2 <= 5 * 60


@pytest.mark.parametrize("name", ["teacher", "tiny", "laptop", "nano", "nano_guide", "nano_muon"])
def test_a_recipe_opens_with_its_question_and_its_command(name: str) -> None:
    path = Path("recipes/cifar10") / f"{name}.yaml"
    head = [line for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("#")]
    assert "?" in head[0]
    assert f"#   accelerate launch distill/train.py {path}" in head
