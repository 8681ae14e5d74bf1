"""Sequential streams, without random access (timm's hfids/, tfds/ and wds/ readers).

Unlike for all other data, the order is the reader's (seeded, shuffled shards) and depends on the number of processes
and workers, and a resume within an epoch reads and drops the earlier images. Augmentation is a function of the position
in the epoch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils import data as torch_data

from distill.data.augment import to_float
from distill.data.batches import BatchPlan
from distill.data.checked import check, identity
from distill.data.dataset import Dataset, DatasetInfo, RawBatch, Split
from distill.data.encoded import samples
from distill.data.hf_sets import columns_of
from distill.data.images import SUFFIXES, ImageRules, decode
from distill.data.loading import items, worker_loader
from distill.data.opening import DataReader, Opening
from distill.data.randomness import keys
from distill.data.stream import Draw, has_crops, raw_batch, squares
from distill.data.timm_sets import create
from distill.errors import InputError
from distill.recipe import Data
from distill.registry import register

TEST_NAMES = ("validation", "test", "val")


class Options(Data):
    names: ClassVar[Sequence[str]] = ("hfids/", "tfds/", "wds/")
    in_order: ClassVar[bool] = True


class _Decoder(torch_data.IterableDataset):
    """Samples of a dataset of timm's -> uint8 [C, R, R], label, and the crops of further views, or the error that ends
    them, which the loader would raise with the worker's stack trace.
    """

    def __init__(self, source: Any, spec: Data, draw: Draw | None = None, first: int = 0, stride: int = 1) -> None:
        self.source, self.draw, self.first, self.stride = source, draw, first, stride
        self.spec, self.rules = spec, rules_of(spec)

    def __iter__(self) -> Iterator[tuple[Any, ...] | InputError]:
        worker = torch_data.get_worker_info()
        number, workers = (worker.id, worker.num_workers) if worker is not None else (0, 1)
        try:
            for count, (file, name, label) in enumerate(samples(self.source, self.spec.name)):
                image = decode(file, name, self.rules)
                index = (count * workers + number) * self.stride + self.first
                first, *others = squares(image, index, self.draw, self.spec, self.rules)
                yield first, label, *others
        except InputError as error:
            while True:  # else the loader would drop a batch that it does not fill
                yield error


def rules_of(spec: Data) -> ImageRules:
    """In colour, unless data.channels says otherwise: whether all are grey would be known after reading all."""
    rules = ImageRules.of(spec)
    return rules._replace(channels=rules.channels or 3)


def _collate(batch: list[tuple[Any, ...] | InputError]) -> Any:
    """A batch, or the first error among its samples."""
    error = next((sample for sample in batch if isinstance(sample, InputError)), None)
    return error or torch_data.default_collate(batch)


class SequentialDataset(Dataset):
    """`sources`: split -> timm's name of it."""

    in_order = True

    def __init__(
        self, info: DatasetInfo, spec: Data, device: torch.device, sources: dict[Split, str], *, workers: int
    ) -> None:
        super().__init__(info, spec, device, cropped=has_crops(spec))
        self._sources, self._workers = sources, workers
        self._labels: dict[Split, Tensor] = {}

    def _raw_steps(self, plan: BatchPlan, epoch: int, first_step: int) -> Iterator[list[RawBatch]]:
        source = _create(
            self.spec,
            self._sources["train"],
            is_training=True,
            batch_size=plan.micro_batch,
            seed=plan.seed,
        )
        source.set_epoch(epoch)
        source.set_loader_cfg(num_workers=self._workers)
        draw = Draw(plan.seed, epoch, self.views)
        decoder = _Decoder(source, self.spec, draw, plan.process_index, plan.num_processes)
        # timm's readers shuffle with the worker seeds of the loader.
        seed = int(keys(plan.seed, epoch, [f"reader/{plan.process_index}"])[0, 0])
        loader = worker_loader(
            decoder,
            workers=self._workers,
            batch_size=plan.micro_batch,
            drop_last=True,
            collate=_collate,
            pin_memory=self.device.type == "cuda",
            generator=torch.Generator().manual_seed(seed),
        )
        batches = items(loader)
        for step in range(plan.steps_per_epoch(self.info.sizes["train"])):
            micro_batches = list(islice(batches, plan.accumulation))
            for batch in micro_batches:
                if isinstance(batch, InputError):
                    raise batch
            if len(micro_batches) < plan.accumulation:
                raise InputError(
                    f"data.name: the reader of {self.info.name} ended in step {step} of the epoch, with fewer images "
                    "than it announced; correct their number in its info file"
                )
            if step >= first_step:
                positions = [torch.arange(part.start, part.stop) for part in plan.slices(step)]
                yield [
                    raw_batch((images, labels, indices, *crops), self.device)
                    for (images, labels, *crops), indices in zip(micro_batches, positions, strict=True)
                ]

    def evaluation_batches(
        self, split: Split, start: int, stop: int, batch_size: int
    ) -> Iterator[tuple[Tensor, Tensor]]:
        stop = min(stop, self.info.sizes[split])
        if start >= stop:
            return
        decoder = _Decoder(_whole(self.spec, self._sources[split]), self.spec)
        loader = worker_loader(decoder, workers=min(self._workers, 1), generator=torch.Generator())
        decoded = islice(items(loader), start, stop)
        while chunk := list(islice(decoded, batch_size)):
            for sample in chunk:
                if isinstance(sample, InputError):
                    raise sample
            images = torch.stack([image for image, _ in chunk]).to(self.device)
            yield to_float(images), torch.tensor([label for _, label in chunk], device=self.device)

    def labels(self, split: Split) -> Tensor:
        """Reads the whole split the first time."""
        if split not in self._sources:
            return torch.empty(0, dtype=torch.int64)
        if split not in self._labels:
            self._labels[split] = _read_labels(self.spec, self._sources[split])
        return self._labels[split]


