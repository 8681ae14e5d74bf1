"""What is kept of a run: small, without a trace of the machine, and with the same decisions."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from distill.recipe import load
from distill.report.metrics import read_predictions
from distill.report.runs import read_run
from distill.run import read_recipe
from results import campaign
from results.arms import ARMS, PLAN, Cells, identity, load_arm
from results.collect import collect, halved, portable, thinned
from tests.conftest import Toy, environment
from tests.results.conftest import EPOCHS, HOME, TEACHER_SHA, MakeCell, metrics_lines


def test_cells_are_found_by_what_they_learned_controls_among_them(
    tmp_path: Path, make_cell: MakeCell, capsys: pytest.CaptureFixture[str]
) -> None:
    make_cell("nano-hard-guide", 1, path="some-name")
    make_cell("nano-control", 1, path="some-name/control")
    unfinished = make_cell("nano-hard", 0)
    (unfinished / "status.json").write_text('{"state": "running"}')
    foreign = make_cell("nano-plain", 0)
    (foreign / "resolved.yaml").write_text(load_arm("nano-plain", 0, ["train.epochs=7"]).to_yaml())
    damaged = make_cell("nano-mean", 0)
    content = bytearray((damaged / "predictions.safetensors").read_bytes())
    content[-1] ^= 1
    (damaged / "predictions.safetensors").write_bytes(content)
    kept = tmp_path / "kept"
    collect([tmp_path / "there"], kept)
    assert sorted(path.name for path in kept.iterdir()) == ["nano-control-1", "nano-hard-guide-1", "teachers"]
    said = capsys.readouterr().out
    for path, what in ((unfinished, "not finished"), (foreign, "no cell"), (damaged, "SHA-256")):
        assert what in next(line for line in said.splitlines() if line.startswith(str(path)))


def test_nothing_of_the_machine_is_left(tmp_path: Path, make_cell: MakeCell) -> None:
    make_cell("nano-hard-guide", 0)
    collect([tmp_path / "there"], tmp_path / "kept")
    folder = tmp_path / "kept" / "nano-hard-guide-0"
    names = ["environment.json", "metrics.jsonl", "predictions.safetensors", "resolved.yaml", "status.json"]
    assert sorted(path.name for path in folder.iterdir()) == names
    for path in folder.iterdir():
        assert not [
            word for word in (HOME, "home", "myhost", "somebody", str(tmp_path)) if word.encode() in path.read_bytes()
        ]
    recipe = read_recipe(folder)
    assert recipe == load("results/recipes/nano-hard-guide.yaml")  # as anybody would run it
    status = json.loads((folder / "status.json").read_text())
    assert status["teacher_weights"] == {"teacher.th": "12" * 32}
    assert status["training_seconds"] == 10 * EPOCHS  # without the time until a control was ready
    assert set(json.loads((folder / "environment.json").read_text())) == {
        "python", "device", "device_name", "precision", "threads", "commit",
    }  # fmt: skip


def test_decisions_stay_and_a_teacher_is_kept_once(tmp_path: Path, make_cell: MakeCell) -> None:
    runs = [make_cell("nano-hard-guide", seed) for seed in (0, 1)]
    kept = tmp_path / "kept"
    collect([tmp_path / "there"], kept)
    for seed, run in enumerate(runs):
        before, after = read_run(run), read_run(kept / f"nano-hard-guide-{seed}")
        assert after.predictions.logits.keys() == {"student.fused"}
        assert np.array_equal(before.predictions.labels, after.predictions.labels)
        for head, logits in after.predictions.logits.items():
            assert logits.dtype == np.float16
            assert np.array_equal(logits.argmax(1), before.predictions.logits[head].argmax(1))
    (teacher,) = (kept / "teachers").iterdir()
    assert teacher.stem == TEACHER_SHA[:16]
    (logits,) = read_predictions(teacher).logits.values()
    assert np.array_equal(logits.argmax(1), read_run(runs[0]).predictions.logits["teacher"].argmax(1))


def test_half_precision_does_not_decide_anew() -> None:
    logits = np.array(
        [[1.0, 1.0001, 0.0], [1.0001, 1.0, 0.0], [-3.0, -2.99995, -2.9999], [0.0, 1e-9, -1.0]], np.float32
    )
    assert (logits.astype(np.float16).argmax(1) != logits.argmax(1)).sum() == 3
    half = halved(logits)
    assert half.dtype == np.float16
    assert half.argmax(1).tolist() == [1, 0, 2, 1]
    assert np.abs(half.astype(np.float64) - logits).max() < 0.003


def test_a_cell_that_is_there_stays_and_collecting_again_gives_the_same_bytes(
    tmp_path: Path, make_cell: MakeCell
) -> None:
    make_cell("nano-hard-guide", 0)
    collect([tmp_path / "there"], tmp_path / "one")
    collect([tmp_path / "there"], tmp_path / "two")
    files = [path.relative_to(tmp_path / "one") for path in (tmp_path / "one").rglob("*") if path.is_file()]
    assert len(files) == 6
    for file in files:
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()
    marked = tmp_path / "one" / "nano-hard-guide-0" / "status.json"
    marked.write_text("mine")
    collect([tmp_path / "there"], tmp_path / "one")
    assert marked.read_text() == "mine"


def test_metrics_are_one_line_of_training_an_epoch() -> None:
    events = metrics_lines(True)
    kept = thinned(events, {"step": 10, "weights": "ema"})
    assert [line["loss"] for line in kept if line["event"] == "train"] == [7.5] * EPOCHS  # of 5 and 10
    assert [line["epoch"] for line in kept if line["event"] == "train"] == [1.0, 2.0, 3.0, 4.0]
    for kind, count in (("start", 1), ("preflight", 1), ("epoch", EPOCHS), ("eval", 2 * EPOCHS + 1), ("checkpoint", 0)):
        assert sum(line["event"] == kind for line in kept) == count
    times = [line["time"] for line in kept]
    assert times == sorted(times)


def test_a_long_run_stays_small_and_keeps_what_was_chosen() -> None:
    kept = thinned(metrics_lines(True, epochs=300), {"step": 1370, "weights": "raw"})
    assert [line["epoch"] for line in kept if line["event"] == "train"] == [
        float(epoch) for epoch in range(10, 301, 10)
    ]
    evaluated = {line["epoch"] for line in kept if line["event"] == "eval"}
    assert evaluated == {*range(10, 301, 10), 137}
    assert sum(len(json.dumps(line)) + 1 for line in kept) < 30_000


def test_paths_outside_the_project_are_cut_to_their_last_part() -> None:
    texts = {
        "/home/me/data": "data", "../shared/w.th": "w.th", "~/x/y.th": "y.th",
        "local-dir:/a/b/export: 2 M": "local-dir:export: 2 M",
        "data.root=/a/b c": "data.root=b c", "recipes/cifar10/nano.yaml": "recipes/cifar10/nano.yaml",
        "https://host/a/b": "https://host/a/b", "local-dir:runs/t/export": "local-dir:runs/t/export", "1/2": "1/2",
    }  # fmt: skip
    assert portable(list(texts)) == list(texts.values())
    assert portable({"a": ["/x/y", 1, None]}) == {"a": ["y", 1, None]}


def test_a_real_campaign_runs_is_skipped_and_is_collected(
    tmp_path: Path, toy: Toy, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(campaign, "COLLECTED", tmp_path / "kept")
    monkeypatch.setattr(campaign.os, "environ", environment())
    monkeypatch.setattr(campaign.signal, "signal", lambda *_: None)
    (tmp_path / "toy.yaml").write_text(f"base: {toy.recipe}\ntrain: {{epochs: 1}}\n")
    monkeypatch.setitem(ARMS, "toy", tmp_path / "toy.yaml")
    monkeypatch.setitem(PLAN.campaigns, "cpu", [Cells(arms=["toy"], seeds=[0])])
    arguments = ["cpu", "--runs", str(tmp_path / "runs"), f"teacher.weights={toy.teacher}"]
    assert campaign.main(arguments) == 0, (tmp_path / "runs" / "toy-0.log").read_text()
    assert "toy-0: finished" in capsys.readouterr().out
    collect([tmp_path / "runs"], tmp_path / "kept")
    for path in (tmp_path / "kept").rglob("*"):
        for word in (tmp_path, toy.root, Path.home(), campaign.os.uname().nodename):
            assert path.is_dir() or str(word).encode() not in path.read_bytes(), (path, word)
    assert identity(read_recipe(tmp_path / "kept" / "toy-0")) == identity(load_arm("toy", 0))
    for file in (tmp_path / "runs").rglob("status.json"):
        file.unlink()  # what is collected need not be there any more
    assert campaign.main(arguments) == 0
    assert "1 of 1 cells are there already" in capsys.readouterr().out
