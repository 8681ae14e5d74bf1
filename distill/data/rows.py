"""In-place updates of selected samples of a batch."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

# Elements of an argument that are processed at once: what fits a CPU's caches; elsewhere, what keeps the device busy
# without much memory for intermediate results.
HOST_PART, DEVICE_PART = 1 << 20, 1 << 24


def picks_rows(device: torch.device) -> bool:
    """Whether to select rows: on a CPU it is cheap, on a GPU it would synchronise."""
    return device.type == "cpu"


def update(values: Tensor, wanted: Tensor | None, function: Callable[..., Tensor], *arguments: Tensor) -> None:
    """values[wanted] = function(*arguments[wanted]), in place; `function` treats each row by itself.

    wanted: bool [B]; None: all. On a CPU only the wanted rows are computed. Elsewhere `function` is applied to all rows
    (so it must accept unwanted ones) and the results are masked, without synchronising with the host.
    """
    picks = picks_rows(values.device)
    part_size = HOST_PART if picks else DEVICE_PART
    step = max(1, part_size // max(argument[0].numel() for argument in arguments))
    if wanted is not None and picks:
        chosen = wanted.nonzero()[:, 0]
        for rows in chosen.split(step) if len(chosen) else ():
            values.index_copy_(0, rows, function(*(argument.index_select(0, rows) for argument in arguments)))
        return
    for start in range(0, len(values), step):
        part = slice(start, start + step)
        result = function(*(argument[part] for argument in arguments))
        if wanted is not None:
            result = torch.where(wanted[part].view(-1, *[1] * (values.ndim - 1)), result, values[part])
        values[part] = result