def _whole(spec: Data, split: str) -> Any:
    """The whole split in the reader's order, on every process."""
    source = _create(spec, split)
    source.reader.dist_rank, source.reader.dist_num_replicas = 0, 1
    return source


def _read_labels(spec: Data, split: str) -> Tensor:
    return torch.tensor([label for *_, label in samples(_whole(spec, split), spec.name)], dtype=torch.int64)


def _create(spec: Data, split: str, **arguments: Any) -> Any:
    """timm's dataset of a split, with the columns (of tfds/ features, of wds/ names in a sample) of the recipe."""
    keys = {"input_key": spec.image_column, "target_key": spec.label_column}
    if spec.name.startswith("hfids/"):
        keys = dict(zip(keys, columns_of(spec), strict=True))
    elif spec.name.startswith("wds/") and spec.image_column is None:
        keys["input_key"] = ";".join(sorted((suffix[1:] for suffix in SUFFIXES), key=lambda key: key != "jpg"))
    chosen = {key: value for key, value in keys.items() if value is not None}
    return create(spec.name, Path(spec.root), split, **chosen, **arguments)


def _splits(spec: Data) -> tuple[dict[Split, Any], dict[Split, str]]:
    """timm's dataset and name of each split.

    Raises:
        InputError: the train split cannot be opened, or none of the others.
    """
    train = _create(spec, "train")
    problems = []
    for name in TEST_NAMES:
        try:
            return {"train": train, "test": _create(spec, name)}, {"train": "train", "test": name}
        except InputError as error:
            problems.append(error)
    raise problems[0]


@register("datasets", "sequential", Options)
class SequentialReader(DataReader):
    has_columns = True

    @classmethod
    def at_hand(cls, options: Data) -> bool:
        return options.name.startswith("wds/")

    @classmethod
    def open(cls, options: Data, opening: Opening) -> Dataset:
        """Raises InputError if validation is to be held out, which needs random access."""
        opening.must_stream()
        if options.test is not None:
            raise InputError(
                f"data.test: '{options.name}' is read sequentially, so nothing can be held out of it; set it to null"
            )
        if options.validation:
            raise InputError(
                f"data.validation: '{options.name}' is read sequentially, so nothing can be held out of it; set "
                "data.validation=0 (and data.select_on=test to select checkpoints on its validation images)"
            )
        opened, sources = _splits(options)
        sizes = {split: int(source.reader.num_samples or 0) for split, source in opened.items()}
        if empty := [split for split, size in sizes.items() if not size]:
            raise InputError(
                f"data.name: the reader of '{options.name}' does not say how many images '{sources[empty[0]]}' has; "
                "add it to its info file"
            )
        rules = rules_of(options)
        source = identity(opened["train"].reader, options)
        class_to_idx = dict(getattr(opened["train"].reader, "class_to_idx", None) or {})
        class_names = tuple(sorted(class_to_idx, key=lambda key: class_to_idx[key]))
        pixels = ""
        if options.name.startswith("hfids/") and not source:  # of the Hub: reading all would download all
            num_labels = int(_read_labels(options, sources["test"]).max()) + 1
        else:
            whole = {sources[split]: (_whole(options, sources[split]), sizes[split]) for split in sources}
            num_labels, pixels = check(options, whole, rules, opening.cache, source)
        class_names = class_names or tuple(map(str, range(num_labels)))
        if num_labels > len(class_names):
            raise InputError(
                f"data.name: label {num_labels - 1} of '{options.name}' is out of range: classes are 0 to "
                f"{len(class_names) - 1}"
            )
        info = opening.describe(
            class_names,
            rules,
            {"train": sizes["train"], "validation": 0, "test": sizes["test"]},
            f"{options.name}\n{sizes}\n{source}",
            pixels=pixels,
        )
        return SequentialDataset(info, options, opening.device, sources, workers=opening.workers)
