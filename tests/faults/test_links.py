"""Links in a run directory and in a cache are not followed: a foreign one cannot empty, change or show other files."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

import distill
from distill import run
from distill.data.locking import one_at_a_time
from distill.errors import InputError
from distill.exports.folder import load_export
from distill.recipe import from_mapping
from distill.report.comparison import compare
from distill.teaching.logit_file import LogitFile
from tests.conftest import Command, Toy
from tests.faults.hostile import make_export
from tests.report.conftest import MakeRun, run_maker

CONTENT = '{"secret": "not yours"}\nno line break at the end'


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    path = tmp_path / "outside" / "precious"
    path.parent.mkdir()
    path.write_text(CONTENT)
    return path


@pytest.fixture
def make_run(tmp_path: Path) -> MakeRun:
    return run_maker(tmp_path)


@pytest.fixture(scope="module")
def begun(toy: Toy, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was interrupted after its first checkpoint."""
    cwd = tmp_path_factory.mktemp("begun")
    with pytest.raises(distill.Interrupted):
        distill.train(
            toy.recipe, out=cwd / "run", overrides=["teacher=null", "distill=[]", "train.max_minutes=0.00001"]
        )
    return cwd / "run"


LINKS: dict[str, Callable[[Path, Path], object]] = {
    "link": lambda path, outside: path.symlink_to(outside),
    "relative link": lambda path, outside: path.symlink_to(os.path.relpath(outside, path.parent)),
    "chain": lambda path, outside: (
        path.with_name(f"{path.name}.2").symlink_to(outside),
        path.symlink_to(f"{path.name}.2"),
    ),
    "hard link": lambda path, outside: path.hardlink_to(outside),
}


@pytest.mark.parametrize("kind", LINKS)
@pytest.mark.parametrize("name", [".lock", "metrics.jsonl", "train.log"])
def test_a_resumed_run_changes_no_other_file(
    begun: Path, outside: Path, tmp_path: Path, toy: Toy, name: str, kind: str
) -> None:
    foreign = tmp_path / "foreign"
    shutil.copytree(begun, foreign, symlinks=True)
    (foreign / name).unlink()
    LINKS[kind](foreign / name, outside)
    with pytest.raises(InputError, match="link"):
        distill.train(toy.recipe, out=foreign, resume="auto", overrides=["teacher=null", "distill=[]"])
    assert outside.read_text() == CONTENT


@pytest.mark.parametrize("name", ["checkpoints", "export", "control"])
def test_a_folder_of_a_run_is_no_link(begun: Path, tmp_path: Path, toy: Toy, name: str) -> None:
    foreign, elsewhere = tmp_path / "foreign", tmp_path / "elsewhere"
    shutil.copytree(begun, foreign, symlinks=True)
    if (foreign / name).exists():
        shutil.move(foreign / name, elsewhere)
    else:
        elsewhere.mkdir()
    (elsewhere / ".step_00000009.tmp").mkdir()
    before = sorted(elsewhere.rglob("*"))
    (foreign / name).symlink_to(elsewhere)
    with pytest.raises(InputError, match=f"{foreign / name}: is a link"):
        distill.train(toy.recipe, out=foreign, resume="auto", overrides=["teacher=null", "distill=[]"])
    assert sorted(elsewhere.rglob("*")) == before


def test_temporary_files_replace_links(outside: Path, tmp_path: Path) -> None:
    """Their names are known beforehand."""
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / f".status.json.{os.getpid()}.tmp").symlink_to(outside)
    (folder / "recipe.yaml").symlink_to(outside)
    begun = run.Run(folder, is_main=True)
    begun.claim()
    begun.open(from_mapping({}), source=None, environment={})
    begun.close()
    assert outside.read_text() == CONTENT
    assert not (folder / "recipe.yaml").is_symlink()
    assert run.read_status(folder)["state"] == "running"


@pytest.mark.parametrize("name", ["status.json", "environment.json", "metrics.jsonl", "resolved.yaml",
                                  "predictions.safetensors", "analysis.json", "analysis.safetensors",
                                  "export/config.json"])  # fmt: skip
