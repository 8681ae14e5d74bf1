"""Loads weights files strictly, without executing pickled code."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from http.client import HTTPException
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from distill.errors import InputError
from distill.files.digests import file_digest

# Keys of the state dict in checkpoints; EMA weights first, which authors evaluate.
_WRAPPINGS = ("state_dict_ema", "model_ema", "state_dict", "model_state_dict", "model")
# Of DataParallel, DistributedDataParallel and torch.compile.
_PREFIXES = ("module.", "_orig_mod.")


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """The state dict in a .safetensors or torch file (.pth, .th, .pt, .bin), unwrapped, on the CPU.

    Raises:
        InputError: no such file, not readable, holds pickled code (which is not run), or holds no state dict.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such weights file. Give the path of a .safetensors, .pth, .th or .pt file.")
    try:
        if path.suffix == ".safetensors":
            content: Any = load_file(path, device="cpu")
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a file from elsewhere can fail in any way
        raise InputError(_unreadable(path, error)) from error
    return _state_dict(content, path)


def _unreadable(path: Path, error: Exception) -> str:
    # torch's loader names the import that it refused.
    code = re.search(r"GLOBAL ([\w.]+)", str(error), re.IGNORECASE)
    if code:
        return (
            f"{path}: holds code (it imports {code[1]}), not only tensors. It was not run and is not used. "
            "Get the weights as .safetensors, or as a file in which torch.save wrote a state dict."
        )
    lines = str(error).strip().splitlines() or [type(error).__name__]
    kind = "safetensors file" if path.suffix == ".safetensors" else "torch file"
    return f"{path}: not a {kind} of tensors, or damaged ({lines[-1][:200]}). Give the path of a weights file."


def _state_dict(content: Any, path: Path) -> dict[str, Tensor]:
    state = content
    while isinstance(state, Mapping):
        inner = next((state[key] for key in _WRAPPINGS if isinstance(state.get(key), Mapping)), None)
        if inner is None:
            break
        state = inner
    if not isinstance(state, Mapping) or not state or not all(isinstance(value, Tensor) for value in state.values()):
        found = f"keys {_some(list(map(str, state)))}" if isinstance(state, Mapping) else f"a {type(state).__name__}"
        raise InputError(f"{path}: holds no state dict (names with tensors) but {found}. Give a model's weights.")
    weights = {str(key): value for key, value in state.items() if key != "n_averaged"}  # the counter of AveragedModel
    while prefix := next((prefix for prefix in _PREFIXES if all(key.startswith(prefix) for key in weights)), None):
        weights = {key.removeprefix(prefix): value for key, value in weights.items()}
    return weights


def load_weights(network: Any, path: Path, *, num_classes: int) -> int:
    """Load all parameters and buffers of `network`, whose head has `num_classes` outputs, from the file at `path`.

    If the file lacks just the head, a timm model's head is removed.

    Returns:
        The resulting number of classes: `num_classes` or 0.

    Raises:
        InputError: see `read_state_dict`; or keys are missing, surplus or of another shape.
    """
    weights, own = read_state_dict(path), network.state_dict()
    for key in own.keys() - weights.keys():
        if key.endswith(".num_batches_tracked"):  # missing in old weights, no effect when frozen
            weights[key] = own[key]
    missing = [key for key in own if key not in weights]
    surplus = [key for key in weights if key not in own]
    shapes = [key for key in own if key in weights and own[key].shape != weights[key].shape]
    named = (("missing", missing), ("surplus", surplus))
    problems = [f"{len(keys)} {what}: {_some(keys)}" for what, keys in named if keys]
    if shapes:
        described = [f"{key} {list(weights[key].shape)} instead of {list(own[key].shape)}" for key in shapes]
        problems.append(f"{len(shapes)} of another shape: {_some(described)}")
    if not problems:
        network.load_state_dict(weights)
        return num_classes
    if missing and not surplus and not shapes and hasattr(network, "reset_classifier"):
        network.reset_classifier(0)
        if network.state_dict().keys() == weights.keys():
            network.load_state_dict(weights)
            return 0
    message = f"{path}: these weights do not fit the model. Keys: {'; '.join(problems)}."
    only_heads = all(
        own[key].shape[:1] == (num_classes,) and own[key].shape[1:] == weights[key].shape[1:] for key in shapes
    )
    if only_heads and not missing and not surplus:
        classes = len(weights[shapes[0]])
        message += f" They have {classes} classes, the data have {num_classes}: use weights trained on these classes."
    else:
        message += " Check that teacher.model is the model that they belong to."
    raise InputError(message)


def _some(keys: Sequence[str], limit: int = 5) -> str:
    return ", ".join(keys[:limit]) + (f", ... ({len(keys)} in all)" if len(keys) > limit else "")


def download(url: str, sha256: str) -> Path:
    """The file at `url` in torch.hub's folder, downloaded if missing; its SHA-256 begins with `sha256`.

    Raises:
        InputError: the download fails, or the hash differs.
    """
    path = Path(torch.hub.get_dir()) / "checkpoints" / url.rpartition("/")[2]
    if path.exists():
        if not file_digest(path).startswith(sha256):
            raise InputError(f"{path}: not the file of {url} (its SHA-256 does not begin with {sha256}). Delete it.")
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        torch.hub.download_url_to_file(url, str(path), hash_prefix=sha256, progress=sys.stderr.isatty())
    except (OSError, HTTPException) as error:
        raise InputError(
            f"{url}: cannot be downloaded ({error}). Fetch it on a machine with network access and put it at {path}, "
            "or anywhere with teacher.weights=PATH."
        ) from error
    except RuntimeError as error:  # another hash; torch.hub has removed the file
        raise InputError(f"{url}: was downloaded and deleted: not the expected file ({error}).") from error
    return path
