"""The arms: each a valid recipe, no two the same, all in some question, and the controls those of the students."""

from __future__ import annotations

from pathlib import Path

import pytest

from distill.recipe import load
from results.arms import ARMS, PLAN, all_cells, cells, identity, load_arm, says


@pytest.mark.parametrize("name", ARMS)
def test_an_arm_is_a_valid_recipe_without_a_control_of_its_own(name: str) -> None:
    recipe = load_arm(name, 1, ["data.root=elsewhere"])
    assert says(name)
    assert "base:" not in says(name)
    assert (recipe.seed, recipe.control, recipe.data.root) == (1, False, "elsewhere")
    assert recipe.data.select_on == "validation"
    assert recipe.data.validation > 0


def test_no_two_cells_are_the_same() -> None:
    found = list(all_cells())
    assert len(set(found)) == len(found)
    assert len({identity(load_arm(arm, seed)) for arm, seed in found}) == len(found)


def test_every_arm_is_in_a_campaign_and_in_a_question() -> None:
    blocks = [block for question in PLAN.questions for block in question.blocks]
    assert {row[0] for block in blocks for row in block.rows} == set(ARMS) == {arm for arm, _ in all_cells()}
    assert {row[1] for block in blocks for row in block.rows if len(row) > 1} <= set(ARMS)
    assert {goal.arm for block in blocks for goal in block.goals} <= set(ARMS)
    assert len({block.name for block in blocks}) == len(blocks)


METHODS = ("hard-guide", "hard", "guide", "soft-t1", "soft-t2", "soft-t3", "soft-t4")


@pytest.mark.parametrize(
    "name", [name for name in ARMS if name.partition("-")[2] in METHODS and not name.startswith("methods-")]
)
def test_the_control_is_that_of_every_method(name: str) -> None:
    control = load_arm(name, 2).as_control()
    assert identity(control) == identity(load_arm(f"{name.partition('-')[0]}-control", 2))


STEMS = ("methods-stem", "methods-stem-impulse", "methods-stem-mimetic")


@pytest.mark.parametrize("name", [name for name in ARMS if name.startswith("methods-")])
def test_methods_at_equal_minutes_differ_in_the_method_and_in_epochs_alone(name: str) -> None:
    """And in what a part of them changes in the student; the warm-up is an eighth of the run."""
    arm, plain = (load_arm(one, 1).flat() for one in (name, "students-plain"))
    differing = {key for key in arm.keys() | plain.keys() if arm.get(key) != plain.get(key)}
    changes = ("name", "label_weight", "distill", "teacher", "student.", "optim.warmup_epochs", "train.epochs")
    assert all(key.startswith(changes) for key in differing)
    assert any(key.startswith("student.") for key in differing) == (name in ("methods-no-token", *STEMS))
    assert arm["optim.warmup_epochs"] == pytest.approx(arm["train.epochs"] / 8, rel=0.01)


def test_other_controls_are_those_of_their_students() -> None:
    for student, control in (("nano-plain", "nano-plain-control"), ("flagship", "flagship-control")):
        assert identity(load_arm(student, 0).as_control()) == identity(load_arm(control, 0))


def test_the_recipes_of_the_readme_are_arms() -> None:
    assert identity(load("recipes/cifar10/nano.yaml", ["seed=2"])) == identity(load_arm("nano-soft-t3", 2))
    assert identity(load("recipes/cifar10/nano_guide.yaml")) == identity(load_arm("nano-hard-guide", 0))


@pytest.mark.parametrize("name", [name for name in ARMS if name.startswith(("tiny", "flagship", "short"))])
def test_the_last_tenth_of_every_tiny_run_is_unmixed(name: str) -> None:
    recipe = load_arm(name, 0)
    assert recipe.data.augment.mix_off_epoch == 0.9 * recipe.train.epochs


def test_where_data_and_weights_lie_is_not_what_is_learned() -> None:
    elsewhere = ["data.root=x", "teacher.weights=y.th", "train.precision=fp32", "name=z"]
    for name in ("nano-hard-guide", "nano-control"):  # an arm without a teacher has no weights of one
        assert identity(load_arm(name, 0, elsewhere)) == identity(load_arm(name, 0))
    assert load_arm("nano-control", 0, elsewhere).teacher is None
    assert identity(load_arm("nano-hard-guide", 0, ["train.epochs=7"])) != identity(load_arm("nano-hard-guide", 0))


def test_the_goal_of_the_first_question_is_run_first_under_all_seeds() -> None:
    assert cells("cpu")[:6] == [(name, seed) for name in ("nano-hard-guide", "nano-control") for seed in (0, 1, 2)]
    assert cells("gpu")[0] == ("flagship", 0)


def test_a_short_campaign_trains_no_teacher_and_first_answers_what_the_teacher_gives() -> None:
    asked = cells("gpu-short")
    assert asked[:2] == [("short-hard-guide", 0), ("short-control", 0)]
    for arm, seed in asked:
        recipe = load_arm(arm, seed)
        assert all(spec.recipe is None for spec in recipe.teachers)
        assert recipe.train.epochs <= 70


@pytest.mark.parametrize("name", ["teacher", "tiny", "laptop", "nano", "nano_guide", "nano_muon"])
def test_a_recipe_opens_with_its_question_and_its_command(name: str) -> None:
    path = Path("recipes/cifar10") / f"{name}.yaml"
    head = [line for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("#")]
    assert "?" in head[0]
    assert f"#   accelerate launch distill/train.py {path}" in head
