"""Tables of `distill teachers`: the zoo, or one teacher and its feature maps."""

from __future__ import annotations

from rich.table import Table

from distill.recipe import Teacher as Spec
from teachers.zoo import ZOO

ANY_CLASSES = 10
"""Feature maps do not depend on the number of classes."""


def known_teachers() -> Table:
    """The zoo, one teacher per row."""
    table = Table("teacher.model", "data", "px", "top-1 %", "", "licence", title="Teachers whose weights are known")
    for key, entry in ZOO.items():
        accuracy = f"{entry.accuracy.top1:.2f}"
        table.add_row(key, entry.dataset, str(entry.size), accuracy, entry.accuracy.source, entry.license)
    table.caption = "Any timm name, hf_hub:NAME, torchvision/NAME or local-dir:PATH is a teacher too."
    return table


def one_teacher(spec: Spec, resolution: int) -> list[Table]:
    """Its zoo entry, if any, and its feature maps at this resolution; needs no weights.

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
    teacher = Teacher(str(spec.model), *untrained_source(spec, ANY_CLASSES)[:3])
    maps = Table("map", "channels", "size", title=f"Feature maps at {teacher.contract.size} px")
    for name, (channels, height, width) in teacher.map_shapes(resolution).items():
        maps.add_row(name, str(channels), f"{height} x {width}")
    return [*tables, maps]
