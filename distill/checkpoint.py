"""Atomic, verified checkpoints.

A checkpoint is a folder `step_00001000` of safetensors, one `weights_only` archive, JSON, and a manifest with the
SHA-256 of each file. It is written under a temporary name, flushed to disk, read back and renamed; only then are older
checkpoints removed.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
import zipfile
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distill import faults
from distill.errors import InputError, RunFailed
from distill.files.digests import file_digest
from distill.files.durable import NewFile, flush_folder, remove_folder
from distill.files.plain_data import MOST_BYTES, parse_json, read_json
from distill.files.regular import read_bytes, regular
from distill.files.safetensors_file import read_safetensors
from distill.files.tensors import fill
from distill.recipe.reading import short

MANIFEST = "manifest.json"
ADVICE = "Use another checkpoint."
_log = logging.getLogger("distill")


def write(
    folder: Path, tensors: Mapping[str, Mapping[str, Tensor]], optimizer: Mapping[str, Any], state: Mapping[str, Any]
) -> None:
    """Write one checkpoint atomically.

    Args:
        folder: its path.
        tensors: file stem -> state dict; each becomes one safetensors file.
        optimizer: the optimizer's state dict.
        state: plain data.

    Raises:
        OSError: it cannot be written, or reads back differently; nothing is left behind.
    """
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    contents: dict[str, Callable[[NewFile], object]] = {
        **{f"{stem}.safetensors": partial(fill, tensors=values) for stem, values in tensors.items()},
        "optimizer.pt": partial(torch.save, dict(optimizer)),
        "state.json": lambda file: file.write(json.dumps(state, indent=1).encode()),
    }
    digests: dict[str, str] = {}
    contents[MANIFEST] = lambda file: file.write(_manifest_text(digests).encode())
    try:
        for name, write_content in contents.items():
            with NewFile(temporary / name) as file:
                write_content(file)
            if name != MANIFEST:
                digests[name] = file.sha256()
        flush_folder(temporary)
        try:
            verify(temporary)
        except InputError as damage:
            raise OSError(errno.EIO, f"what was read back is not what was written: {damage}") from None
        faults.point("checkpoint verified")
        temporary.rename(folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    faults.point("checkpoint renamed")
    flush_folder(folder.parent)


def size(tensors: Mapping[str, Mapping[str, Tensor]], optimizer: Mapping[str, Any]) -> int:
    """Bytes of the tensors of a checkpoint."""
    return sum(tensor.nbytes for tensor in _tensors_in([tensors, optimizer]))


def _tensors_in(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping | list | tuple):
        for part in value.values() if isinstance(value, Mapping) else value:
            yield from _tensors_in(part)


def verify(path: str | Path) -> None:
    """Return if every byte of the checkpoint at `path` is what was written.

    Raises:
        InputError: a file is missing, added or changed; the message names it.
    """
    path = Path(path)
    manifest = path / MANIFEST
    try:
        text = (read_bytes(manifest, MOST_BYTES) or b"").decode()
        digests = parse_json(text, str(manifest))
    except ValueError:  # an InputError too
        raise InputError(
            f"{manifest}: missing or unreadable; the checkpoint {path} cannot be trusted. Use another one."
        ) from None
    # The manifest has a canonical form, so that every changed byte is detected.
    if text != _manifest_text(digests):
        raise InputError(f"{manifest}: damaged; the checkpoint {path} cannot be trusted. Use another one.")
    present = {child.name for child in path.iterdir()} - {MANIFEST}
    for name in sorted(present | digests.keys()):
        file = path / name
        if name not in digests:
            raise InputError(
                f"{file}: not part of the checkpoint as it was written. Remove it or use another checkpoint."
            )
        if name not in present:
            raise InputError(f"{file}: missing from the checkpoint. Use another one.")
        try:
            found = file_digest(file, opener=regular)
        except OSError as error:
            raise InputError(f"{file}: cannot be read ({error.strerror}). Use another checkpoint.") from None
        if found != digests[name]:
            raise InputError(f"{file}: damaged (its SHA-256 is not the one in {MANIFEST}). Use another checkpoint.")


def read_tensors(path: Path, stem: str) -> dict[str, Tensor]:
    """One state dict of the verified checkpoint at `path`, on the CPU. Raises InputError."""
    return read_safetensors(path / f"{stem}.safetensors", "pt", advice=ADVICE)[0]


def read_optimizer(path: Path) -> dict[str, Any]:
    """The optimizer's state dict of the verified checkpoint at `path`, on the CPU. Raises InputError."""
    file = path / "optimizer.pt"
    try:
        with zipfile.ZipFile(file) as archive:
            packed, size = sum(entry.file_size for entry in archive.infolist()), file.stat().st_size
        if packed > size:
            raise ValueError(f"{packed:,} bytes in a file of {size:,}")
        found = torch.load(file, map_location="cpu", weights_only=True)
        # Strides of 0 repeat a value without memory, until it is copied.
        if not isinstance(found, dict) or sum(tensor.nbytes for tensor in _tensors_in(found)) > size:
            raise ValueError("no state of an optimizer")
    except Exception as error:  # a pickle can fail in any way; `weights_only` runs none of its code
        reason = short(str(error).strip().partition("\n")[0])
        raise InputError(f"{file}: cannot be read ({reason}). {ADVICE}") from None
    return found


