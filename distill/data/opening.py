"""From a recipe's data section to the dataset."""

from __future__ import annotations

import difflib
import hashlib
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from distill import registry
from distill.cores import share_of_cores
from distill.data.dataset import Dataset, DatasetInfo, ResidentDataset, ResidentSplit, Split
from distill.data.folder import check_quickly, open_folder, scan, without_unreadable
from distill.data.given import GivenData
from distill.data.holdout import hold_out
from distill.data.images import common_mode
from distill.data.packed import Packed, open_packed
from distill.data.sequential import open_sequential
from distill.data.stream import Reader, StreamDataset, StreamSplit
from distill.data.timm_sets import RANDOM_ACCESS, SEQUENTIAL, open_random_access
from distill.data.torchvision_sets import KNOWN, digits, open_known
from distill.errors import InputError
from distill.inputs import IMAGENET_MEAN, IMAGENET_STD
from distill.recipe import FROM_PYTHON, Data

FOLDER_NAMES = ("folder", "imagenet")
RESIDENT_LIMIT = 4 << 30
"""Bytes of pixels, above which data.stream=null streams an image folder."""


def open_dataset(
    spec: Data,
    *,
    seed: int,
    device: torch.device,
    num_processes: int = 1,
    process_index: int = 0,
    given: GivenData | None = None,
) -> Dataset:
    """The dataset that `spec` names, for one process, on its device; downloaded and packed first where that is
    needed.

    `seed` chooses the validation split; `given` is what the name 'python' stands for. Any number of processes may open
    the same data at once. InputError, naming the key or the file, for whatever is wrong with them.
    """
    assert 0 <= process_index < num_processes
    root = Path(spec.root)
    workers = spec.workers if spec.workers is not None else share_of_cores(num_processes)
    if spec.skip_unreadable and spec.name not in FOLDER_NAMES:
        raise InputError(f"data.skip_unreadable: only for image folders; set it to false for '{spec.name}'")
    if spec.name == FROM_PYTHON:
        return _open_given(spec, seed, device, workers, given)
    if spec.name.startswith(SEQUENTIAL):
        _needs_stream(spec)

        def describe(class_names: tuple[str, ...], channels: int, sizes: dict[str, int], content: str) -> DatasetInfo:
            return _stream_info(spec, class_names, channels, sizes, content)

        return open_sequential(spec, device, workers, describe)
    if spec.name.startswith(RANDOM_ACCESS):
        _needs_stream(spec)
        readers = open_random_access(spec.name, root)
        train = readers["train"]
        return _open_stream(
            spec, seed, device, workers, dict(readers), train.class_names, None, f"{spec.name}\n{len(train)}"
        )
    if spec.name in FOLDER_NAMES:
        folder = scan(root, skip=spec.skip_unreadable)
        if spec.skip_unreadable:
            folder = without_unreadable(folder)
        if spec.stream or (spec.stream is None and _too_large(folder.num_images, spec)):
            if process_index == 0 and not spec.skip_unreadable:
                check_quickly(folder)
            dataset: Dataset = _open_stream(
                spec,
                seed,
                device,
                workers,
                dict(folder.splits),
                folder.class_names,
                folder.mode,
                folder.digest(contents=False),
            )
        else:
            dataset = _open_resident(spec, seed, device, open_folder(folder, spec.resolution))
        dataset.info = replace(dataset.info, left_out=folder.left_out)
        return dataset
    if spec.stream:
        raise InputError(f"data.stream: '{spec.name}' is small and held in memory; set data.stream to null or false")
    return _open_resident(spec, seed, device, _open_small(spec, root))


def _open_given(spec: Data, seed: int, device: torch.device, workers: int, given: GivenData | None) -> Dataset:
    if given is None:
        raise InputError(
            f"data.name: '{FROM_PYTHON}' stands for data that Python code hands over. Give them: "
            "distill.train(..., data=...), or name other data."
        )
    if spec.stream and not given.readers:
        raise InputError("data.stream: tensors are held in memory; set data.stream to null or false")
    if not given.readers or not (spec.stream or (spec.stream is None and _too_large(given.num_images, spec))):
        return _open_resident(spec, seed, device, given.pack(spec.resolution))
    names, content = given.names_of_stream(), given.digest_of_stream()
    return _open_stream(spec, seed, device, workers, dict(given.readers), names, given.mode, content)


def _open_small(spec: Data, root: Path) -> Packed:
    if spec.name == "digits":
        return digits()
    if spec.name in KNOWN:
        return open_known(spec.name, root)
    if spec.name.endswith(".safetensors"):
        beside = root / spec.name
        path = beside if beside.exists() or not Path(spec.name).exists() else Path(spec.name)
        known = KNOWN.get(path.stem)
        return open_packed(path, known.expected if known is not None else None)
    if spec.name in registry.names("datasets"):
        packed: Packed = registry.find("datasets", spec.name).implementation.read(spec)
        return packed
    names = [*KNOWN, "digits", *FOLDER_NAMES, *registry.names("datasets")]
    near = difflib.get_close_matches(spec.name, names, n=1)
    hint = f" (did you mean '{near[0]}'?)" if near else ""
    raise InputError(
        f"data.name: no dataset '{spec.name}'{hint}; known are {', '.join(names)}, a packed file NAME.safetensors, "
        f"and timm's names that start with {', '.join((*RANDOM_ACCESS, *SEQUENTIAL))}"
    )


