"""All that is compared in results/README.md: the arms, the order in which campaigns run them, and the questions.

An arm is a recipe with overrides; a cell is an arm under one seed. The controls are arms like all others: a control
that a run has trained beside its student is the same recipe, and counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from distill.recipe import OPERATIONAL_KEYS, Recipe, load

LAPTOP = "recipes/cifar10/laptop.yaml"
NANO = "recipes/cifar10/nano_guide.yaml"
TINY = "recipes/cifar10/tiny.yaml"
TEACHER = "recipes/cifar10/teacher.yaml"
GRID_EPOCHS, LONG_EPOCHS = 100, 900
"""Of tiny.yaml on a GPU: a cell of the table, and the thirty minutes."""

UNTAUGHT = ("teacher=null", "distill=[]", "label_weight=1.0")
PLAIN = ("student.attention={kind: standard}",)


def tiny_for(epochs: int) -> tuple[str, ...]:
    """tiny.yaml at another length: the last tenth unmixed, as there."""
    return f"train.epochs={epochs}", f"data.augment.mix_off_epoch={epochs * 9 // 10}"


@dataclass(frozen=True)
class Arm:
    name: str
    says: str
    """In a table."""
    recipe: str
    overrides: tuple[str, ...] = ()
    minutes: float = 15.0
    """Expected of one run, on one of two cores or on one large GPU."""
    alone: bool = False
    """Takes all cores of the machine."""

    def load(self, seed: int, given: Sequence[str] = ()) -> Recipe:
        """What a run of it learns by; `given` for all arms, such as where the data are."""
        return load(self.recipe, self.all_overrides(seed, given))

    def all_overrides(self, seed: int, given: Sequence[str] = ()) -> list[str]:
        """Its own after those that are given: an arm without a teacher has no weights of one."""
        return [*given, *self.overrides, f"seed={seed}", "control=false"]


@dataclass(frozen=True)
class Goal:
    says: str
    arm: str
    top1: float | None = None
    """At least, in percent."""
    against: str | None = None
    """Another arm, or 'teacher'."""
    points: float = 0.0
    """At least so many more than `against`."""
    p: float | None = None
    """Of that difference, below."""
    minutes: float | None = None
    """Of training, at most."""


@dataclass(frozen=True)
class Block:
    """Arms at one budget."""

    name: str
    """Of its files."""
    rows: tuple[tuple[str, str | None], ...]
    """An arm, and the arm that it is tested against."""
    goals: tuple[Goal, ...] = ()


@dataclass(frozen=True)
class Question:
    title: str
    asks: str
    blocks: tuple[Block, ...]


def soft(temperature: int) -> tuple[str, ...]:
    return (f"distill=[{{method: soft, weight: 0.5, temperature: {temperature}}}]",)


GUIDE = "{method: guide, weight: {start: 2.5, end: 0.0, until: 0.7}}"
VARIANTS: dict[str, tuple[str, tuple[str, ...]]] = {
    "hard-guide": ("hard labels and guidance by feature maps; 1-D areas of 2, sums of values", ()),
    "control": ("the same student without a teacher", UNTAUGHT),
    "soft-t3": ("soft targets, T = 3", soft(3)),
    "plain": ("hard labels and guidance, plain attention", PLAIN),
    "hard": ("hard labels", ("distill=[{method: hard, weight: 0.5}]",)),
    "guide": ("guidance alone, both heads on the labels", ("label_weight=1.0", f"distill=[{GUIDE}]")),
    "mean": ("1-D areas of 2, means of values", ("student.attention.value_mode=mean",)),
    "area-2x2": ("areas of 2x2 on the patch grid", ("student.attention.max_area=[2, 2]",)),
    "area-4": ("1-D areas of 4", ("student.attention.max_area=4",)),
    "area-3": ("1-D areas of 3", ("student.attention.max_area=3",)),
    "plain-control": ("plain attention, without a teacher", (*UNTAUGHT, *PLAIN)),
    "no-token": (
        "hard labels and guidance on the class head, no distillation token", ("student.distillation_token=false",)
    ),
    "soft-t1": ("soft targets, T = 1", soft(1)),
    "soft-t4": ("soft targets, T = 4", soft(4)),
    "soft-t2": ("soft targets, T = 2", soft(2)),
}  # fmt: skip
"""Of nano_guide.yaml and of tiny.yaml: what a variant is, and what it overrides. The most informative first."""
ON_A_GPU_ONLY = ("soft-t1", "soft-t4", "soft-t2")
"""More than the five hours on two cores hold: fewer arms rather than fewer seeds."""
NANO_VARIANTS = {name: variant for name, variant in VARIANTS.items() if name not in ON_A_GPU_ONLY}


_ARMS = [
    *(Arm(f"nano-{name}", says, NANO, own) for name, (says, own) in NANO_VARIANTS.items()),
    Arm("laptop", "hard labels and guidance, convolutional stem, Muon, 20 epochs", LAPTOP, minutes=60, alone=True),
    Arm("teacher", "ResNet-18 at 128 px, which teaches the students below", TEACHER, minutes=2),
    Arm("flagship", "hard labels and guidance, convolutional stem, 300 epochs", TINY, minutes=12),
    Arm(
        "flagship-muon",
        "the flagship with Muon in place of AdamW",
        TINY,
        ("optim.name=nmuon", "optim.lr=3.0e-3", "optim.momentum=0.95"),
        minutes=13,
    ),
    Arm("flagship-control", "the same student without a teacher", TINY, UNTAUGHT, minutes=9),
    Arm(
        "flagship-long",
        f"hard labels and guidance, convolutional stem, {LONG_EPOCHS} epochs",
        TINY,
        tiny_for(LONG_EPOCHS),
        minutes=32,
    ),
    *(
        Arm(f"tiny-{name}", says, TINY, (*tiny_for(GRID_EPOCHS), *own), minutes=5)
        for name, (says, own) in VARIANTS.items()
    ),
]
ARMS = {arm.name: arm for arm in _ARMS}
SEEDS = (0, 1, 2)

CAMPAIGNS: dict[str, tuple[tuple[str, tuple[int, ...]], ...]] = {
    "cpu": (*((f"nano-{name}", SEEDS) for name in NANO_VARIANTS), ("laptop", (0,))),
    "gpu": (
        ("flagship", (0,)),  # trains the teacher before
        ("flagship-control", (0,)),
        ("flagship-muon", (0,)),
        *((f"tiny-{name}", SEEDS) for name in VARIANTS),
        ("flagship-long", (0,)),
        ("flagship", (1, 2)),
        ("flagship-control", (1, 2)),
    ),
}
"""Arms and their seeds, the most informative first."""


def cells(campaign: str) -> list[tuple[Arm, int]]:
    return [(ARMS[name], seed) for name, seeds in CAMPAIGNS[campaign] for seed in seeds]


def all_cells() -> list[tuple[Arm, int]]:
    """Of all campaigns, and the teacher, which comes with its students."""
    return [*cells("cpu"), (ARMS["teacher"], 0), *cells("gpu")]


def seeds_of(name: str) -> list[int]:
    """That an arm is to have."""
    return sorted(seed for arm, seed in all_cells() if arm.name == name)


def identity(recipe: Recipe) -> str:
    """The same for two recipes that learn the same: wherever data and weights lie, whatever runs beside them, and
    whichever precision the machine resolves theirs to.
    """
    weights = {key for key in recipe.flat() if key.startswith("teacher") and key.endswith(".weights")}
    return recipe.digest(OPERATIONAL_KEYS | {"control", "train.precision"} | weights)


def _rows(size: str, *names: tuple[str, str | None]) -> tuple[tuple[str, str | None], ...]:
    return tuple((f"{size}-{name}", against and f"{size}-{against}") for name, against in names)


def _method(size: str) -> Block:
    soft_targets = [f"soft-t{temperature}" for temperature in (1, 2, 3, 4)]
    rows = _rows(
        size, ("control", None), *((name, "control") for name in soft_targets if f"{size}-{name}" in ARMS),
        ("hard", "control"), ("guide", "control"), ("hard-guide", "control"), ("hard-guide", "guide"),
        ("no-token", "hard-guide"),
    )  # fmt: skip
    goal = Goal(
        "distilled minus control: at least 1 point, p below 0.01",
        f"{size}-hard-guide", against=f"{size}-control", points=1.0, p=0.01,
    )  # fmt: skip
    return Block(f"{size}-methods", rows, (goal,))


def _attention(size: str) -> Block:
    names = ("hard-guide", "area-3", "area-4", "area-2x2", "mean")
    return Block(f"{size}-attention", _rows(size, ("plain", None), *((name, "plain") for name in names)))


def _both(size: str) -> Block:
    return Block(
        f"{size}-both",
        _rows(
            size, ("plain-control", None), ("control", "plain-control"), ("plain", "plain-control"),
            ("hard-guide", "control"), ("hard-guide", "plain"),
        ),
    )  # fmt: skip


QUESTIONS = (
    Question(
        "Does distillation help?",
        "Each method against the same student, on the same batches from the same weights, without a teacher; the "
        "distillation token against none.",
        (_method("nano"), _method("tiny")),
    ),
    Question(
        "Does area attention help?",
        "The first two blocks, under the same teaching; all else, initialisation, weight decay, drop path and the "
        "students' inputs, is the same.",
        (_attention("nano"), _attention("tiny")),
    ),
    Question(
        "Both together",
        "Area attention and distillation, each alone and both.",
        (_both("nano"), _both("tiny")),
    ),
    Question(
        "How good can it get?",
        "ViT-Tiny on 4x4 patches at 32 px, and the CNN that it learns from.",
        (
            Block(
                "flagship",
                (
                    ("teacher", None), ("flagship-control", None), ("flagship", "flagship-control"),
                    ("flagship-muon", "flagship"), ("flagship-long", "flagship-control"),
                ),
                (
                    Goal("teacher: 96 % in 2 minutes", "teacher", top1=96.0, minutes=2),
                    Goal("student: 96 % in 10 minutes", "flagship", top1=96.0, minutes=10),
                    Goal("student: 97 % in 30 minutes", "flagship-long", top1=97.0, minutes=30),
                    Goal("student above its teacher", "flagship-long", against="teacher", p=0.05),
                ),
            ),
        ),
    ),
    Question(
        "What does a laptop get?",
        "The best student that two CPU cores train in one hour.",
        (
            Block(
                "laptop",
                (("laptop", None),),
                (
                    Goal("80 % in one hour", "laptop", top1=80.0, minutes=60),
                    Goal("student above its teacher", "laptop", against="teacher", p=0.05),
                ),
            ),
        ),
    ),
)  # fmt: skip
