"""Any timm model as a student, unmodified."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import timm

from distill.errors import InputError
from distill.options import Key, Problem, StudentOptions
from distill.registry import register
from distill.students.builder import Builder, Built, Images, inputs_of
from distill.students.names import check_name
from distill.students.weights import create_pretrained


class Options(StudentOptions):
    def check(self, recipe: Any, at: Key) -> Iterator[Problem]:
        yield from super().check(recipe, at)
        for key, is_set in (
            ("patch_size", self.patch_size is not None),
            ("stem", self.stem != "patch"),
            ("attention", self.attention.kind != "standard"),
            ("distillation_token", bool(self.distillation_token)),
        ):
            if is_set:
                message = f"only for this project's students (vit_nano, ...), not for '{self.model}'"
                yield Problem(((*at, key), (*at, "model")), message)


@register("students", "timm_model", Options)
class TimmModel(Builder):
    @staticmethod
    def build(options: Options, images: Images) -> Built:
        check_name(options.model, "student.model")
        if options.pretrained and not timm.is_model_pretrained(options.model):
            raise InputError(f"student.pretrained: timm has no weights for {options.model}; set it to false.")
        channels, statistics = inputs_of(options, images)
        required = {"num_classes": images.num_classes, "in_chans": channels}
        model = timm.create_model(options.model, **required)
        accepted = {name for cls in type(model).__mro__ for name in inspect.signature(cls).parameters}
        model_args = {"img_size": images.resolution} if "img_size" in accepted else {}
        training_args: dict[str, Any] = {"drop_path_rate": options.drop_path} if options.drop_path else {}
        if training_args and "drop_path_rate" not in accepted:
            raise InputError(f"student.drop_path: {options.model} has no stochastic depth; set it to 0.")
        if "dynamic_img_size" in accepted:
            training_args |= images.dynamic_size()
        if options.pretrained:
            model = create_pretrained(options.model, **required, **model_args, **training_args)
            statistics = statistics or (model.pretrained_cfg["mean"], model.pretrained_cfg["std"])
        elif model_args or training_args:
            model = timm.create_model(options.model, **required, **model_args, **training_args)
        return Built(model, options.model.partition(".")[0], model_args, statistics or (images.mean, images.std))