def _needs_stream(spec: Data) -> None:
    if spec.stream is False:
        raise InputError(f"data.stream: '{spec.name}' can only be streamed; set data.stream to null or true")


def _too_large(num_images: int, spec: Data) -> bool:
    """To be held in memory."""
    return num_images * 3 * spec.resolution**2 > RESIDENT_LIMIT


def _rows(labels: dict[str, Tensor], spec: Data, seed: int) -> dict[Split, tuple[str, Tensor | None]]:
    """For each split of the run: the split of the source that it is taken from, and which rows of it (None: all)."""
    rows: dict[Split, tuple[str, Tensor | None]] = {"train": ("train", None), "test": ("test", None)}
    if spec.validation and spec.select_on == "validation":
        if "validation" in labels:
            rows["validation"] = ("validation", None)
        else:
            remaining, held_out = hold_out(labels["train"], spec.validation, seed)
            rows["train"], rows["validation"] = ("train", remaining), ("train", held_out)
    return rows


def _open_resident(spec: Data, seed: int, device: torch.device, packed: Packed) -> ResidentDataset:
    tensors = packed.tensors
    labels = {
        split: tensors[f"{split}.labels"] for split in ("train", "validation", "test") if f"{split}.labels" in tensors
    }
    splits = {
        split: ResidentSplit(tensors[f"{source}.images"], tensors[f"{source}.labels"], rows)
        for split, (source, rows) in _rows(labels, spec, seed).items()
    }
    mean, std = channel_statistics(splits["train"])
    info = DatasetInfo(
        name=Path(spec.name).stem,
        class_names=packed.class_names,
        channels=tensors["train.images"].shape[1],
        mean=mean,
        std=std,
        digest=packed.digest,
        sizes={
            "train": splits["train"].size,
            "validation": splits["validation"].size if "validation" in splits else 0,
            "test": splits["test"].size,
        },
    )
    return ResidentDataset(info, spec, device, splits)


def channel_statistics(split: ResidentSplit, chunk: int = 4096) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and (population) deviation per channel of a split's images in [0, 1], exact: from whole numbers, by
    counting values.
    """
    channels = split.images.shape[1]
    counts = torch.zeros(channels, 256, dtype=torch.int64)
    rows = torch.arange(len(split.labels)) if split.rows is None else split.rows
    for part in rows.split(chunk):
        images = split.images[part]
        for channel in range(channels):
            counts[channel] += torch.bincount(images[:, channel].reshape(-1), minlength=256)
    values = torch.arange(256)
    total = int(counts[0].sum())
    means, deviations = [], []
    for count in counts:
        first, second = int((count * values).sum()), int((count * values**2).sum())
        means.append(first / total / 255)
        deviations.append((total * second - first * first) ** 0.5 / total / 255)
    return tuple(means), tuple(deviations)


def _open_stream(
    spec: Data,
    seed: int,
    device: torch.device,
    workers: int,
    readers: dict[str, Reader],
    class_names: tuple[str, ...],
    mode: str | None,
    content: str,
) -> StreamDataset:
    labels = {split: reader.labels for split, reader in readers.items()}
    for split, numbers in labels.items():
        for label in map(int, torch.aminmax(numbers)):
            if not 0 <= label < len(class_names):
                raise InputError(
                    f"data.name: label {label} in {split} of '{spec.name}' is out of range: classes are 0 to "
                    f"{len(class_names) - 1}"
                )
    splits = {split: StreamSplit(readers[source], rows) for split, (source, rows) in _rows(labels, spec, seed).items()}
    mode = mode or common_mode(readers["train"].load(row, None) for row in range(min(16, len(labels["train"]))))
    sizes = {split: len(splits[split].labels) if split in splits else 0 for split in ("train", "validation", "test")}
    info = _stream_info(spec, class_names, 1 if mode == "L" else 3, sizes, content)
    return StreamDataset(info, spec, device, splits, mode=mode, workers=workers)


def _stream_info(
    spec: Data, class_names: tuple[str, ...], channels: int, sizes: dict[str, int], content: str
) -> DatasetInfo:
    grey = channels == 1
    digest = hashlib.sha256("\n".join([content, *class_names]).encode()).hexdigest()
    return DatasetInfo(
        name=Path(spec.root).resolve().name if spec.name in FOLDER_NAMES else spec.name,
        class_names=class_names,
        channels=channels,
        # One number for greyscale: the channels' mean, as an adapter that repeats the channel would see on average.
        mean=(sum(IMAGENET_MEAN) / 3,) if grey else IMAGENET_MEAN,
        std=(sum(IMAGENET_STD) / 3,) if grey else IMAGENET_STD,
        digest=digest,
        sizes=sizes,
    )
