"""Checks of combinations of values in a recipe."""

from __future__ import annotations

import difflib
from collections.abc import Iterator

from distill.options import Key, Problem
from distill.recipe import imbalance, views
from distill.recipe.installed import own_students, timm_models
from distill.recipe.schema import Recipe, Teacher


def impossible_combinations(recipe: Recipe) -> list[Problem]:
    """All problems, in the order of the recipe's keys; variants' options check their own."""
    student, start = _student(recipe), _start(recipe)
    return [*_data(recipe), *_teacher(recipe), *start, *student, *_losses(recipe), *_train(recipe)]


def _data(recipe: Recipe) -> Iterator[Problem]:
    data = recipe.data
    yield from data.check(recipe, ("data",))
    for key, amount in (("validation", data.validation), ("test", data.test or 0), ("labelled", data.labelled or 0)):
        if amount >= 1 and amount != int(amount):
            yield Problem((("data", key),), f"a share below 1 or a whole count, got {amount}")
    yield from _unlabelled(recipe)
    yield from imbalance.check(recipe)
    if data.growth is not None and data.growth.start >= data.resolution:
        yield Problem(
            (("data", "growth", "start"), ("data", "resolution")),
            f"images grow: smaller than data.resolution {data.resolution}, got {data.growth.start}",
        )
    if data.select_on == "test" and data.validation:
        yield Problem(
            (("data", "select_on"), ("data", "validation")),
            "selection on the test set does not use a validation split; set data.validation to 0",
        )
    crop = data.augment.random_resized_crop
    if crop is not None:
        for key, (low, high) in (("scale", crop.scale), ("ratio", crop.ratio)):
            if not 0 < low <= high:
                path = ("data", "augment", "random_resized_crop", key)
                yield Problem((path,), f"smallest, then largest, both above 0; got [{low}, {high}]")
        if data.augment.crop_padding:
            yield Problem(
                (("data", "augment", "crop_padding"), ("data", "augment", "random_resized_crop")),
                "crop_padding and random_resized_crop exclude each other; set one of them to 0 or null",
            )
    if data.augment.rand_augment is not None and data.augment.trivial_augment:
        yield Problem(
            (("data", "augment", "rand_augment"), ("data", "augment", "trivial_augment")),
            "rand_augment and trivial_augment exclude each other; set one of them to null or false",
        )
    if data.views is not None:
        yield from views.check(data)


def _unlabelled(recipe: Recipe) -> Iterator[Problem]:
    data = recipe.data
    given = [key for key in ("unlabelled", "labelled") if getattr(data, key) is not None]
    if len(given) > 1:
        yield Problem(
            tuple(("data", key) for key in given), "images without labels come from one of the two; set one to null"
        )
    if not given:
        if data.unlabelled_share is not None:
            yield Problem(
                (("data", "unlabelled_share"), ("data", "unlabelled"), ("data", "labelled")),
                "no images are without labels; give data.unlabelled or data.labelled, or set it to null",
            )
        return
    for index, teacher in enumerate(recipe.teachers):
        if teacher.cache:
            path: Key = ("teacher", index) if isinstance(recipe.teacher, list) else ("teacher",)
            yield Problem(
                ((*path, "cache"), ("data", given[0])),
                f"logits are stored for labelled images only; set it to false, or data.{given[0]} to null",
            )
    for index, method in enumerate(recipe.distill):
        if method.needs.labels and data.unlabelled_share != 0:
            yield Problem(
                (("distill", index), ("data", given[0])),
                f"{method.method} needs the label of each image, and data.{given[0]} brings some without; leave the "
                "method out (soft and hard need no labels), or set data.unlabelled_share to 0",
            )


def _teacher(recipe: Recipe) -> Iterator[Problem]:
    if recipe.source is not None:
        yield from recipe.source.check(recipe, ("teacher",))
    yield from _average_teacher(recipe)
    for index, teacher in enumerate(recipe.teachers):
        path: Key = ("teacher", index) if isinstance(recipe.teacher, list) else ("teacher",)
        named = [given for given in (teacher.model, teacher.recipe) if given is not None]
        if len(named) > 1 or not (named or teacher.ema):
            yield Problem(
                ((*path, "model"), (*path, "recipe"), (*path, "source")),
                "give either a model or a recipe that trains it, and not both",
            )
        if teacher.recipe is not None and teacher.weights is not None:
            yield Problem(
                ((*path, "weights"), (*path, "recipe")),
                "a teacher that a recipe trains has its own weights; leave this out",
            )
        if teacher.mean is not None and teacher.std is not None and len(teacher.mean) != len(teacher.std):
            yield Problem(((*path, "mean"), (*path, "std")), "mean and std differ in their number of channels")
        if teacher.std is not None and min(teacher.std, default=0.0) <= 0:
            yield Problem(((*path, "std"),), "deviations are above 0")
        if teacher.cache and not recipe.distill:
            yield Problem(((*path, "cache"), ("distill",)), "without distillation there is nothing to store")
        if teacher.cache != recipe.teachers[0].cache:
            yield Problem(((*path, "cache"),), "the logits of an ensemble are stored as a whole: the same for all")


