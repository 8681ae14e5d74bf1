"""Sweeps whose trials are a small script, so that many of them take a second; and real ones of the toy."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from tests import warm
from tests.warm import Launched

# Stands in for distill.train: RECIPE key=value ... --out DIR --resume auto. Its accuracy is a function of its learning
# rate and seed; it saves its step after each epoch and goes on from there. What it does, it appends to notes.jsonl.
TRAINER = """
import fcntl, json, os, signal, sys, time
from pathlib import Path

words = sys.argv[2:]
path = Path(words[words.index("--out") + 1])
given = dict(word.split("=", 1) for word in words if "=" in word)
folder = Path(__file__).parent
options = json.loads((folder / "trainer.json").read_text())
rate, seed = float(given.get("optim.lr", 0.001)), int(given["seed"])
tested, epochs = given["train.test"] == "true", 4

def note(what):
    with (folder / "notes.jsonl").open("a") as file:
        file.write(json.dumps({"trial": path.name, "what": what, "given": given, "time": time.time(),
                               "gpu": os.environ.get("CUDA_VISIBLE_DEVICES")}) + "\\n")

def status(**values):
    known.update(values)
    (path / "status.tmp").write_text(json.dumps(known))
    (path / "status.tmp").rename(path / "status.json")

def line(event, epoch, **values):
    values |= {"event": event, "step": 10 * epoch, "epoch": epoch, "time": time.time()}
    with (path / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(values) + "\\n")

path.mkdir(parents=True, exist_ok=True)
lock = open(path / ".lock", "a")
fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
lock.truncate(0)
lock.write("mine")
lock.flush()
known = json.loads((path / "status.json").read_text()) if (path / "status.json").exists() else {}
note("begun" if not known else "resumed")

def leave(number, frame):
    status(state="interrupted", reason="SIGTERM")
    note("stopped")
    os._exit(75)

signal.signal(signal.SIGTERM, leave)
done = known.get("step", 0) // 10
status(state="running", step=10 * done, data_sizes={"train": 100, "validation": options.get("validation", 200)},
       selected_by="student/top1")
time.sleep(options.get("loading", 0))
line("resume" if done else "start", done)
for epoch in range(done + 1, epochs + 1):
    time.sleep(options.get("seconds", 0.02))
    if path.name[:3] in options.get("dying", []) and epoch == 2:
        note("died")
        os.kill(os.getpid(), signal.SIGKILL)
    if path.name[:3] in options.get("bad", []):
        print("error: data.root: no such folder")
        sys.exit(2)
    top1 = min(99.0, 50 + 5000 * rate + 0.5 * seed + epoch)
    if options.get("validation", 200):
        line("eval", epoch, split="validation", weights="raw", **{"student/top1": top1})
    status(step=10 * epoch)
if tested:
    line("eval", epochs, split="test", weights="raw", **{"student/top1": 40.0 + seed})
status(state="finished" if tested else "trained")
note("tested" if tested else "trained")
"""

RECIPE = """
data: {name: digits, validation: 0.2}
distill: []
student: {model: vit_nano, patch_size: 4}
train: {epochs: 4}
"""


@dataclass
class Sweeps:
    """A folder with a recipe, and sweeps of it by the script."""

    folder: Path
    trainer: dict[str, Any] = field(default_factory=dict)
    """Options of the script."""

    @property
    def command(self) -> list[str]:
        """What starts the script."""
        return [sys.executable, "-S", str(self.folder / "trainer.py")]

    def configure(self, **trainer: Any) -> None:
        """Set options of the script, for a sweep in this process."""
        (self.folder / "trainer.json").write_text(json.dumps(trainer))

    def write(self, **sweep: Any) -> Path:
        given = {"base": "recipe.yaml", "command": self.command, **sweep}
        path = self.folder / "sweep.yaml"
        path.write_text(yaml.safe_dump({key: value for key, value in given.items() if value is not None}))
        return path

    @property
    def out(self) -> Path:
        return self.folder / "out"

    def start(self, *arguments: str) -> Launched:
        self.configure(**self.trainer)
        return warm.launch(["sweep", *(arguments or ["sweep.yaml"]), "--out", "out"], cwd=self.folder)

    def run(self, *arguments: str) -> tuple[int, str]:
        """Exit code and output."""
        launched = self.start(*arguments)
        (code,) = launched.wait()
        return code, launched.output

    def search(self, *arguments: str) -> dict[str, Any]:
        """Run a sweep to its ranking: what the script leaves is no run that a report could read."""
        code, output = self.run(*arguments)
        assert code == 0, output
        found: dict[str, Any] = json.loads((self.out / "sweep.json").read_text())
        return found | {"output": output}

    def clear(self) -> None:
        shutil.rmtree(self.out)
        (self.folder / "notes.jsonl").unlink()

    def notes(self, what: str | None = None) -> list[dict[str, Any]]:
        path = self.folder / "notes.jsonl"
        lines = map(json.loads, path.read_text().splitlines() if path.exists() else ())
        return [line for line in lines if what in (None, line["what"])]


@pytest.fixture
def sweeps(tmp_path: Path) -> Iterator[Sweeps]:
    folder = tmp_path / "work"
    folder.mkdir()
    (folder / "trainer.py").write_text(TRAINER)
    (folder / "recipe.yaml").write_text(RECIPE)
    yield Sweeps(folder)
    left = [process.info["cmdline"] for process in psutil.process_iter(["cmdline"])]
    assert [words for words in left if str(folder / "trainer.py") in (words or [])] == []
