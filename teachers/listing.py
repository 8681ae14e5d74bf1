"""`distill teachers`: the zoo as a table."""

from __future__ import annotations

from rich.table import Table

from distill.errors import InputError
from teachers.zoo import ZOO


def render(name: str | None) -> Table:
    """All known teachers, one a row; or one of them, one fact a row.

    Raises:
        InputError: no teacher of that name.
    """
    if name is None:
        table = Table("teacher.model", "data", "px", "top-1 %", "", "licence", title="Teachers whose weights are known")
        for key, entry in ZOO.items():
            accuracy = f"{entry.accuracy.top1:.2f}"
            table.add_row(key, entry.dataset, str(entry.size), accuracy, entry.accuracy.source, entry.license)
        table.caption = "Any timm name, hf_hub:NAME, torchvision/NAME or local-dir:PATH is a teacher too."
        return table
    if name not in ZOO:
        raise InputError(
            f"{name}: not in the zoo, which has {', '.join(ZOO)}. Other models need no entry to be a teacher."
        )
    table = Table("key", "value", title=name)
    for key, value in ZOO[name].model_dump().items():
        table.add_row(key, str(value))
    return table