def _student(recipe: Recipe) -> Iterator[Problem]:
    student = recipe.student
    problems = list(student.check(recipe, ("student",)))
    if problems and student.model not in {*own_students(), *timm_models()}:  # one mistyped name, not each of its keys
        meant = difflib.get_close_matches(student.model, own_students(), n=1)
        if meant:
            message = f"nothing is called '{student.model}'; did you mean '{meant[0]}'?"
            problems = [Problem((("student", "model"),), message)]
    yield from problems


def _start(recipe: Recipe) -> Iterator[Problem]:
    if recipe.pretrain is not None and recipe.pretrain.recipe is None:
        yield Problem((("pretrain", "recipe"),), "name the recipe that trains it first, or set pretrain to null")
    starts = [key for key in ("pretrained", "weights", "init") if getattr(recipe.student, key, None)]
    if recipe.pretrain is not None and starts:
        yield Problem(
            (("pretrain",), ("student", starts[0])),
            f"the student starts from the weights of this recipe, or from student.{starts[0]}; leave one of them out",
        )


def _average_teacher(recipe: Recipe) -> Iterator[Problem]:
    at: Key = ("teacher", "ema")
    if isinstance(recipe.teacher, list):
        for index, teacher in enumerate(recipe.teacher):
            if teacher.ema is not None:
                yield Problem((("teacher", index, "ema"),), "goes beside a single teacher, which is no list")
    users = [section for section in recipe.distill if section.needs.average]
    if recipe.average_teacher is None:
        for index, section in enumerate(recipe.distill):
            if section.needs.average and not isinstance(recipe.teacher, list):
                needed = f"{section.method} learns from the student's own moving average"
                yield Problem((("distill", index), at), f"{needed}; set teacher.ema to {{}}")
        return
    others = [index for index, section in enumerate(recipe.distill) if section.needs.logits or section.needs.maps]
    if not users and (recipe.teachers or not others):
        yield Problem((at, ("distill",)), "no method of 'distill' learns from it, such as dino; leave it out")
    if recipe.train.ema is not None:
        yield Problem((("train", "ema"), at), "teacher.ema is the moving average that is evaluated; set this to null")
    if recipe.teachers:
        return
    assert isinstance(recipe.teacher, Teacher)
    for key in sorted(recipe.teacher.model_fields_set - {"ema", "model", "recipe"}):
        if getattr(recipe.teacher, key) != Teacher.model_fields[key].default:
            yield Problem((("teacher", key),), "is of a frozen teacher; name its model, or leave this out")
    for index in others:
        section = recipe.distill[index]
        what = "logits" if section.needs.logits else "feature maps"
        yield Problem(
            (("distill", index), ("teacher", "model")),
            f"{section.method} learns from {what} of a frozen teacher, and teacher.ema has none; name a model too",
        )


def _losses(recipe: Recipe) -> Iterator[Problem]:
    if recipe.teacher is None and not all(objective.needs.average for objective in recipe.distill):
        yield Problem(
            (("distill",), ("teacher",)), "distillation needs a teacher; name one under 'teacher' or set distill to []"
        )
    methods = [objective.method for objective in recipe.distill]
    if len(set(methods)) != len(methods):
        yield Problem((("distill",),), f"each method at most once, got {methods}")
    if recipe.label_weight == 0 and not any(objective.mean_weight for objective in recipe.distill):
        yield Problem((("label_weight",), ("distill",)), "all weights of the loss are 0: nothing would be learned")
    if recipe.control and recipe.label_free:
        yield Problem(
            (("control",), ("label_weight",)),
            "without labels and without the teacher nothing would be learned; launch a supervised run of its own, and "
            "compare both with `distill compare`",
        )
    elif recipe.control and not recipe.distill:
        yield Problem((("control",), ("distill",)), "a control of plain training would be the same run again")
    for index, objective in enumerate(recipe.distill):
        yield from objective.check(recipe, ("distill", index))


def _train(recipe: Recipe) -> Iterator[Problem]:
    train = recipe.train
    augment = recipe.data.augment
    mixed = bool(augment.mixup or augment.cutmix)
    share = train.gradient_accumulation * (2 if mixed else 1)
    if train.batch_size % share:
        why = f"{train.gradient_accumulation} micro-batches" + (
            " of pairs (mixup and cutmix mix two by two)" if mixed else ""
        )
        yield Problem(
            (("train", "batch_size"), ("train", "gradient_accumulation"), ("data", "augment")),
            f"{train.batch_size} does not divide into {why}",
        )
    if recipe.optim.min_lr > recipe.optim.lr:
        yield Problem((("optim", "min_lr"), ("optim", "lr")), f"above the peak learning rate {recipe.optim.lr}")
