"""Work on some samples of a batch only."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

# Numbers of an argument that are worked on at once: on a CPU what its caches hold, elsewhere what keeps it busy without
# much memory for what is in between.
HOST_PART, DEVICE_PART = 1 << 20, 1 << 24


def picks_rows(device: torch.device) -> bool:
    """Whether asking which samples are wanted is free: on the CPU it is, a GPU would have to be waited for."""
    return device.type == "cpu"


def update(values: Tensor, wanted: Tensor | None, function: Callable[..., Tensor], *arguments: Tensor) -> None:
    """values[wanted] = function(*arguments[wanted]), in place; `function` treats each row by itself.

    wanted: bool [B]; None: all. On the CPU only the wanted rows are worked on. Elsewhere `function` sees all of them
    (so it must bear with rows it is not meant for) and the others keep what they have, without a word to the host.
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
