"""The recipe's schema with the options of all variants that there are: each brings its own keys."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Annotated, Any, Union

from pydantic import Discriminator, Field, Tag, create_model

from distill import registry
from distill.options import Options, StandardAttention, StudentOptions
from distill.recipe.schema import Recipe, Teacher

UNKNOWN_SOURCE = "unknown_source"
"""Type of pydantic's error where `teacher.source` names nothing."""
Variants = tuple[tuple[str, type[Options]], ...]


def recipe_model(raw: Mapping[str, Any]) -> type[Recipe]:
    """The recipe's class for this plain data: with the built-in variants, the plugins that are loaded, and what
    installed packages bring of the names that stand in it.
    """
    student, losses, teacher = raw.get("student"), raw.get("distill"), raw.get("teacher")
    methods = [loss.get("method") for loss in losses if isinstance(loss, Mapping)] if isinstance(losses, list) else []
    attention = student.get("attention") if isinstance(student, Mapping) else None
    named: dict[str, list[Any]] = {
        "methods": methods,
        "attention": [attention.get("kind")] if isinstance(attention, Mapping) else [],
        "students": _families(student.get("model") if isinstance(student, Mapping) else None),
        "teachers": [teacher.get("source")] if isinstance(teacher, Mapping) else [],
    }
    return _model(**{group: _options(group, names) for group, names in named.items()})


def _families(model: Any) -> list[str]:
    """Installed packages are asked for a model that no built-in family has."""
    families: Mapping[str, Any] = registry.options_of("students")
    built_in = [name for options in families.values() for name in options.models]
    return [] if model is None or model in built_in else list(registry.entry_points("students"))


def _options(group: str, names: Iterable[Any]) -> Variants:
    return tuple(registry.options_of(group, [name for name in names if isinstance(name, str)]).items())


@lru_cache(maxsize=8)
def _model(methods: Variants, attention: Variants, students: Variants, teachers: Variants) -> type[Recipe]:
    kinds = _union({"standard": StandardAttention} | dict(attention), "kind")
    families = {name: _with_attention(options, kinds) for name, options in students}
    usual = StudentOptions.model_fields["model"].default
    by_model = {model: name for name, options in families.items() for model in options.models}

    def family(value: Any) -> str:
        model = value.get("model", usual) if isinstance(value, Mapping) else getattr(value, "model", None)
        return by_model.get(model, StudentOptions.family) if isinstance(model, str) else StudentOptions.family

    student: Any = Annotated[
        Union[tuple(Annotated[options, Tag(name)] for name, options in families.items())],  # noqa: UP007 (of a tuple)
        Discriminator(family),
    ]
    fields: dict[str, Any] = {
        "student": (student, Field(families[by_model[usual]](), description=_help("student"))),
        "distill": (list.__class_getitem__(_union(dict(methods), "method")), Field([], description=_help("distill"))),
        "teacher": (_teacher(dict(teachers)), Field(None, description=_help("teacher"))),
    }
    return create_model("Recipe", __base__=Recipe, __module__=Recipe.__module__, **fields)


def _help(key: str) -> str | None:
    return Recipe.model_fields[key].description


def _union(options: Mapping[str, type[Options]], key: str) -> Any:
    if len(options) == 1:
        return next(iter(options.values()))
    return Annotated[Union[tuple(options.values())], Discriminator(key)]  # noqa: UP007 (of a tuple)


def _with_attention(options: Any, kinds: Any) -> type[StudentOptions]:
    field = options.model_fields["attention"]
    default = Field(field.default, description=field.description)
    fields: dict[str, Any] = {"attention": (kinds, default)}
    return create_model(options.__name__, __base__=options, __module__=options.__module__, **fields)


def _teacher(sources: Mapping[str, type[Options]]) -> Any:
    def shape(value: Any) -> str:
        if isinstance(value, list | tuple):
            return "ensemble"
        source = value.get("source") if isinstance(value, Mapping) else getattr(value, "source", None)
        return "source" if source is not None else "single"

    branches = [
        Annotated[Teacher, Tag("single")],
        Annotated[Annotated[list[Teacher], Field(min_length=1)], Tag("ensemble")],
        *([Annotated[_union(sources, "source"), Tag("source")]] if sources else []),
    ]
    unknown = "no source of what teaches has this name; what a plugin brings needs --plugin"
    choice = Discriminator(shape, custom_error_type=UNKNOWN_SOURCE, custom_error_message=unknown)
    return Annotated[Union[tuple(branches)], choice] | None  # noqa: UP007 (of a list)
