"""Tensor files: whole, and the same bytes for the same content."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from distill.tensor_files import write_tensors

TENSORS = {"b": torch.arange(6.0).view(2, 3), "a": torch.tensor([1, -2]), "ü": torch.ones(5, dtype=torch.bfloat16)}
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
    shared = torch.zeros(3)
    with pytest.raises(RuntimeError, match="share memory"):
        write_tensors(path, {"one": shared, "two": shared}, {})
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
