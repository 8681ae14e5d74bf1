"""Sections and keys of recipes: types, ranges, defaults and help."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from typing import Annotated, Any, ClassVar, Literal

import yaml
from pydantic import AfterValidator, Discriminator, Field, PlainSerializer, Tag

from distill.options import (
    Interpolation,
    Key,
    MethodOptions,
    Options,
    Positive,
    Probability,
    Problem,
    Section,
    Side,
    SourceOptions,
    StudentOptions,
    Text,
    WeightSchedule,
)
from distill.recipe.augment import Augment
from distill.recipe.evaluation import Evaluation
from distill.recipe.images import MAX_PIXELS, rgb
from distill.recipe.views import View

MAY_CHANGE: dict[str, Any] = {"may_change": True}
"""Marks a field that may change on resume, or between a teacher's training and its reuse: it does not change what is
trained, except for rounding, drop path draws and, with gradient_accumulation, batch norms and losses that compare
samples of a micro-batch.
"""

ADDED_LATER = re.compile(r"student\.init|distill\.\d+\.projection")
"""Dotted keys that are no part of digests while they are null: older runs are found by the digests they have."""

FROM_PYTHON = "python"
"""`data.name` and `teacher.model` of objects given in Python."""


def _colour(value: str | list[int]) -> str | list[int]:
    rgb(value)
    return value


Colour = Annotated[Text | list[int], AfterValidator(_colour)]


def _weights_shape(value: Any) -> str:
    return "list" if isinstance(value, list) else "word"


ClassWeights = Annotated[
    Annotated[Literal["balanced"], Tag("word")] | Annotated[list[Positive], Field(min_length=2), Tag("list")],
    Discriminator(_weights_shape),
]


class Growth(Section):
    start: Side = Field(16, description="Side in pixels of the student's training images at first.")
    until: Annotated[Probability, Field(gt=0.0)] = Field(
        0.5, description="Fraction of the run after which they have `resolution`."
    )


class Data(Options):
    """The data section; base of the options of a dataset reader that has keys of its own."""

    names: ClassVar[Sequence[str]] = ()
    """Values of `name` for this reader; `hfds/` is a prefix, `.safetensors` a suffix."""
    in_order: ClassVar[bool] = False
    """Whether training images come in the order of a reader, without random access and before labels are known."""
    name: Text = Field(
        "cifar10",
        description="A small torchvision set (cifar10, cifar100, mnist, ...), digits, folder, a packed "
        "NAME.safetensors, a table NAME.csv of files, a timm dataset name (hfds/..., wds/...), or python: what "
        "distill.train gets as data=.",
    )
    root: Text = Field("data", description="Folder of the data and of downloads.", json_schema_extra=MAY_CHANGE)
    cache: Text | None = Field(
        None,
        description="Folder for packed images; null: $DISTILL_CACHE, else distill in $XDG_CACHE_HOME or ~/.cache.",
        json_schema_extra=MAY_CHANGE,
    )
    validation: float = Field(
        0.1,
        ge=0,
        description="Fraction (below 1) or count of the training set held out, stratified and seeded; 0: none. Not "
        "used for data with a validation split.",
    )
    test: float | None = Field(
        None,
        gt=0,
        description="Fraction (below 1) or count of the images held out for the test, stratified, before validation; "
        "for data without a test split, such as a folder DIR/CLASS/*.",
    )
    test_seed: int = Field(
        0,
        ge=0,
        lt=2**31,
        description="Seed of what `test` holds out; not the run's seed, so that runs of several seeds have one test "
        "set.",
    )
    unlabelled: Text | None = Field(
        None,
        description="Further training images without labels, for methods alone: a folder, at any depth, or a "
        "NAME.safetensors with a uint8 tensor `images` [N, C, H, W].",
    )
    labelled: float | None = Field(
        None,
        gt=0,
        description="Fraction (below 1) or count of the training images that keep their label, stratified, after "
        "validation; the others are without labels, as in `unlabelled`. null: all.",
    )
    labelled_seed: int = Field(
        0, ge=0, lt=2**31, description="Seed of which labels `labelled` keeps; not the run's seed."
    )
    unlabelled_share: float | None = Field(
        None,
        ge=0,
        lt=1,
        description="Share of each batch without labels; null: that of the training images; 0: they are left out, and "
        "an epoch has as many steps as with them.",
    )
    class_weights: ClassWeights | None = Field(
        None,
        description="Weights in the label loss and in methods on logits that take each image by itself: one for each "
        "class, in their order, or 'balanced', the inverse of its number of training images. null: all the same.",
    )
    sampler: Literal["balanced"] | None = Field(
        None,
        description="'balanced': an epoch draws each class equally often, as many images as there are, so those of "
        "rare classes many times; null: each image once.",
    )
    long_tail: float | None = Field(
        None,
        gt=1,
        description="For experiments: keep ever fewer training images from the first class to the last, which has this "
        "many times fewer than the first; after validation and test, which stay whole. null: keep all.",
    )
    image_column: Text | None = Field(
        None,
        description="Column of the images in a Hugging Face set or a .csv file, feature in tfds/, ending in wds/; "
        "null: found by its type or name.",
    )
    label_column: Text | None = Field(None, description="Column of the labels, likewise.")
    select_on: Literal["validation", "test"] = Field(
        "validation",
        description="Split for selecting checkpoints. 'test' makes test figures optimistic; the report says so.",
    )
    resolution: Side = Field(32, description="The student's input size in pixels.")
    growth: Growth | None = Field(
        None,
        description="Growing resolution: the student trains on smaller images at first, which costs less. Its teacher "
        "and all evaluation have those of `resolution`. null: none.",
    )
    fit: Literal["crop", "squash", "pad"] = Field(
        "crop",
        description="How image files become squares of `resolution`: crop: shorter side resized, centre cropped; "
        "squash: resized as a whole; pad: longer side resized, the rest filled with `background`.",
    )
    stream: bool | None = Field(
        None,
        description="Decode images in workers instead of holding them in memory; null: only if they are too large.",
    )
    workers: int | None = Field(
        None,
        ge=0,
        le=1024,
        description="Decoding workers per process of a stream; null: cores over local processes. They need /dev/shm.",
        json_schema_extra=MAY_CHANGE,
    )
    channels: Literal[1, 3] | None = Field(
        None,
        description="1: decode images as greyscale, 3: as RGB; null: as greyscale if all training images are.",
    )
    background: Colour = Field(
        "white", description="Under the transparent pixels of images: a CSS colour, or [red, green, blue] in 0 to 255."
    )
    max_pixels: int = Field(
        MAX_PIXELS,
        gt=0,
        description="Largest width x height of an image file; also of all that a process decodes at the same time.",
        json_schema_extra=MAY_CHANGE,
    )
    skip_unreadable: bool = Field(
        False,
        description="Skip and count unreadable files of an image folder; false: such files are errors.",
    )
    augment: Augment = Field(Augment(), description="Augmentation of the training images.")
    views: Annotated[list[View], Field(min_length=1)] | None = Field(
        None,
        description="Several crops of each training image, global ones first, as in DINO (multi-crop); in place of "
        "`augment`. Only methods that compare views get more than the first. null: the views of `augment`.",
    )

    @property
    def view_sizes(self) -> list[int]:
        """Side in pixels of each view that `views` names."""
        return [group.size for group in self.views or () for _ in range(group.count)]

    @property
    def global_views(self) -> int:
        """Number of global views that `views` names, the first ones."""
        return sum(group.count for group in self.views or () if group.kind == "global")


class AverageTeacher(Section):
    """`teacher.ema`: the student's own moving average."""

    momentum: float = Field(
        0.996, ge=0.0, le=1.0, description="At the first step; 0.996 is for batches of 1,024 images, 0.9995 for 256."
    )
    momentum_end: float = Field(1.0, ge=0.0, le=1.0, description="At the end of the run; a cosine leads to it.")


