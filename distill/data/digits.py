"""scikit-learn's 1,797 handwritten digits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import torch

from distill.data.opening import DataReader
from distill.data.packed import Packed, sha256
from distill.recipe import Data
from distill.registry import register


class Options(Data):
    names: ClassVar[Sequence[str]] = ("digits",)


@register("datasets", "digits", Options)
class Digits(DataReader):
    @classmethod
    def read(cls, options: Data) -> Packed:
        """[N, 1, 8, 8], values 0 .. 16 scaled to 0 .. 255. Every fifth image of each class, in file order, is test."""
        from sklearn.datasets import load_digits

        bunch = load_digits()
        images = torch.from_numpy(np.rint(bunch.images * (255 / 16)).astype(np.uint8))[:, None]
        labels = torch.from_numpy(bunch.target.astype(np.int64))
        occurrence = torch.zeros_like(labels)
        for label in range(10):
            rows = labels == label
            occurrence[rows] = torch.arange(int(rows.sum()))
        test = occurrence % 5 == 4
        tensors = {
            "train.images": images[~test],
            "train.labels": labels[~test],
            "test.images": images[test],
            "test.labels": labels[test],
        }
        metadata = {f"sha256/{key}": sha256(tensor) for key, tensor in tensors.items()}
        return Packed("scikit-learn's digits", tuple(str(label) for label in range(10)), tensors, metadata)
