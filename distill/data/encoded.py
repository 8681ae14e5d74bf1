"""Samples of timm's sequential readers with their images as they are stored, for the one decoding of `images`.

By themselves the readers decode, each in its own way: TensorFlow drops transparency and orientation, images of 16 bits
in shards of webdataset become white, and those that fail are left out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from io import BytesIO
from typing import Any

from PIL import Image

from distill.data.images import Source
from distill.errors import InputError
from distill.files.plain_data import parse_json


def samples(dataset: Any, name: str) -> Iterator[tuple[Source, str, int]]:
    """Image, its name for messages, and label of each sample of a dataset of timm's; to be called where it is read, in
    a worker.
    """
    reader = dataset.reader
    if prepare := _PREPARE.get(type(reader).__name__):
        prepare(reader)
    for number, (image, label) in enumerate(dataset):
        content, own_name = image if isinstance(image, tuple) else (image, "")
        if isinstance(content, Mapping):
            content, own_name = fetched(content, name)
        where = f"{name}: {own_name}" if own_name else f"{name}, image {number}"
        source = BytesIO(content) if isinstance(content, bytes) else content
        yield source if isinstance(source, BytesIO | Image.Image) else Image.fromarray(source), where, int(label)


def fetched(value: Mapping[str, Any], name: str) -> tuple[bytes, str]:
    """Content and name of an image of a Hugging Face set, which may be in a remote file or an archive."""
    path = value.get("path") or ""
    if (content := value.get("bytes")) is not None:
        return content, path
    import fsspec  # as `datasets` does

    try:
        with fsspec.open(path, "rb") as file:
            return file.read(), path
    except (OSError, ValueError) as error:
        raise InputError(f"{name}: {path}: cannot be read ({error})") from None


def _webdataset(reader: Any) -> None:
    import webdataset

    reader._lazy_init()
    stages = reader.ds.pipeline
    # The last two stages decode a sample and rename its parts.
    sample = partial(_sample, image_key=reader.input_key, label_key=reader.target_key or reader.split_info.alt_label)
    stages[-2] = webdataset.map(sample)


def _sample(sample: Mapping[str, Any], image_key: str, label_key: str) -> dict[str, Any] | None:
    """None: the sample has no label."""
    name = f"{sample['__url__']}, {sample['__key__']}"
    key = next((key for key in image_key.split(";") if key in sample), None)
    try:
        label = int(parse_json(sample["json"], name)[label_key] if label_key else sample["cls"])
    except (KeyError, ValueError, TypeError) as error:
        raise InputError(f"{name}: has no whole number as its label ({type(error).__name__}: {error})") from None
    if key is None:
        raise InputError(f"{name}: has no image, which would be {image_key}")
    return {"jpg": (sample[key], f"{name}.{key}"), "target": label} if label >= 0 else None


def _tensorflow(reader: Any) -> None:
    from tensorflow_datasets.decode import SkipDecoding

    def skip(decoders: Any) -> Any:
        return {key: skip(value) for key, value in decoders.items()} if isinstance(decoders, dict) else SkipDecoding()

    reader._input_decoders = partial(skip, reader._input_decoders())


def _hugging_face(reader: Any) -> None:
    from datasets import Image as ImageFeature

    reader._lazy_init()
    reader.ds = reader.ds.cast_column(reader.input_key, ImageFeature(decode=False))


_PREPARE = {"ReaderWds": _webdataset, "ReaderTfds": _tensorflow, "ReaderHfids": _hugging_face}
