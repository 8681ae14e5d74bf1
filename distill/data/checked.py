"""Reads all samples of sequential data once, before training: none may be missing or impossible to decode.

timm's readers leave such samples out with a line in the log, so that a run would end too early, or train on less than
announced. The result is recorded in the cache folder until the files change.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from distill.data.cache import cached_file, files_identity
from distill.data.encoded import samples
from distill.data.facts import range_of
from distill.data.images import ImageRules, decode
from distill.data.packing import Progress
from distill.errors import InputError
from distill.files.text import write_text
from distill.recipe import Data

CHUNK = 256
"""Samples that are read before they are decoded by threads."""


class Checked(NamedTuple):
    """What was found in all samples."""

    num_labels: int
    """The largest label plus one."""
    pixels: str
    """The sizes of the images, in words."""


def identity(reader: Any, spec: Data) -> str:
    """SHA-256 (hex) over names, sizes and modification times of the files behind a reader of timm's; empty: they are
    not here.
    """
    root = Path(spec.root)
    if (builder := getattr(reader, "builder", None)) is None:
        names = getattr(getattr(reader, "split_info", None), "filenames", ())
        files = [root / name for name in (*names, "_info.json", "info.json")]
    else:  # tfds/ has a folder of prepared files; hfids/NAME may be a folder, else it is on the Hub
        prefix, _, name = spec.name.partition("/")
        root = Path(str(builder.data_dir) if prefix == "tfds" else name)
        files = sorted(root.rglob("*"))
    found = [file for file in files if file.is_file()]
    return files_identity(root, found) if found else ""


def check(
    spec: Data, splits: Mapping[str, tuple[Any, int]], rules: ImageRules, cache_folder: Path, source: str
) -> Checked:
    """Decode all samples.

    Args:
        splits: timm's dataset, and the number of its samples as announced, by timm's name of the split.
        source: identifies the files; empty: nothing is recorded.

    Raises:
        InputError: names the split, the sample's number and file, or the shard that is too short.
    """
    record = cached_file(cache_folder, Path(spec.root), ["checked", spec.name], ".json")
    source = f"{source}, {rules.acceptance}" if source else ""
    if (known := _read(record, source)) is not None:
        return known
    labels, sizes = 0, set()
    for split, (dataset, announced) in splits.items():
        shards = _Shards(dataset.reader, spec)
        progress = Progress(f"checking split {split} of {spec.name}", announced)
        for where, label, size in progress.of(_decoded(dataset, split, spec.name, rules)):
            shards.count(where)
            labels = max(labels, label + 1)
            sizes.add(size)
        if progress.done < announced:
            raise InputError(
                f"data.name: split {split} of '{spec.name}' yields {progress.done:,} images, {announced:,} are "
                f"announced{shards.short()}; get the missing ones or correct the number in its info file"
            )
    checked = Checked(labels, range_of(sizes))
    if source:
        with suppress(OSError):  # not writable: checked again the next time
            record.parent.mkdir(parents=True, exist_ok=True)
            write_text(record, json.dumps({"source": source, **checked._asdict()}))
    return checked


def _read(record: Path, source: str) -> Checked | None:
    try:
        values = json.loads(record.read_text(encoding="utf-8"))
        return Checked(int(values["num_labels"]), str(values["pixels"])) if values["source"] == source != "" else None
    except (OSError, ValueError, LookupError, TypeError):
        return None


def _decoded(dataset: Any, split: str, name: str, rules: ImageRules) -> Iterator[tuple[str, int, tuple[int, int]]]:
    """Name, label and size of each image, in order."""

    def look(sample: tuple[int, tuple[Any, str, int]]) -> tuple[str, int, tuple[int, int]]:
        number, (file, where, label) = sample
        try:
            return where, label, decode(file, where, rules).size
        except InputError as error:
            raise InputError(f"data.name: split {split}, image {number}: {error}") from None

    numbered = enumerate(samples(dataset, name))
    with ThreadPoolExecutor() as pool:
        while chunk := list(islice(numbered, CHUNK)):
            yield from pool.map(look, chunk)


class _Shards:
    """Counts the samples of each shard of a webdataset, which announces them."""

    def __init__(self, reader: Any, spec: Data) -> None:
        info = getattr(reader, "split_info", None)
        names = getattr(info, "filenames", ()) if getattr(reader, "builder", None) is None else ()
        names, lengths = [str(Path(spec.root) / name) for name in names], getattr(info, "shard_lengths", ())
        self._announced = dict(zip(names, lengths, strict=False))
        self._found: Counter[str] = Counter()
        self._current = ""

    def count(self, where: str) -> None:
        if not self._current or f"{self._current}, " not in where:
            self._current = next((name for name in self._announced if f"{name}, " in where), "")
        self._found[self._current] += 1

    def short(self) -> str:
        """The first shard that has too few samples, for a message."""
        short = (name for name, announced in self._announced.items() if self._found[name] < announced)
        name = next(short, None)
        return "" if name is None else f" (shard {name}: {self._found[name]:,} of {self._announced[name]:,})"
