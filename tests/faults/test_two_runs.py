"""Promise 14: two runs never mix."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from distill.data.packed import open_packed
from distill.launching.exit_messages import EXIT_INTERRUPTED
from distill.run import read_metrics, read_status
from tests.conftest import Counted, Toy, environment, image_folder
from tests.faults.launched import COMMANDS

TOGETHER = """
import json, os, sys
import distill.pipeline, distill.report.comparison, distill.report.document, distill.report.tables
from distill.cli import run
children = []
for arguments in json.load(sys.stdin):
    if (child := os.fork()) == 0:
        console = os.open(f"console-{len(children)}.txt", os.O_WRONLY | os.O_CREAT)
        os.dup2(console, 1), os.dup2(console, 2)
        run(arguments)
    children.append(child)
print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]))
"""


def at_once(commands: list[list[str]], cwd: Path, *, fresh: bool) -> list[int]:
    """Exit codes of real commands that run at the same time, each a fresh interpreter or a fork of a warm one."""
    values = environment(OMP_NUM_THREADS="1")
    if not fresh:
        result = subprocess.run(
            [sys.executable, "-c", TOGETHER], cwd=cwd, env=values | {"PYTHONPATH": str(Path(__file__).parents[2])},
            input=json.dumps(commands), capture_output=True, text=True, timeout=200, check=True,
        )  # fmt: skip
        return json.loads(result.stdout)
    processes = []
    for number, arguments in enumerate(commands):
        with (cwd / f"console-{number}.txt").open("w") as console:
            command = [sys.executable, "-m", "distill.cli", *arguments]
            processes.append(subprocess.Popen(command, cwd=cwd, env=values, stdout=console, stderr=console))
    return [process.wait(timeout=200) for process in processes]


@pytest.fixture
def images(tmp_path: Path) -> Path:
    image_folder(root := tmp_path / "images", "abcd", {"train": 16, "test": 6}, width=12, height=12)
    return root


@pytest.mark.parametrize(
    ("rounds", "fresh"),
    [pytest.param(1, False, marks=pytest.mark.soak), pytest.param(10, True, marks=pytest.mark.soak)],
    ids=["1", "10"],
)
def test_four_at_once_pack_one_good_file(
    rounds: int, fresh: bool, toy: Toy, images: Path, tmp_path: Path, counted: Counted
) -> None:
    """And begin to train, each in its own directory."""
    done = 0
    arguments = ["train", str(toy.recipe), "data.name=folder", f"data.root={images}", "train.max_minutes=0.0001"]
    for number in range(rounds):
        folder = tmp_path / f"round-{number}"
        folder.mkdir()
        cache = folder / "cache"
        commands = [[*arguments, f"data.cache={cache}", f"--out=run-{index}"] for index in range(4)]
        codes = at_once(commands, folder, fresh=fresh)
        assert codes == [EXIT_INTERRUPTED] * 4, [path.read_text() for path in folder.glob("console-*")]
        assert sorted(path.name for path in images.iterdir()) == ["test", "train"]
        (packed,) = cache.iterdir()
        assert len(open_packed(packed).tensors["train.images"]) == 64
        digests = {read_status(path)["data_digest"] for path in folder.glob("run-*")}
        assert len(digests) == 1
        done += 1
    counted("four commands at once packed one good file", done=done, of=rounds)


@pytest.mark.parametrize("together", [2, pytest.param(8, marks=pytest.mark.soak)])
def test_of_several_on_one_directory_one_runs(toy: Toy, tmp_path: Path, counted: Counted, together: int) -> None:
    """All at once, and on what a killed run left behind."""
    arguments = ["train", str(toy.recipe), "train.max_steps=6", "--out=run", "--resume=auto"]
    codes = at_once([arguments] * together, tmp_path, fresh=False)
    assert sorted(codes) == [0] + [2] * (together - 1), [path.read_text() for path in tmp_path.glob("console-*")]
    refused = [path.read_text() for path in tmp_path.glob("console-*") if "error: " in path.read_text()]
    assert len(refused) == together - 1
    assert all("run: in use by process" in text or "this run is finished" in text for text in refused)
    assert len(list(read_metrics(tmp_path / "run", "start"))) == 1
    assert [line["step"] for line in read_metrics(tmp_path / "run", "train")] == list(range(1, 7))
    counted("several runs on one directory: one ran, the others were refused", done=together, of=together)


@pytest.mark.soak
def test_the_lock_of_a_killed_run_is_free(toy: Toy, tmp_path: Path, counted: Counted) -> None:
    done = 0
    arguments = [*COMMANDS["distill train"], str(toy.recipe), "train.epochs=1000", "--out", "run", "--resume", "auto"]
    for index in range(5):
        with (tmp_path / "console.txt").open("w") as console:
            process = subprocess.Popen(arguments, cwd=tmp_path, env=environment(), stdout=console, stderr=console)
        before = len(list(read_metrics(tmp_path / "run", "train")))
        while len(list(read_metrics(tmp_path / "run", "train"))) in (0, before):
            assert process.poll() is None, (tmp_path / "console.txt").read_text()
        second = subprocess.run(arguments, cwd=tmp_path, env=environment(), capture_output=True, text=True, check=False)
        assert second.returncode == 2
        assert f"run: in use by process {process.pid}" in second.stderr
        process.kill()
        process.wait()
        assert read_status(tmp_path / "run")["state"] == "running", index
        done += 1
    fresh = subprocess.run(
        [*arguments[:-2], "train.seed=1"], cwd=tmp_path, env=environment(), capture_output=True, text=True, check=False
    )
    assert fresh.returncode == 2
    counted("a second run was refused while the first lived, and took its place when it was killed", done=done, of=5)
