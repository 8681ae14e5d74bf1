"""Tables of `distill teachers`: the zoo, or one teacher and its feature maps."""

from __future__ import annotations

from rich.table import Table

from distill.recipe import Teacher as Spec
from teachers.licences import brief
from teachers.zoo import RECOMMENDED, ZOO

ANY_CLASSES = 10
"""Feature maps do not depend on the number of classes."""


def known_teachers() -> list[Table]:
    """The zoo, and weights of timm's that are recommended, one teacher per row."""
    table = Table("teacher.model", "data", "px", "top-1 %", "", "licence", title="Teachers whose weights are known")
    for key, entry in ZOO.items():
        accuracy = f"{entry.accuracy.top1:.2f}"
        table.add_row(key, entry.dataset, str(entry.size), accuracy, entry.accuracy.source, entry.license)
    recommended = Table(title="For methods on feature maps: some of timm's weights")
    for name in ("teacher.model", "classes", "px", "size", "licence"):
        recommended.add_column(name, no_wrap=name == "teacher.model")
    for key, model in RECOMMENDED.items():
        licence = ", ".join(filter(None, (model.license, brief(model.license))))
        classes = f"{model.classes:,}" if model.classes else "none"
        recommended.add_row(key, classes, str(model.size), f"{model.parameters / 1e6:.1f} M", licence)
    recommended.caption = "Any timm name, hf_hub:NAME, torchvision/NAME or local-dir:PATH is a teacher too."
    return [table, recommended]


def one_teacher(spec: Spec, resolution: int) -> list[Table]:
    """What is known of it, and its feature maps at this resolution; needs no weights.

    Raises:
        InputError: no such model, or it cannot return feature maps.
    """
    from teachers.sources import untrained_source
    from teachers.teacher import Teacher

    tables = []
    if spec.model in ZOO:
        known = Table("key", "value", title=spec.model)
        for key, value in ZOO[spec.model].model_dump().items():
            known.add_row(key, str(value))
        tables.append(known)
    source = untrained_source(spec, ANY_CLASSES)
    teacher = Teacher(str(spec.model), *source[:3])
    if not tables:
        known = Table("key", "value", title=spec.model)
        known.add_row("classifier", "one of its own" if source.num_classes else "none: for methods on feature maps")
        known.add_row("licence", source.origin.license or "unknown")
        known.add_row("parameters", f"{teacher.num_parameters:,}")
        known.add_row("inputs", str(teacher.contract))
        tables.append(known)
    maps = Table("map", "channels", "size", title=f"Feature maps at {teacher.contract.size} px")
    for name, (channels, height, width) in teacher.map_shapes(resolution).items():
        maps.add_row(name, str(channels), f"{height} x {width}")
    return [*tables, maps]
