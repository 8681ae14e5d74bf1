"""Reading of .safetensors files."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal

from safetensors import safe_open

from distill.errors import InputError
from distill.files.regular import regular


def read_safetensors(
    path: Path, framework: Literal["pt", "np"], *, advice: str, links: bool = False
) -> tuple[dict[str, Any], dict[str, str]]:
    """Tensors and metadata of a file.

    Args:
        advice: a sentence, for the messages.
        links: whether a link is followed.

    Raises:
        InputError: it is missing, no regular file, or not of that format.
    """
    try:
        if not links:
            os.close(regular(str(path), os.O_RDONLY))
        if not path.is_file():  # a pipe, which would be waited for
            raise FileNotFoundError(f"{path}: no such file")
        with safe_open(path, framework=framework) as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (a file is no mapping)
            return tensors, file.metadata() or {}
    except FileNotFoundError:
        raise InputError(f"{path}: no such file. {advice}") from None
    except Exception as error:  # besides SafetensorError and OSError, types that torch or numpy do not have
        reason = error.strerror if isinstance(error, OSError) and error.strerror else " ".join(str(error).split())
        raise InputError(f"{path}: cannot be read: {reason}. {advice}") from None
