"""Packs: the images of a folder at one size, decoded once and kept in the cache folder."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path
from typing import TypeVar

from PIL import Image
from torch import Tensor

from distill.console import track
from distill.data import cache
from distill.data.facts import range_of
from distill.data.image_files import Folder, ImageFiles
from distill.data.images import ImageRules, decode_for, stack, to_square
from distill.data.locking import one_at_a_time
from distill.data.packed import PIXELS, Packed, open_packed, write_packed
from distill.errors import InputError

PART = 16
"""Images that a thread decodes before it takes the next ones: taking each by itself costs as much as a small image."""
SECONDS = 5.0
"""Between two lines on the progress of packing."""
T = TypeVar("T")
_log = logging.getLogger("distill")


def open_folder(folder: Folder, resolution: int, rules: ImageRules, cache_folder: Path) -> Packed:
    """The folder's images at one size (by `data.fit`), from a file in the cache folder, which is
    written if it is missing or the folder has changed; other rules have another file.
    """
    made_by = {"resolution": resolution, "rules": rules.identity}
    path = cache.cached_file(cache_folder, folder.origin, made_by, ".safetensors")
    return packed_once(path, folder.digest(), lambda source: _pack(folder, path, resolution, rules, source))


def packed_once(path: Path, source: str, pack: Callable[[str], None]) -> Packed:
    """The packed file at `path`; `pack(source)` writes it first if it is missing or was made from another `source`."""

    def make() -> Packed:
        pack(source)
        return open_packed(path, needs_test=False)

    return made_once(path, lambda: _current(path, source), make)


def made_once(path: Path, current: Callable[[], T | None], make: Callable[[], T]) -> T:
    """What `current` finds at `path`; where that is None, `make` writes it first, in one process at a time."""
    if (found := current()) is None:
        with one_at_a_time(path, cache.REMEDY):
            if (found := current()) is None:
                try:
                    found = make()
                except OSError as error:
                    raise InputError(f"{path}: cannot be written ({error.strerror or error}); {cache.REMEDY}") from None
    return found


def _current(path: Path, source: str) -> Packed | None:
    """The packed file; None if it is missing, damaged or made from another `source`."""
    try:
        packed = open_packed(path, needs_test=False)
    except InputError:
        return None
    return packed if packed.metadata.get("source") == source else None


def _pack(folder: Folder, path: Path, resolution: int, rules: ImageRules, source: str) -> None:
    tensors: dict[str, Tensor] = {}
    sizes: set[tuple[int, int]] = set()
    progress = Progress(f"packing the images of {folder.origin}", folder.num_images)
    for split, files in folder.splits.items():
        images = read_images(files, resolution, rules, progress, sizes)
        rules = rules._replace(channels=images.shape[1])  # those of train, the first split, for all
        tensors |= {f"{split}.images": images, f"{split}.labels": files.labels}
    extra = {"source": source, PIXELS: range_of(sizes)}
    write_packed(path, name=folder.origin.stem, class_names=folder.class_names, tensors=tensors, extra=extra)
    _log.info("data: packed into %s, %.1f MB", path, path.stat().st_size / 1e6)


def read_images(
    files: ImageFiles, resolution: int, rules: ImageRules, progress: Progress, sizes: set[tuple[int, int]]
) -> Tensor:
    """uint8 [N, C, resolution, resolution] of all files; adds the sizes that they have to `sizes`."""

    def fitted(image: Image.Image) -> Tensor:
        sizes.add(image.size)
        return to_square(image, resolution, None, rules)

    def read(rows: range) -> list[Tensor]:
        return [decode_for(fitted, *files.source(row), rules) for row in rows]

    parts = [range(first, min(first + PART, len(files))) for first in range(0, len(files), PART)]
    with ThreadPoolExecutor() as pool:  # PIL releases the GIL while decoding and resizing
        return stack(progress.of(chain.from_iterable(pool.map(read, parts))), len(files))


class Progress:
    """Logs how many of `total` items are done: at the start, and every few seconds."""

    def __init__(self, what: str, total: int) -> None:
        self.what, self.total, self.done = what, total, 0
        _log.info("data: %s, %s in all", what, f"{total:,}")
        self._last = time.monotonic()

    def of(self, items: Iterable[T]) -> Iterator[T]:
        """The items, counted."""
        for item in track(items, self.what, self.total):
            self.done += 1
            if (now := time.monotonic()) - self._last >= SECONDS:
                self._last = now
                _log.info("data: %s, %s of %s", self.what, f"{self.done:,}", f"{self.total:,}")
            yield item
