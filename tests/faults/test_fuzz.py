"""Thousands of changed exports, runs, checkpoints and packed files: each is read rightly or refused in one message; no
process is started, and no file outside is changed.
"""

from __future__ import annotations

import random
import shutil
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import nn

import distill
from distill import checkpoint, run
from distill.data import open_dataset
from distill.errors import InputError
from distill.recipe import Data, from_mapping
from distill.report.comparison import compare
from distill.report.document import write_report
from distill.training.saving import TrainState, restore
from tests.conftest import Counted, Toy
from tests.faults.fuzz import Watch, mutate
from tests.faults.hostile import make_export
from tests.report.conftest import run_maker

SECRET = '{"secret": "8d969eef6ecad3c2"}'
Read = Callable[[Path], object]


@pytest.fixture(scope="module")
def watch() -> Watch:
    return Watch()


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory, toy: Toy) -> dict[str, Path]:
    """One good folder of each kind."""
    folder = tmp_path_factory.mktemp("good")
    export = make_export(folder / "export")
    report = run_maker(folder)("run", control=True, analysis=True)
    for name in ("run", "run/control"):
        shutil.rmtree(folder / name / "export")
        shutil.copytree(export, folder / name / "export")
        (folder / name / "resolved.yaml").write_text(from_mapping(toy.mapping()).to_yaml())
    (folder / "begun").mkdir()
    begun = run.Run(folder / "begun" / "run", is_main=True)
    begun.claim()
    begun.open(from_mapping(toy.mapping()), source=None, environment={"variants": {}, "threads": 1})
    state, progress = train_state(), {"step": 3, "evaluated_at": 3, "best_top1": 50.0, "best_step": 3,
                                      "best_weights": "raw"}  # fmt: skip
    begun.log("start", step=0, epoch=0, initial_weights="a", steps=3)
    plain = {"progress": progress, "metrics_size": begun.metrics_size(), "scaler": None,
             "metrics": {"names": ["loss"], "sums": [[1.0, 2.0]], "skipped": 0}}  # fmt: skip
    folder_of_step = checkpoint.folder_of_step(begun.checkpoints, 3)
    checkpoint.write(folder_of_step, state.states(), state.optimizer.state_dict(), plain)
    begun.status("interrupted")
    begun.close()
    packed = folder / "packed"
    packed.mkdir()
    shutil.copy(toy.root / "toy.safetensors", packed)
    return {"export": export, "report": report, "begun": begun.path, "packed": packed}


def train_state() -> TrainState:
    student = nn.Linear(2, 3)
    optimizer: Any = torch.optim.AdamW(student.parameters())
    student(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    return TrainState(student, nn.Identity(), None, None, optimizer, None, 1)


def readers(image: Path, whole_report: Callable[[], bool]) -> dict[str, Read]:
    def use_export(folder: Path) -> object:
        return distill.predict(folder, [image])

    def compare_it(folder: Path) -> object:
        found = compare([folder])
        if whole_report():
            write_report(found, folder / "report.html")
            assert SECRET[12:20] not in (folder / "report.html").read_text()
            assert SECRET[12:20] not in (folder / "report.json").read_text()
        return found.samples

    def resume_it(folder: Path) -> object:
        begun = run.Run(folder, is_main=True)
        try:
            begun.claim()
            run.check_resumable(folder, run.read_recipe(folder)) if run.holder_of(folder) is None else None
            newest = checkpoint.newest_intact(folder / "checkpoints")
            list(run.read_metrics(folder, "start"))
            begun.open(from_mapping({}), source=None, environment={})
            if newest is not None:
                restore(train_state(), newest, begun)
                checkpoint.discard_after(begun.checkpoints, newest)
            begun.log("resume", step=1, epoch=1)
            begun.status("failed", reason="")
        finally:
            begun.close()
        return newest is not None

    def open_it(folder: Path) -> object:
        data = Data(name="toy.safetensors", root=str(folder), resolution=8, validation=0.25)
        dataset = open_dataset(data, seed=0, device=torch.device("cpu"))
        return dataset.info.digest

    return {"export": use_export, "report": compare_it, "begun": resume_it, "packed": open_it}


def check_all(count: int, samples: dict[str, Path], watch: Watch, tmp_path: Path) -> dict[str, int]:
    """Read so many changed folders of each kind in turn; how many were read, refused, and wrong."""
    image, outside = tmp_path / "image.png", tmp_path / "outside" / "secret.json"
    Image.new("RGB", (8, 8), "green").save(image)
    outside.parent.mkdir()
    outside.write_text(SECRET)
    chance, counts, wrong = random.Random(0), {"read": 0, "refused": 0}, []
    use = readers(image, lambda: chance.random() < 0.05)
    good = {kind: use[kind](samples[kind]) for kind in ("export", "packed")}
    for number in range(count):
        kind = list(samples)[number % len(samples)]
        folder = tmp_path / "in" / f"{number}"
        shutil.copytree(samples[kind], folder, symlinks=True)
        did, sealed = mutate(folder, chance, outside)
        with watch.over(tmp_path / "in"):
            try:
                found = use[kind](folder)
                counts["read"] += 1
                if not sealed and kind in good and found != good[kind]:
                    wrong.append(f"{number} {kind}: {did}: read as something else")
            except InputError as error:
                counts["refused"] += 1
                if len(str(error)) > 2000 or str(tmp_path) not in str(error):
                    wrong.append(f"{number} {kind}: {did}: {str(error)[:300]}")
            except Exception as error:
                last = traceback.extract_tb(error.__traceback__)[-1]
                where = [f"{Path(frame.filename).name}:{frame.lineno}" for frame in
                         traceback.extract_tb(error.__traceback__) if "/distill/" in frame.filename]  # fmt: skip
                wrong.append(f"{number} {kind}: {did}: {type(error).__name__}: {str(error)[:200]} {where} {last.name}")
        if watch.seen or outside.read_text() != SECRET or sorted(outside.parent.iterdir()) != [outside]:
            wrong.append(f"{number} {kind}: {did}: {watch.seen}, {outside.read_text()[:50]}")
            watch.seen.clear()
            outside.write_text(SECRET)
        shutil.rmtree(folder)
    assert not wrong, "\n".join([f"{len(wrong)} of {count}", *wrong[:60]])
    return counts


def test_the_watch_sees(watch: Watch, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    with watch.over(tmp_path / "in"):
        (tmp_path / "in" / "a").write_text("")
        (tmp_path / "b").write_text("")
        (tmp_path / "b").rename(tmp_path / "c")
    seen = [line.split()[0] for line in watch.seen]
    watch.seen.clear()
    assert seen == ["open", "os.rename", "os.rename"]


def test_good_folders_are_read(samples: dict[str, Path], tmp_path: Path) -> None:
    Image.new("RGB", (8, 8), "green").save(tmp_path / "image.png")
    for kind, use in readers(tmp_path / "image.png", lambda: False).items():
        shutil.copytree(samples[kind], tmp_path / kind)
        assert use(tmp_path / kind)


def test_changed_files_are_read_or_refused(samples: dict[str, Path], watch: Watch, tmp_path: Path) -> None:
    counts = check_all(120, samples, watch, tmp_path)
    assert counts["refused"] > 40
    assert counts["read"] > 10


@pytest.mark.soak
def test_ten_thousand_changed_files(samples: dict[str, Path], watch: Watch, tmp_path: Path, counted: Counted) -> None:
    counts = check_all(10_000, samples, watch, tmp_path)
    counted("changed exports, runs and data read or refused in one message", done=sum(counts.values()), of=10_000,
            refused=counts["refused"])  # fmt: skip
