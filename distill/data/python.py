"""The dataset `python`: data given as `distill.train(..., data=...)`; see distill.data.given."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from distill.data.dataset import Dataset
from distill.data.opening import DataReader, Opening
from distill.errors import InputError
from distill.recipe import FROM_PYTHON, Data
from distill.registry import register


class Options(Data):
    names: ClassVar[Sequence[str]] = (FROM_PYTHON,)


@register("datasets", "python", Options)
class Given(DataReader):
    @classmethod
    def open(cls, options: Data, opening: Opening) -> Dataset:
        given = opening.given
        if given is None:
            raise InputError(
                f"data.name: '{options.name}' needs data from Python code: distill.train(..., data=...). Or name other "
                "data."
            )
        if options.stream and not given.readers:
            raise InputError("data.stream: tensors are held in memory; set data.stream to null or false")
        if not given.readers or not opening.streams(given.num_images):
            return opening.resident(given.pack(options.resolution, opening.rules), fitted=bool(given.readers))
        content = given.digest_of_stream(opening.rules)
        return opening.stream(given.readers, given.names_of_stream(), content=content)
