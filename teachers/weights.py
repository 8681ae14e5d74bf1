"""Loads weights files strictly, without executing pickled code."""

from __future__ import annotations

import copy
import logging
import os.path
import re
import sys
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from http.client import HTTPException
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from distill.errors import InputError
from distill.files.digests import file_digest
from distill.files.plain_data import MOST_BYTES, parse_json
from distill.files.regular import read_bytes
from teachers.heads import take_off_classifier, without_head_keys

# Keys of the state dict in checkpoints; EMA weights first, which authors evaluate.
_WRAPPINGS = (
    "state_dict_ema", "model_ema", "ema_state_dict", "ema", "state_dict", "model_state_dict", "model", "net",
)  # fmt: skip
_log = logging.getLogger("distill")
# Of DataParallel, DistributedDataParallel and torch.compile.
_PREFIXES = ("module.", "_orig_mod.")


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """The state dict in a .safetensors or torch file (.pth, .th, .pt, .bin), unwrapped, on the CPU.

    Raises:
        InputError: no such file, not readable, holds pickled code (which is not run), or holds no state dict.
    """
    if path.is_dir():
        raise InputError(f"{path}: a folder, not a weights file. {_folder_advice(path)}")
    if not path.is_file():
        raise InputError(f"{path}: no such weights file. Give the path of a .safetensors, .pth, .th or .pt file.")
    if (recognised := _what_it_is(path)) is not None:
        raise InputError(f"{path}: {recognised}")
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
        settings = code[1].endswith("Namespace")  # argparse's, which many training scripts store
        beside = " These are the settings of a training, stored beside its weights." if settings else ""
        return (
            f"{path}: holds code (it imports {code[1]}), not only tensors. It was not run and is not used.{beside} "
            "Get the weights as .safetensors, or as a file in which torch.save wrote a state dict. If you trust it: "
            f"`content = torch.load({str(path)!r}, weights_only=False)`, then torch.save the state dict in it, such "
            "as content['model']."
        )
    lines = str(error).strip().splitlines() or [type(error).__name__]
    kind = "safetensors file" if path.suffix == ".safetensors" else "torch file"
    return f"{path}: not a {kind} of tensors, or damaged ({lines[-1][:200]}). Give the path of a weights file."


def _what_it_is(path: Path) -> str | None:
    """What a file is that is often taken for weights, and what to do; None: none of these."""
    with path.open("rb") as file:
        start = file.read(512)
    if start.startswith(b"version https://git-lfs.github.com/"):
        return "a pointer of Git LFS, not the weights. Run `git lfs pull` where it was cloned, or download the file."
    if start.removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"<":
        return "a web page (HTML or XML), not weights. Download the file itself: a page about it has another address."
    if start.startswith(b"PK"):
        try:
            with zipfile.ZipFile(path) as archive:
                members = {name.partition("/")[2] for name in archive.namelist()}
        except (zipfile.BadZipFile, OSError, ValueError):
            return None
        if "constants.pkl" in members:
            return (
                "a TorchScript archive, which holds code; it was not run. From a file that you trust: "
                f"torch.save(torch.jit.load({str(path)!r}, 'cpu').state_dict(), 'weights.pth')."
            )
    return None


def _folder_advice(folder: Path) -> str:
    if (transformers := transformers_model(folder)) is not None:
        return transformers
    if (folder / "config.json").is_file():
        return f"If timm or `distill export` wrote it, set teacher.model=local-dir:{folder} and no teacher.weights."
    return "Give the file in it."


def transformers_model(folder: Path) -> str | None:
    """What to do with a folder that transformers wrote for a model of its own; None: it is none."""
    try:
        config = parse_json(read_bytes(folder / "config.json", MOST_BYTES, links=True) or b"", str(folder))
    except InputError:
        return None
    # Its wrapper of timm's models has timm's keys too.
    if "model_type" not in config or "architecture" in config:
        return None
    return (
        f"Its config.json is of transformers (model_type {str(config['model_type'])[:50]!r}), whose models have other "
        "names and outputs than timm's. Take timm's model with the same weights (hf_hub:timm/NAME), or give the model "
        "from Python, wrapped to return logits: distill.train(..., teacher=(module, distill.Contract(...)))."
    )


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