class Teacher(Section):
    model: Text | None = Field(
        None,
        description="A name in teachers/zoo.yaml, any timm name, hf_hub:NAME, torchvision/NAME, local-dir:PATH, or "
        "python: what distill.train gets as teacher=.",
    )
    recipe: Text | None = Field(
        None,
        description="A recipe that trains this teacher first; trained once, then found by its hash.",
    )
    weights: Text | None = Field(None, description="Local weights file; null: the model's own, downloaded.")
    min_accuracy: Probability | None = Field(
        None,
        description="Preflight: stop before training if the teacher's accuracy (0 to 1) is lower; null: well above "
        "chance.",
    )
    weight: float = Field(1.0, gt=0, description="Weight of this teacher in an ensemble, relative to the others.")
    mean: list[float] | None = Field(None, description="Channel means of its inputs in [0, 1]; null: the model's own.")
    std: list[float] | None = Field(
        None, description="Channel standard deviations of its inputs; null: the model's own."
    )
    size: Side | None = Field(None, description="Input size in pixels; null: the model's own.")
    interpolation: Interpolation | None = Field(
        None, description="Interpolation of the resize to its size; null: the model's own."
    )
    classes: list[Text] | dict[str, Annotated[int, Field(ge=0)] | Text] | None = Field(
        None,
        description="The order of its outputs: the data's classes in that order, or {class: index or name of its "
        "output} for those that differ; null: by the names in its folder, else the data's order.",
    )
    cache: bool = Field(
        False,
        description="Store its logits (float16, under runs/teacher-cache) and train with the stored ones; in an "
        "ensemble the same for all.",
    )
    ema: AverageTeacher | None = Field(
        None,
        description="The student's own moving average as a teacher, alone or beside a model or recipe, for methods "
        "such as dino; {} has the published momentum. Evaluated and exported as the weights 'ema'.",
    )

    @property
    def is_frozen(self) -> bool:
        """Whether there is a frozen network, beside the moving average or alone."""
        return self.ema is None or self.model is not None or self.recipe is not None


