"""Values that are fine alone and impossible together."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

from distill.recipe.objectives import OnMaps
from distill.recipe.sizes import DEFAULT_PATCH_SIZE, VIT_SIZES

if TYPE_CHECKING:
    from distill.recipe.schema import Recipe

MOST_PATCHES_A_SIDE = 256


class Combination(NamedTuple):
    keys: tuple[tuple[str | int, ...], ...]
    """The recipe paths involved; the problem is reported under the first."""
    message: str


def impossible_combinations(recipe: Recipe) -> list[Combination]:
    """All of them, in the order of the recipe's keys."""
    return [*_data(recipe), *_teacher(recipe), *_student(recipe), *_losses(recipe), *_train(recipe)]


def _data(recipe: Recipe) -> Iterator[Combination]:
    data = recipe.data
    if data.validation >= 1 and data.validation != int(data.validation):
        yield Combination((("data", "validation"),), f"a share below 1 or a whole count, got {data.validation}")
    if data.select_on == "test" and data.validation:
        yield Combination(
            (("data", "select_on"), ("data", "validation")),
            "choosing on the test set leaves nothing for data.validation to do; set data.validation to 0",
        )
    crop = data.augment.random_resized_crop
    if crop is not None:
        for key, (low, high) in (("scale", crop.scale), ("ratio", crop.ratio)):
            if not 0 < low <= high:
                path = ("data", "augment", "random_resized_crop", key)
                yield Combination((path,), f"smallest, then largest, both above 0; got [{low}, {high}]")
        if data.augment.crop_padding:
            yield Combination(
                (("data", "augment", "crop_padding"), ("data", "augment", "random_resized_crop")),
                "crop_padding and random_resized_crop exclude each other; set one of them to 0 or null",
            )
    if data.augment.rand_augment is not None and data.augment.trivial_augment:
        yield Combination(
            (("data", "augment", "rand_augment"), ("data", "augment", "trivial_augment")),
            "rand_augment and trivial_augment exclude each other; set one of them to null or false",
        )


def _teacher(recipe: Recipe) -> Iterator[Combination]:
    for index, teacher in enumerate(recipe.teachers):
        path: tuple[str | int, ...] = ("teacher", index) if isinstance(recipe.teacher, list) else ("teacher",)
        if (teacher.model is None) == (teacher.recipe is None):
            yield Combination(
                ((*path, "model"), (*path, "recipe")), "give either a model or a recipe that trains it, and not both"
            )
        if teacher.recipe is not None and teacher.weights is not None:
            yield Combination(
                ((*path, "weights"), (*path, "recipe")),
                "a teacher that its recipe trains has its own weights; leave this out",
            )
        if teacher.mean is not None and teacher.std is not None and len(teacher.mean) != len(teacher.std):
            yield Combination(((*path, "mean"), (*path, "std")), "mean and std differ in their number of channels")
        if teacher.std is not None and min(teacher.std, default=0.0) <= 0:
            yield Combination(((*path, "std"),), "deviations are above 0")
        if teacher.cache and not recipe.distill:
            yield Combination(((*path, "cache"), ("distill",)), "without distillation there is nothing to store")
        if teacher.cache != recipe.teachers[0].cache:
            yield Combination(((*path, "cache"),), "the logits of an ensemble are stored as a whole: the same for all")


def _student(recipe: Recipe) -> Iterator[Combination]:
    student = recipe.student
    size = VIT_SIZES.get(student.model)
    at = "student"
    if student.pretrained and student.weights is not None:
        yield Combination(
            ((at, "pretrained"), (at, "weights")), "start from timm's weights or from an export, not from both"
        )
    if size is None:
        sizes = ", ".join(VIT_SIZES)
        for key, is_set in (
            ("patch_size", student.patch_size is not None),
            ("stem", student.stem != "patch"),
            ("attention", student.attention.kind != "standard"),
            ("distillation_token", bool(student.distillation_token)),
        ):
            if is_set:
                yield Combination(((at, key), (at, "model")), f"only for {sizes}; '{student.model}' comes as it is")
        return
    patch, resolution = student.patch_size or DEFAULT_PATCH_SIZE, recipe.data.resolution
    involved = ((at, "patch_size"), (at, "model"), ("data", "resolution"))
    grid = resolution // patch if resolution % patch == 0 else None
    if grid is None:
        yield Combination(involved, f"data.resolution {resolution} is not divisible by the patch size {patch}")
    elif grid > MOST_PATCHES_A_SIDE:
        most = MOST_PATCHES_A_SIDE
        yield Combination(involved, f"{grid}x{grid} patches are more than any memory holds; at most {most}x{most}")
    if student.stem == "conv" and patch & (patch - 1):
        yield Combination(
            ((at, "stem"), (at, "patch_size")), f"a conv stem halves the image: the patch size {patch} is no power of 2"
        )
    if student.attention.kind == "area":
        yield from _areas(recipe, size.depth, grid)


