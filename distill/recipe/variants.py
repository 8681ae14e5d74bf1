"""The recipe's schema with the options of all known variants."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Annotated, Any, Union

from pydantic import Discriminator, Field, Tag, create_model

from distill import registry
from distill.options import Options, StandardAttention, StudentOptions
from distill.recipe.schema import Data, Recipe, Teacher

UNKNOWN_SOURCE = "unknown_source"
"""Type of pydantic's error for an unknown `teacher.source`."""
Variants = tuple[tuple[str, type[Options]], ...]


def recipe_model(raw: Mapping[str, Any]) -> type[Recipe]:
    """The recipe class for this plain data, with the options of built-in variants, of loaded plugins, and of installed
    packages' variants that it names.
    """
    student, losses, teacher, data = (raw.get(key) for key in ("student", "distill", "teacher", "data"))
    methods = [loss.get("method") for loss in losses if isinstance(loss, Mapping)] if isinstance(losses, list) else []
    attention = student.get("attention") if isinstance(student, Mapping) else None
    named: dict[str, list[Any]] = {
        "methods": methods,
        "attention": [attention.get("kind")] if isinstance(attention, Mapping) else [],
        "students": _families(student.get("model") if isinstance(student, Mapping) else None),
        "teachers": [teacher.get("source")] if isinstance(teacher, Mapping) else [],
        "datasets": _entry_points(data.get("name") if isinstance(data, Mapping) else None),
    }
    return _model(**{group: _options(group, names) for group, names in named.items()})


def _families(model: Any) -> list[str]:
    """Entry points to load for a model that no built-in family has."""
    families: Mapping[str, Any] = registry.options_of("students")
    built_in = [name for options in families.values() for name in options.models]
    return [] if model is None or model in built_in else list(registry.entry_points("students"))


def _options(group: str, names: Iterable[Any]) -> Variants:
    return tuple(registry.options_of(group, [name for name in names if isinstance(name, str)]).items())


@lru_cache(maxsize=8)
def _model(
    methods: Variants, attention: Variants, students: Variants, teachers: Variants, datasets: Variants
) -> type[Recipe]:
    kinds = _union({"standard": StandardAttention} | dict(attention), "kind")
    families = {name: _with_attention(options, kinds) for name, options in students}
    default_model = StudentOptions.model_fields["model"].default
    by_model = {model: name for name, options in families.items() for model in options.models}

    def family(value: Any) -> str:
        model = value.get("model", default_model) if isinstance(value, Mapping) else getattr(value, "model", None)
        return by_model.get(model, StudentOptions.family) if isinstance(model, str) else StudentOptions.family

    student: Any = Annotated[
        Union[tuple(Annotated[options, Tag(name)] for name, options in families.items())],  # noqa: UP007 (of a tuple)
        Discriminator(family),
    ]
    fields: dict[str, Any] = {
        "student": (student, Field(families[by_model[default_model]](), description=_help("student"))),
        "distill": (list.__class_getitem__(_union(dict(methods), "method")), Field([], description=_help("distill"))),
        "teacher": (_teacher(dict(teachers)), Field(None, description=_help("teacher"))),
    }
    if own := {name: options for name, options in datasets if options.model_fields.keys() != Data.model_fields.keys()}:
        fields["data"] = (_data(own), Field(Data(), description=_help("data")))
    return create_model("Recipe", __base__=Recipe, __module__=Recipe.__module__, **fields)


def _data(readers: Mapping[str, Any]) -> Any:
    """Readers with their own keys, and the plain section for all others."""

    def reader(value: Any) -> str:
        name = value.get("name") if isinstance(value, Mapping) else getattr(value, "name", None)
        return _reader_in(readers, str(name)) or ""

    branches = [Annotated[Data, Tag("")], *(Annotated[options, Tag(name)] for name, options in readers.items())]
    return Annotated[Union[tuple(branches)], Discriminator(reader)]  # noqa: UP007 (of a list)


def _reader_in(readers: Mapping[str, Any], name: str) -> str | None:
    for reader, options in readers.items():
        for known in options.names or (reader,):
            prefix, suffix = known.endswith("/") and name.startswith(known), known[0] == "." and name.endswith(known)
            if name == known or prefix or suffix:
                return reader
    return None


def _entry_points(name: Any) -> list[str]:
    """Entry points to load for data that no known reader has."""
    known = name is None or _reader_in(registry.options_of("datasets"), str(name)) is not None
    return [] if known else list(registry.entry_points("datasets"))


def reader_of(name: str) -> str | None:
    """The dataset reader of a `data.name`; None: there is none."""
    return _reader_in(registry.options_of("datasets", _entry_points(name)), name)


def reader_names() -> list[str]:
    """Values of `data.name`, as readers declare them, and readers of installed packages."""
    readers: Mapping[str, Any] = registry.options_of("datasets")
    known = [name for reader, options in readers.items() for name in options.names or (reader,)]
    return list(dict.fromkeys([*known, *registry.entry_points("datasets")]))


def used(recipe: Recipe) -> dict[str, str]:
    """Origins of a recipe's variants that are not built in: 'methods/queue' -> module and version, or file and hash."""
    chosen = [("methods", section.method) for section in recipe.distill]
    chosen += [("students", recipe.student.family), ("datasets", reader_of(recipe.data.name) or "")]
    chosen.append(("attention", recipe.student.attention.kind))
    if recipe.source is not None:
        chosen.append(("teachers", recipe.source.source))
    return registry.origins(chosen)


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
    unknown = "no teacher source has this name; a plugin's source needs --plugin"
    choice = Discriminator(shape, custom_error_type=UNKNOWN_SOURCE, custom_error_message=unknown)
    return Annotated[Union[tuple(branches)], choice] | None  # noqa: UP007 (of a list)