class Pretrain(Section):
    recipe: Text | None = Field(
        None,
        description="A recipe that trains the student's initial weights first, for example without labels; trained "
        "once, then found by its hash. Heads, and tokens that it has not, are new.",
    )


class Optim(Section):
    name: Text = Field(
        "adamw",
        description="Optimizer, by timm's factory name; muon leaves all but the hidden matrices and kernels to AdamW, "
        "nmuon to NAdamW.",
    )
    lr: float = Field(1.0e-3, gt=0.0, description="Peak learning rate, not scaled by the batch size.")
    min_lr: float = Field(0.0, ge=0.0, description="Learning rate at the end of the schedule.")
    weight_decay: float = Field(
        0.05, ge=0.0, description="Of matrices and kernels; biases, norms, tokens and positions have none."
    )
    weight_decay_end: float | None = Field(
        None, ge=0.0, description="Weight decay at the end of the run, to which a cosine leads; null: it is constant."
    )
    momentum: float = Field(0.9, ge=0.0, lt=1.0, description="For optimizers that have one; 0.95 for Muon.")
    warmup_epochs: float = Field(10.0, ge=0.0, description="Epochs of linear warm-up from 0.")
    schedule: Literal["cosine", "constant"] = Field(
        "cosine", description="Shape of the learning rate after the warm-up."
    )
    clip_grad: float | None = Field(1.0, gt=0.0, description="Largest gradient norm; null: no clipping.")
    clip_mode: Literal["global", "tensor"] = Field(
        "global", description="The norm that clip_grad limits: of all gradients together, or of each parameter's."
    )
    layer_decay: float | None = Field(
        None, gt=0.0, le=1.0, description="Factor on the learning rate per layer below the head; null: none."
    )