def load_weights(network: Any, path: Path, *, num_classes: int, any_classifier: bool = False) -> int:
    """Load all parameters and buffers of `network`, whose head has `num_classes` outputs, from the file at `path`.

    A prefix that all keys in the file share is removed if the rest then fits. If the file lacks just the head, the
    network's is taken off; so it is, with `any_classifier` or for a network without one, if the file has another head.

    Returns:
        The resulting number of classes: `num_classes` or 0.

    Raises:
        InputError: see `read_state_dict`; or keys are missing, surplus or of another shape.
    """
    given = read_state_dict(path)
    for prefix in ("", *shared_prefixes(given)):
        weights = {key.removeprefix(prefix): value for key, value in given.items()}
        if (classes := _fill(network, weights, num_classes)) is not None:
            if prefix:
                _log.info("%s: the prefix '%s' of all keys was removed", path, prefix)
            return classes
    if any_classifier or not num_classes:
        for prefix in ("", *shared_prefixes(given)):
            weights = {key.removeprefix(prefix): value for key, value in given.items()}
            kept = without_head_keys(network, weights)
            if len(kept) < len(weights) and _fill(network, kept, num_classes) == 0:
                _log.info("%s: its classifier is not used: %s", path, _some([*(weights.keys() - kept.keys())]))
                return 0
    raise InputError(f"{path}: these weights do not fit the model. {_misfit(network, given, path, num_classes)}")


def shared_prefixes(weights: Mapping[str, Tensor]) -> Iterator[str]:
    """What all keys begin with, up to each dot, the shortest first."""
    shared = os.path.commonprefix([*weights])  # noqa: RUF071 (by characters is meant)
    yield from (shared[: at + 1] for at, character in enumerate(shared) if character == ".")


def _fill(network: Any, weights: dict[str, Tensor], num_classes: int) -> int | None:
    """Load `weights` if they fit, without the head if they lack just that; the resulting number of classes, or None."""
    own = network.state_dict()
    for key in own.keys() - weights.keys():
        if key.endswith(".num_batches_tracked"):  # missing in old weights, no effect when frozen
            weights[key] = own[key]
    if weights.keys() - own.keys() or any(own[key].shape != value.shape for key, value in weights.items()):
        return None
    if weights.keys() != own.keys():
        without_head = copy.deepcopy(network)
        if not take_off_classifier(without_head) or without_head.state_dict().keys() != weights.keys():
            return None
        take_off_classifier(network)
        num_classes = 0
    network.load_state_dict(weights)
    return num_classes


def _misfit(network: Any, weights: Mapping[str, Tensor], path: Path, num_classes: int) -> str:
    """Which keys do not fit, and what to do."""
    own = network.state_dict()
    missing, surplus, shapes = differences(own, weights)
    message = named_differences(own, weights)
    heads = [key for key in shapes if own[key].shape[:1] == (num_classes,)]
    only_heads = heads == shapes and all(own[key].shape[1:] == weights[key].shape[1:] for key in heads)
    if only_heads and not missing and not surplus:
        classes = len(weights[shapes[0]])
        return (
            f"{message} They have {classes} classes, the data have {num_classes}: use weights trained on these classes."
        )
    beginnings = {key[: key.index(".") + 1] for key in weights if "." in key}
    parts = [start for start in sorted(beginnings) if all(start + key in weights for key in missing)]
    if missing and parts:
        named_parts = " or ".join(map(repr, parts))
        return f"{message} Those that begin with {named_parts} have this model's names: save them without the others."
    return (
        f"{message} {transformers_model(path.parent) or 'Check that teacher.model is the model that they belong to.'}"
    )


def check_numbers(network: nn.Module, name: str) -> None:
    """Raise InputError if a parameter of teacher `name` is NaN or infinite, or a buffer, which may be a mask, NaN."""
    wrong = [(key, (~value.isfinite()).sum(), value.numel()) for key, value in network.named_parameters()]
    wrong += [(key, value.isnan().sum(), value.numel()) for key, value in network.named_buffers()]
    found = [f"{key} ({int(count):,} of {total:,} values)" for key, count, total in wrong if count]
    if found:
        raise InputError(
            f"teacher {name}: its weights are not all numbers: {_some(found)}. Its training diverged, or a conversion "
            "to float16 overflowed; take an earlier checkpoint."
        )


def differences(own: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> tuple[list[str], list[str], list[str]]:
    """Keys of a model's state dict that `weights` lack, those that they have besides, and those of another shape."""
    missing = [key for key in own if key not in weights and not key.endswith(".num_batches_tracked")]
    surplus = [key for key in weights if key not in own]
    return missing, surplus, [key for key in own if key in weights and own[key].shape != weights[key].shape]


def named_differences(own: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> str:
    """`differences` in words."""
    missing, surplus, shapes = differences(own, weights)
    problems = [
        f"{len(keys)} {what}: {_some(keys)}" for what, keys in (("missing", missing), ("surplus", surplus)) if keys
    ]
    if shapes:
        described = [f"{key} {list(weights[key].shape)} instead of {list(own[key].shape)}" for key in shapes]
        problems.append(f"{len(shapes)} of another shape: {_some(described)}")
    return f"Keys: {'; '.join(problems)}."


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