def _areas(recipe: Recipe, depth: int, grid: int | None) -> Iterator[Combination]:
    attention = recipe.student.attention
    assert attention.kind == "area"
    at = ("student", "attention")
    if wrong := [block for block in attention.blocks if not 0 <= block < depth]:
        yield Combination(
            ((*at, "blocks"), ("student", "model")), f"{recipe.student.model} has blocks 0 to {depth - 1}, got {wrong}"
        )
    if len(set(attention.blocks)) != len(attention.blocks):
        yield Combination(((*at, "blocks"),), f"a block stands twice in {attention.blocks}")
    if grid is None:
        return
    prefix = 1 if recipe.student.distillation_token is False else 2
    involved = ((*at, "max_area"), ("student", "patch_size"), ("data", "resolution"), ("student", "distillation_token"))
    if isinstance(attention.max_area, list):
        if not all(1 <= side <= grid for side in attention.max_area):
            yield Combination(
                involved, f"[height, width] from 1 to the {grid}x{grid} patch grid, got {attention.max_area}"
            )
    elif not 1 <= attention.max_area <= grid * grid + prefix:
        yield Combination(involved, f"from 1 to the {grid * grid + prefix} tokens, got {attention.max_area}")


def _losses(recipe: Recipe) -> Iterator[Combination]:
    if recipe.distill and not recipe.teachers:
        yield Combination(
            (("distill",), ("teacher",)), "distillation needs a teacher; name one under 'teacher' or set distill to []"
        )
    methods = [objective.method for objective in recipe.distill]
    if len(set(methods)) != len(methods):
        yield Combination((("distill",),), f"each method at most once, got {methods}")
    if recipe.label_weight == 0 and not any(objective.mean_weight for objective in recipe.distill):
        yield Combination((("label_weight",), ("distill",)), "all weights of the loss are 0: nothing would be learned")
    if recipe.control and not recipe.distill:
        yield Combination((("control",), ("distill",)), "a control of plain training would be the same run again")
    for index, objective in enumerate(recipe.distill):
        if isinstance(objective, OnMaps):
            yield from _maps(recipe, objective, ("distill", index))


def _maps(recipe: Recipe, objective: OnMaps, at: tuple[str | int, ...]) -> Iterator[Combination]:
    method = f"{objective.method} learns from feature maps of the teacher"
    if len(recipe.teachers) > 1:
        yield Combination((at, ("teacher",)), f"{method}, and an ensemble has none of its own; name a single teacher")
    elif recipe.teachers and recipe.teachers[0].cache:
        path: tuple[str | int, ...] = ("teacher", 0) if isinstance(recipe.teacher, list) else ("teacher",)
        yield Combination(((*path, "cache"), at), f"{method}, and only logits are stored; set teacher.cache to false")
    depth = VIT_SIZES[recipe.student.model].depth if recipe.student.model in VIT_SIZES else None
    blocks = [pair.block for pair in objective.pairs or () if pair.block is not None]
    if depth is not None and (wrong := [block for block in blocks if block >= depth]):
        yield Combination(
            ((*at, "pairs"), ("student", "model")), f"{recipe.student.model} has blocks 0 to {depth - 1}, got {wrong}"
        )


def _train(recipe: Recipe) -> Iterator[Combination]:
    train = recipe.train
    augment = recipe.data.augment
    mixed = bool(augment.mixup or augment.cutmix)
    share = train.gradient_accumulation * (2 if mixed else 1)
    if train.batch_size % share:
        why = f"{train.gradient_accumulation} micro-batches" + (
            " of pairs (mixup and cutmix mix two by two)" if mixed else ""
        )
        yield Combination(
            (("train", "batch_size"), ("train", "gradient_accumulation"), ("data", "augment")),
            f"{train.batch_size} does not divide into {why}",
        )
    if recipe.optim.min_lr > recipe.optim.lr:
        yield Combination((("optim", "min_lr"), ("optim", "lr")), f"above the peak learning rate {recipe.optim.lr}")