def _whole(number: float) -> float:
    """An int where it is whole, so that 2.0 and 2 are the same recipe."""
    return int(number) if number == int(number) else number


class Train(Section):
    epochs: Annotated[float, Field(gt=0), AfterValidator(_whole), PlainSerializer(_whole, int | float)] = Field(
        300, description="Passes over the training set; 2.5: two and a half."
    )
    batch_size: int = Field(1024, gt=0, description="Global batch size, over all processes.")
    gradient_accumulation: int = Field(
        1,
        gt=0,
        description="Micro-batches per step; the global batch size does not change.",
        json_schema_extra=MAY_CHANGE,
    )
    gradient_checkpointing: bool = Field(
        False, description="Recompute activations in the backward pass to save memory.", json_schema_extra=MAY_CHANGE
    )
    precision: Literal["fp32", "bf16", "fp16"] | None = Field(
        None, description="Of training; null: what accelerate was launched with. On a CPU without bf16, fp32."
    )
    ema: float | None = Field(None, gt=0.0, lt=1.0, description="Decay of the weights' moving average; null: none.")
    compile: Literal["auto"] | bool = Field(
        "auto",
        description="torch.compile the student and its teacher, on CUDA into CUDA graphs; auto: on CUDA, "
        "where Triton, a C compiler and Python's headers are.",
    )
    threads: int | None = Field(
        None,
        gt=0,
        description="CPU threads of each process; null: the cores that are free at the start, or OMP_NUM_THREADS where "
        "no launcher set it. A resumed run keeps its number.",
        json_schema_extra=MAY_CHANGE,
    )
    deterministic: bool = Field(
        False, description="Bit-for-bit reproducible results on a GPU, at some cost; on a CPU they always are."
    )
    label_smoothing: float = Field(0.1, ge=0.0, lt=1.0, description="Of the label loss.")
    max_steps: int | None = Field(
        None, gt=0, description="Finish the run after this many steps; the schedule does not change."
    )
    max_bad_steps: int = Field(
        10,
        gt=0,
        description="Fail after this many non-finite steps in a row; their updates are skipped.",
        json_schema_extra=MAY_CHANGE,
    )
    max_minutes: float | None = Field(
        None,
        gt=0.0,
        description="Save a checkpoint and stop after this many minutes of this launch.",
        json_schema_extra=MAY_CHANGE,
    )
    evaluate_every: int | None = Field(
        None, gt=0, description="Epochs between evaluations on the validation split; null: every epoch."
    )
    select: Literal["top1", "macro"] = Field(
        "top1",
        description="What weights are selected by: accuracy, or macro accuracy, the mean of the accuracies of the "
        "classes. A run without labels is selected by its neighbours.",
    )
    checkpoint_every: int | None = Field(
        None, gt=0, description="Steps between checkpoints; null: every epoch.", json_schema_extra=MAY_CHANGE
    )
    keep_checkpoints: int = Field(
        2, gt=0, description="Number of newest checkpoints to keep, besides the best one.", json_schema_extra=MAY_CHANGE
    )
    log_every: int = Field(
        50,
        gt=0,
        description="Steps between lines of metrics; an epoch has one at least.",
        json_schema_extra=MAY_CHANGE,
    )
    log_gradient_share: bool = Field(
        False,
        description="Also log each loss part's share of the gradient norms, at some cost per line.",
        json_schema_extra=MAY_CHANGE,
    )
    test: bool = Field(
        True,
        description="End with the test images, the control and the report. false: end before them, in the state "
        "'trained', as a trial of `distill sweep` does; `--resume` with true does the rest.",
        json_schema_extra=MAY_CHANGE,
    )
    trackers: list[Literal["tensorboard", "wandb"]] = Field(
        [], description="Also log there, through accelerate.", json_schema_extra=MAY_CHANGE
    )