def read_state(path: Path) -> dict[str, Any]:
    """The plain data of the verified checkpoint at `path`. Raises InputError."""
    return read_json(path / "state.json") or {}


def folder_of_step(checkpoints: Path, step: int) -> Path:
    """Path of the checkpoint of `step`."""
    return checkpoints / f"step_{step:08d}"


def existing(checkpoints: Path) -> list[Path]:
    """All checkpoints in the folder, oldest first."""
    return sorted(path for path in checkpoints.glob("step_*") if path.is_dir() and not path.is_symlink())


def newest_intact(checkpoints: Path) -> Path | None:
    """The newest checkpoint that verifies; damaged ones are named in a warning. None: there are no checkpoints.

    Raises:
        InputError: all checkpoints are damaged.
    """
    damages = []
    for path in reversed(existing(checkpoints)):
        try:
            verify(path)
        except InputError as damage:
            damages.append(str(damage))
            continue
        if damages:
            _log.warning("%s Falling back to %s.", " ".join(damages), path)
        return path
    if damages:
        raise InputError(
            f"{checkpoints}: no intact checkpoint is left: {' '.join(damages)} Start a new run with another --out."
        )
    return None


def set_link(checkpoints: Path, name: str, target: Path) -> None:
    """Point the symlink `checkpoints/name` (`last`, `best`) to `target`, atomically."""
    temporary = checkpoints / f".{name}.tmp"
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(target.name)
    faults.point(f"{name} made")
    os.replace(temporary, checkpoints / name)
    faults.point(f"{name} linked")


def discard_after(checkpoints: Path, kept: Path | None) -> None:
    """Remove the checkpoints newer than `kept` (None: all), which the resumed run will write again; and broken links.

    Raises:
        RunFailed: one of them cannot be removed; a later resume would find it.
    """
    for path in existing(checkpoints):
        if kept is None or path.name > kept.name:
            try:
                remove_folder(path)
            except OSError as error:
                raise RunFailed(
                    f"{path}: cannot be removed ({error.strerror}), though the run resumes from an earlier step. Make "
                    "its folder writable."
                ) from None
    for link in checkpoints.iterdir():
        if link.is_symlink() and not link.exists():
            link.unlink()


def prune(checkpoints: Path, keep: int) -> None:
    """Remove all but the newest `keep` checkpoints and the best of each of these; failures are warnings.

    If the newest is damaged, a resume falls back to an older one, which may have another best.
    """
    newest = existing(checkpoints)[-keep:]
    kept = {*newest, *(folder_of_step(checkpoints, step) for step in map(_best_step, newest) if step is not None)}
    for path in existing(checkpoints):
        if path not in kept:
            try:
                remove_folder(path)
            except OSError as error:
                _log.warning("%s: this old checkpoint cannot be removed: %s", path, error.strerror)


def _best_step(path: Path) -> int | None:
    try:
        step = read_state(path)["progress"]["best_step"]
    except (InputError, LookupError, TypeError):  # damaged: a resumption passes over it
        return None
    return step if isinstance(step, int) else None


def _manifest_text(digests: Mapping[str, str]) -> str:
    return json.dumps(digests, indent=1, sort_keys=True)
