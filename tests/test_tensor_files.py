"""Tensor files: whole, and the same bytes for the same content."""

from __future__ import annotations

import resource
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from distill.files.tensors import write_tensors

TENSORS = {"b": torch.arange(6.0).view(2, 3), "a": torch.tensor([1, -2]), "ü": torch.ones(5, dtype=torch.bfloat16)}
TENSORS |= {"scalar": torch.tensor(2.5, dtype=torch.float64), "empty": torch.zeros(0, 3), "mask": torch.arange(3) > 1}
TENSORS |= {"turned": torch.rand(2, 3, 4, 5).to(memory_format=torch.channels_last), "part": torch.arange(9)[::2].half()}
METADATA = {f"key {n}": f'value "{n}" \\ ü €\n' for n in range(20)}


def test_round_trip_and_the_same_bytes_every_time(tmp_path: Path) -> None:
    contents = set()
    for trial in range(10):
        path = tmp_path / f"{trial}.safetensors"
        write_tensors(path, TENSORS, dict(reversed(METADATA.items())) if trial % 2 else METADATA)
        contents.add(path.read_bytes())
        loaded = load_file(path)
        assert loaded.keys() == TENSORS.keys()
        assert all(torch.equal(loaded[name], TENSORS[name]) for name in TENSORS)
        with safe_open(path, "pt") as file:
            assert file.metadata() == METADATA
    assert len(contents) == 1


def test_a_failed_write_leaves_the_earlier_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    write_tensors(path, TENSORS, {})
    before = path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) - 1, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large") as caught:
            write_tensors(path, TENSORS, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert ".x.safetensors." in str(caught.value.filename)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