class Report(Section):
    analysis: Literal["full", "none"] = Field(
        "full",
        description="Measurements of the finished student for its report: costs, corrupted images, attention; none: "
        "what follows from predictions; `distill evaluate` measures the rest later.",
        json_schema_extra=MAY_CHANGE,
    )


class Recipe(Section):
    """The recipe; `recipe_model` adds the options of known variants."""

    base: Text | None = Field(
        None,
        exclude=True,  # already merged in a loaded recipe
        description="A recipe that this one changes, relative to this file: mappings are merged, all else is replaced.",
    )
    name: str = Field(
        "",
        max_length=100,
        pattern=r"^[A-Za-z0-9._-]*$",
        description="Name of the run; empty: the recipe's file name.",
        json_schema_extra=MAY_CHANGE,
    )
    seed: int = Field(0, ge=0, lt=2**31, description="Seed of weights, order, augmentation and drop path.")
    data: Data = Field(Data(), description="The dataset and its augmentation.")
    teacher: Teacher | list[Teacher] | SourceOptions | None = Field(
        None, description="One teacher, a list of them (an ensemble), another teacher source, or null."
    )
    pretrain: Pretrain | None = Field(None, description="An earlier training of the student; null: none.")
    student: StudentOptions = Field(StudentOptions(), description="The model to train.")
    label_weight: float | None = Field(
        None,
        ge=0.0,
        description="Weight of the label loss; null: 0.5 with a method on logits, else 1, for the mean over the heads.",
    )
    distill: list[MethodOptions] = Field(
        [], description="Distillation losses, added up with their weights; []: plain training."
    )
    optim: Optim = Field(Optim(), description="Optimizer and learning rate.")
    train: Train = Field(Train(), description="The training loop.")
    evaluation: Evaluation = Field(
        Evaluation(), description="Evaluation of the student's features, where the recipe asks for it."
    )
    report: Report = Field(Report(), description="The report of a finished run.")
    control: bool = Field(
        False, description="Also train the same student without the teacher, same seed, for the report."
    )

    @property
    def teachers(self) -> list[Teacher]:
        """The frozen teachers as a list, which may be empty."""
        if isinstance(self.teacher, list):
            return self.teacher
        return [self.teacher] if isinstance(self.teacher, Teacher) and self.teacher.is_frozen else []

    @property
    def average_teacher(self) -> AverageTeacher | None:
        """The student's own moving average, if it is a teacher."""
        return self.teacher.ema if isinstance(self.teacher, Teacher) else None

    @property
    def source(self) -> SourceOptions | None:
        """The teacher source, if it is no frozen network."""
        return self.teacher if isinstance(self.teacher, SourceOptions) else None

    def replace(self, **sections: Any) -> Recipe:
        """A copy with some top-level values replaced (already validated ones)."""
        return self.model_copy(update=sections)

    def to_yaml(self) -> str:
        """The whole recipe, every key explicit, as YAML that loads back to an equal recipe."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)

    def digest(self, ignore: Iterable[str] = ()) -> str:
        """SHA-256 (hex) of the recipe's content without the dotted keys in `ignore`."""
        ignored = set(ignore)
        flat = {
            key: value
            for key, value in self.flat().items()
            if key not in ignored and not (value is None and ADDED_LATER.fullmatch(key))
        }
        return hashlib.sha256(json.dumps(flat, sort_keys=True).encode()).hexdigest()

    def loss_weights(self, progress: float) -> dict[str, float]:
        """Weight of each loss part at `progress`, 0 to 1, of the run, without methods that have ended."""
        assert self.label_weight is not None, "a loaded recipe has it resolved"
        return {"label": self.label_weight} | {
            objective.method: objective.weight_at(progress)
            for objective in self.distill
            if not objective.has_ended(progress)
        }

    def training_side(self, progress: float) -> int | None:
        """Side in pixels that the student's images are resized to at `progress`, 0 to 1, of the run; None: its own."""
        growth = self.data.growth
        return growth.start if growth is not None and progress < growth.until else None

    @property
    def label_free(self) -> bool:
        """Whether nothing trains a classifier: no label loss, and no method on logits. The student then has no head."""
        return self.label_weight == 0 and not any(section.needs.logits for section in self.distill)

    @property
    def other_sides(self) -> dict[int, Key]:
        """Sides in pixels, besides `data.resolution`, of images that the student trains on, and the key of each."""
        sides: dict[int, Key] = {}
        if self.data.growth is not None:
            sides[self.data.growth.start] = ("data", "growth", "start")
        for index, group in enumerate(self.data.views or ()):
            if group.size != self.data.resolution:
                sides.setdefault(group.size, ("data", "views", index, "size"))
        return sides

    @property
    def scheduled(self) -> list[str]:
        """The parts of the loss whose weight changes over the run."""
        return [objective.method for objective in self.distill if isinstance(objective.weight, WeightSchedule)]

    def untaught_head(self) -> Problem | None:
        """What is wrong where the labels teach the first of two heads, and no method with any weight the other."""
        on_logits = {index: section for index, section in enumerate(self.distill) if section.needs.logits}
        if not on_logits or self.label_weight == 0 or any(section.mean_weight for section in on_logits.values()):
            return None
        return Problem(
            tuple(("distill", index, "weight") for index in on_logits),
            "always 0: the distillation head would not be trained, though the prediction is the mean of both; leave "
            "the method out",
        )

    def untaught_heads(self, number: int) -> Problem | None:
        """What is wrong where methods on logits are given, and nothing with any weight teaches one of the student's
        `number` heads: labels teach the first, these methods the last.
        """
        if number > 1 and (problem := self.untaught_head()) is not None:
            return problem
        on_logits = [section for section in self.distill if section.needs.logits]
        taught = any(section.mean_weight for section in on_logits)
        if not on_logits or self.label_weight or (taught and number == 1):
            return None
        which = (
            "the class head would not be trained, though the prediction is the mean of both"
            if taught
            else ("nothing would train the prediction")
        )
        return Problem(
            (("label_weight",),), f"0: {which}; give the labels a weight" + (", or take a student of one head" * taught)
        )

    def as_control(self) -> Recipe:
        """The recipe without teacher; its label loss, a mean over heads, has the weight of all losses on heads."""
        assert self.label_weight is not None, "a loaded recipe has it resolved"
        on_heads = [objective.mean_weight for objective in self.distill if objective.needs.logits]
        weight = self.label_weight + sum(on_heads)
        return self.replace(name=f"{self.name}-control", teacher=None, distill=[], label_weight=weight, control=False)

    def flat(self) -> dict[str, Any]:
        """Every leaf under its dotted path, for comparing two recipes."""
        return dict(_leaves(self.model_dump(mode="json"), ""))


def _keys_that_may_change(section: type[Section], prefix: str = "") -> Iterable[str]:
    for name, field in section.model_fields.items():
        if field.json_schema_extra == MAY_CHANGE:
            yield prefix + name
        elif isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            yield from _keys_that_may_change(field.annotation, f"{prefix}{name}.")


OPERATIONAL_KEYS = frozenset(_keys_that_may_change(Recipe))
"""Dotted keys of the fields marked `MAY_CHANGE`."""


def _leaves(node: Any, prefix: str) -> Iterable[tuple[str, Any]]:
    if isinstance(node, dict) and node:
        for key, value in node.items():
            yield from _leaves(value, f"{prefix}.{key}" if prefix else key)
    elif isinstance(node, list) and any(isinstance(value, dict) for value in node):
        for index, value in enumerate(node):
            yield from _leaves(value, f"{prefix}.{index}")
    else:
        yield prefix, node