def test_a_report_shows_nothing_that_a_link_points_to(
    make_run: MakeRun,
    outside: Path,
    tmp_path: Path,
    name: str,
) -> None:
    path = make_run(analysis=True)
    outside.write_bytes((path / name).read_bytes())
    (path / name).unlink()
    (path / name).symlink_to(outside)
    with pytest.raises(InputError, match=f"{path / name}: cannot be read: it is a link"):
        compare([path])


@pytest.mark.parametrize("name", ["export", "control"])
def test_nor_what_a_linked_folder_has(make_run: MakeRun, tmp_path: Path, name: str) -> None:
    path = make_run(analysis=True, control=True)
    shutil.move(path / name, tmp_path / "elsewhere")
    (path / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(InputError, match=f"{path / name}: is a link"):
        compare([path])


def test_a_report_shows_known_keys_only(make_run: MakeRun, tmp_path: Path) -> None:
    path = make_run(recipe={"secret": "swordfish", "optim": {"lr": 0.0125, "password": "swordfish"}})
    (path / "environment.json").write_text(
        json.dumps({"python": "3.11.7", "AWS_SECRET": "swordfish", "versions": {"torch": "2.9.0"}})
    )
    report = distill.compare([path], tmp_path / "report.html")
    texts = [file.read_text() for file in report.files]
    assert not any("swordfish" in text for text in texts)
    assert "0.0125" in texts[0]
    assert "3.11.7" in texts[0]
    assert "torch 2.9.0" in texts[0]


def test_who_holds_a_lock_is_not_read_from_elsewhere(outside: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".lock").symlink_to(outside)
    assert run.holder_of(tmp_path / "run") is None


@pytest.mark.parametrize("kind", LINKS)
def test_the_teacher_cache_changes_no_other_file(outside: Path, tmp_path: Path, kind: str) -> None:
    folder = tmp_path / "cache"
    folder.mkdir()
    size = LogitFile(tmp_path / "x.logits", "k", epochs=1, samples=4, classes=2).size
    before = CONTENT.ljust(size + 10, "x")
    outside.write_text(before)  # long enough to be taken for the cache
    for name in ("k.logits", ".other.logits.lock", "other.json"):
        LINKS[kind](folder / name, outside)
    cache = LogitFile(folder / "k.logits", "k", epochs=1, samples=4, classes=2)
    with suppress(InputError):
        cache.make("{}")
        cache.open()
        cache.write([(0, 0, np.ones((4, 2), np.float16))])
    with pytest.raises(InputError, match="link"):
        LogitFile(folder / "other.logits", "other", epochs=1, samples=4, classes=2).make("{}")
    assert outside.read_text() == before


def test_a_lock_beside_data_is_no_link(outside: Path, tmp_path: Path) -> None:
    (tmp_path / ".data.lock").symlink_to(outside.parent / "new")
    with pytest.raises(InputError, match="link"), one_at_a_time(tmp_path / "data", ""):
        pass
    assert not (outside.parent / "new").exists()


def test_a_run_directory_itself_may_be_a_link(make_run: MakeRun, tmp_path: Path) -> None:
    (tmp_path / "newest").symlink_to(make_run("one"))
    assert compare([tmp_path / "newest"]).samples == 40


def test_an_export_may_consist_of_links(tmp_path: Path) -> None:
    export = make_export(tmp_path / "export")
    (tmp_path / "links").mkdir()
    for file in export.iterdir():
        (tmp_path / "links" / file.name).symlink_to(file)
    assert load_export(tmp_path / "links")[1] == load_export(export)[1]


def test_the_command_says_it_once(begun: Path, outside: Path, tmp_path: Path, toy: Toy, command: Command) -> None:
    shutil.copytree(begun, tmp_path / "foreign", symlinks=True)
    (tmp_path / "foreign" / ".lock").unlink()
    (tmp_path / "foreign" / ".lock").symlink_to(outside)
    done = command("train", toy.recipe, "teacher=null", "distill=[]", "--out", "foreign", "--resume", "auto")
    assert done.returncode == 2, done.stdout + done.stderr
    assert done.stderr.count("it is a link, which is not followed") == 1
    assert len(done.stderr.strip().splitlines()) == 1
    assert outside.read_text() == CONTENT
