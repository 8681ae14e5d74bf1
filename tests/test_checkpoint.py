"""Checkpoints: whole, verified, bounded."""

from __future__ import annotations

import json
import random
import resource
import shutil
from pathlib import Path

import pytest
import torch

from distill import checkpoint
from distill.errors import InputError
from distill.files.digests import file_digest


def write(folder: Path, step: int) -> Path:
    path = checkpoint.folder_of_step(folder, step)
    weight = torch.nn.Parameter(torch.full((3, 2), float(step)))
    optimizer = torch.optim.AdamW([weight])
    weight.sum().backward()
    optimizer.step()
    state = {"step": step, "progress": {"best_step": 2}}
    checkpoint.write(path, {"model": {"weight": weight}}, optimizer.state_dict(), state)
    return path


def test_round_trip(tmp_path: Path) -> None:
    path = write(tmp_path, 7)
    checkpoint.verify(path)
    assert path.name == "step_00000007"
    assert checkpoint.read_state(path)["step"] == 7
    assert torch.equal(checkpoint.read_tensors(path, "model")["weight"], torch.full((3, 2), 7.0) - 1e-3 - 7e-5)
    assert checkpoint.read_optimizer(path)["state"][0]["step"] == 1
    assert [child.name for child in tmp_path.iterdir()] == [path.name]  # nothing temporary is left


def test_every_flip_truncation_deletion_and_addition_is_found(tmp_path: Path) -> None:
    path = write(tmp_path / "good", 1)
    generator = random.Random(0)
    files = sorted(path.iterdir())
    for trial in range(120):
        copy = tmp_path / f"copy{trial}"
        shutil.copytree(path, copy)
        victim = copy / generator.choice(files).name
        content = bytearray(victim.read_bytes())
        kind = trial % 4
        if kind == 0:
            content[generator.randrange(len(content))] ^= 1 << generator.randrange(8)
            victim.write_bytes(content)
        elif kind == 1:
            victim.write_bytes(content[: generator.randrange(len(content))])
        elif kind == 2:
            victim.unlink()
        else:
            victim = copy / "optimizer.bin"
            victim.write_bytes(b"surplus")
        with pytest.raises(InputError) as caught:
            checkpoint.verify(copy)
        assert str(copy) in str(caught.value), (kind, victim)
        shutil.rmtree(copy)


def test_the_newest_intact_one_is_found_and_the_damaged_one_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert checkpoint.newest_intact(tmp_path) is None
    first, second = write(tmp_path, 1), write(tmp_path, 2)
    (tmp_path / ".step_00000003.tmp").mkdir()
    assert checkpoint.newest_intact(tmp_path) == second
    (second / "model.safetensors").write_bytes(b"")
    with caplog.at_level("WARNING", logger="distill"):
        checkpoint._log.propagate = True
        assert checkpoint.newest_intact(tmp_path) == first
    assert str(second / "model.safetensors") in caplog.text
    assert str(first) in caplog.text
    (first / "manifest.json").unlink()
    with pytest.raises(InputError, match="no intact checkpoint is left"):
        checkpoint.newest_intact(tmp_path)


def test_several_damaged_ones_are_one_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    paths = [write(tmp_path, step) for step in (1, 2, 3)]
    for path in paths[1:]:
        (path / "state.json").unlink()
    with caplog.at_level("WARNING", logger="distill"):
        checkpoint._log.propagate = True
        assert checkpoint.newest_intact(tmp_path) == paths[0]
    (record,) = caplog.records
    assert all(path.name in record.getMessage() for path in paths)


def test_a_checkpoint_that_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    write(tmp_path, 1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))  # the optimizer's archive is larger
    try:
        with pytest.raises(OSError, match=r"File too large.*optimizer\.pt"):
            write(tmp_path, 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000001"]


def test_what_the_disk_gives_back_differently_is_no_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flush = checkpoint.flush_folder

    def rot(folder: Path) -> None:
        flush(folder)
        content = bytearray((folder / "model.safetensors").read_bytes())
        content[-1] ^= 1
        (folder / "model.safetensors").write_bytes(content)

    monkeypatch.setattr(checkpoint, "flush_folder", rot)
    with pytest.raises(OSError, match=r"not what was written.*model\.safetensors"):
        write(tmp_path, 1)
    assert list(tmp_path.iterdir()) == []


def test_pruning_passes_over_what_is_damaged(tmp_path: Path) -> None:
    paths = [write(tmp_path, step) for step in range(1, 6)]
    (paths[3] / "state.json").write_bytes(b"{")
    (paths[4] / "state.json").unlink()
    checkpoint.prune(tmp_path, 3)
    assert checkpoint.existing(tmp_path) == paths[1:]


def test_links_move_and_old_checkpoints_go(tmp_path: Path) -> None:
    paths = [write(tmp_path, step) for step in range(1, 6)]
    for path in paths:
        checkpoint.set_link(tmp_path, "last", path)
    checkpoint.set_link(tmp_path, "best", paths[1])
    assert (tmp_path / "last").resolve() == paths[-1].resolve()
    checkpoint.prune(tmp_path, 2)
    assert checkpoint.existing(tmp_path) == [paths[1], *paths[-2:]]
    checkpoint.verify(tmp_path / "best")
    checkpoint.discard_after(tmp_path, paths[3])
    assert checkpoint.existing(tmp_path) == [paths[1], paths[3]]
    assert not (tmp_path / "last").is_symlink()  # it led to what is gone


def test_a_pickle_in_the_optimizer_file_is_not_executed(tmp_path: Path) -> None:
    path = write(tmp_path, 1)
    witness = tmp_path / "executed"

    class Payload:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return (Path.touch, (witness,))  # type: ignore[return-value]

    torch.save(Payload(), path / "optimizer.pt")
    digests = {name: file_digest(path / name) for name in json.loads((path / "manifest.json").read_text())}
    (path / "manifest.json").write_text(checkpoint._manifest_text(digests))
    checkpoint.verify(path)  # an attacker who can write the file can write the manifest
    with pytest.raises(Exception, match=r"[Ww]eights"):
        checkpoint.read_optimizer(path)
    assert not witness.exists()
