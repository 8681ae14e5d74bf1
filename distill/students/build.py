"""From a recipe's `student` section to a student."""

from __future__ import annotations

import difflib
import importlib
import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import timm
import torch
from torch import nn

from distill.errors import InputError
from distill.inputs import InputContract
from distill.recipe.sizes import DEFAULT_PATCH_SIZE, VIT_SIZES
from distill.students.saved import read_export
from distill.students.student import Student
from distill.students.weights import create_pretrained, load_saved_weights, load_timm_weights

if TYPE_CHECKING:
    from distill.recipe import Student as Spec


class _Images(NamedTuple):
    """What a student is built for."""

    resolution: int
    num_classes: int
    channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]


class _Built(NamedTuple):
    model: nn.Module
    architecture: str
    model_args: dict[str, Any]
    statistics: tuple[Sequence[float], Sequence[float]]


def build_student(
    spec: Spec,
    *,
    resolution: int,
    num_classes: int,
    channels: int,
    mean: Sequence[float],
    std: Sequence[float],
    seed: int,
) -> Student:
    """A student on the CPU, with weights that depend on `seed` only; torch's random state is left as it was.

    Args:
        spec: the recipe's `student` section.
        resolution: side in pixels that its inputs are resized to.
        channels, mean, std: of the training data, in [0, 1]. Weights from timm or an export bring their own mean and
            std.

    Raises:
        InputError: no such model, or one that cannot take such images, or weights that are missing, foreign or cannot
            be fetched.
    """
    images = _Images(resolution, num_classes, channels, tuple(mean), tuple(std))
    saved = read_export(spec.weights) if spec.weights else None
    with _seeded(seed):
        built = _named_size(spec, images) if spec.model in VIT_SIZES else _timm_model(spec, images)
    mean, std = built.statistics
    if saved is not None:
        load_saved_weights(built.model, saved, str(spec.weights))
        mean, std = saved.config["pretrained_cfg"]["mean"], saved.config["pretrained_cfg"]["std"]
    contract = InputContract(tuple(mean), tuple(std), resolution)
    student = Student(built.model, contract, architecture=built.architecture, model_args=built.model_args)
    if spec.model not in VIT_SIZES:
        _try_out(student, images)
    return student


def register_models() -> None:
    """Make every model of this project known to timm, the CIFAR ResNets among the teachers too."""
    importlib.import_module("distill.students.vit")
    importlib.import_module("teachers.cifar_resnet")


def check_name(name: str, key: str) -> None:
    """InputError under `key`, with the nearest names, unless timm or this project has a model `name` (or name.tag)."""
    register_models()
    architecture, _, tag = name.partition(".")
    if not timm.is_model(architecture):
        near = difflib.get_close_matches(architecture, timm.list_models(), n=3, cutoff=0.5)
        hint = f"; the nearest names are {', '.join(near)}" if near else ""
        raise InputError(f"{key}: timm has no model '{name}'{hint}. `timm.list_models()` lists them all.")
    if tag and name not in (tagged := timm.list_pretrained(f"{architecture}.*")):
        raise InputError(f"{key}: {architecture} has no weights '{tag}', but {', '.join(tagged) or 'none at all'}.")


def _named_size(spec: Spec, images: _Images) -> _Built:
    size = VIT_SIZES[spec.model]
    distilled = spec.distillation_token is not False
    patch_size = spec.patch_size or DEFAULT_PATCH_SIZE
    model_args: dict[str, Any] = {"img_size": images.resolution, "patch_size": patch_size}
    if spec.attention.kind == "standard" and spec.stem == "patch":
        # One of timm's own architectures, so that an export needs nothing but timm; the arguments say all of its size.
        family = spec.model.removeprefix("vit_") if spec.model in ("vit_small", "vit_base") else "tiny"
        architecture = f"deit_{family}_distilled_patch16_224" if distilled else f"vit_{family}_patch16_224"
        model_args |= {"embed_dim": size.width, "depth": size.depth, "num_heads": size.heads}
    else:
        architecture = spec.model
        model_args |= {"distilled": distilled, "stem": spec.stem}
        if spec.attention.kind != "standard":
            architecture = f"{spec.attention.kind}_{spec.model}"
            model_args["attention"] = spec.attention.model_dump(mode="json", exclude={"kind"})
    channels, statistics = _inputs(spec, images)
    register_models()
    model = timm.create_model(
        architecture, num_classes=images.num_classes, in_chans=channels, drop_path_rate=spec.drop_path, **model_args
    )
    if spec.pretrained:
        config = load_timm_weights(
            model, spec.model, resolution=images.resolution, patch_size=patch_size, channels=channels
        )
        statistics = statistics or (config["mean"], config["std"])
    return _Built(model, architecture, model_args, statistics or (images.mean, images.std))


def _timm_model(spec: Spec, images: _Images) -> _Built:
    check_name(spec.model, "student.model")
    if spec.pretrained and not timm.is_model_pretrained(spec.model):
        raise InputError(f"student.pretrained: timm has no weights for {spec.model}; set it to false.")
    channels, statistics = _inputs(spec, images)
    required = {"num_classes": images.num_classes, "in_chans": channels}
    model = timm.create_model(spec.model, **required)
    accepted = {name for cls in type(model).__mro__ for name in inspect.signature(cls).parameters}
    model_args = {"img_size": images.resolution} if "img_size" in accepted else {}
    training_args = {"drop_path_rate": spec.drop_path} if spec.drop_path else {}
    if training_args and "drop_path_rate" not in accepted:
        raise InputError(f"student.drop_path: {spec.model} has no stochastic depth; set it to 0.")
    if spec.pretrained:
        model = create_pretrained(spec.model, **required, **model_args, **training_args)
        statistics = statistics or (model.pretrained_cfg["mean"], model.pretrained_cfg["std"])
    elif model_args or training_args:
        model = timm.create_model(spec.model, **required, **model_args, **training_args)
    return _Built(model, spec.model.partition(".")[0], model_args, statistics or (images.mean, images.std))


def _inputs(spec: Spec, images: _Images) -> tuple[int, tuple[Sequence[float], Sequence[float]] | None]:
    """Channels that the model takes, and their statistics; None: those that the pretrained weights come with.

    Pretrained weights see colour: a greyscale image is repeated for them. Any other number of channels is the data's
    affair.
    """
    if spec.pretrained and images.channels in (1, 3):
        return 3, None
    return images.channels, (images.mean, images.std)


def _try_out(student: Student, images: _Images) -> None:
    """InputError if the model cannot take its inputs: some of timm's are made for one size, or for large ones."""
    blank = torch.zeros(1, images.channels, images.resolution, images.resolution)
    student.eval()
    try:
        with torch.no_grad():
            student.logits(blank)
    except (RuntimeError, AssertionError, ValueError) as error:
        raise InputError(
            f"student.model: {student.architecture} cannot take images of {images.resolution} px ({error}). "
            "Choose another model or data.resolution."
        ) from error
    student.train()


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Models are built on the CPU: its generator alone is seeded, and restored."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield
