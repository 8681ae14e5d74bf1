"""`distill runs` and `distill show`: what run directories say of themselves."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from distill.cli import main
from distill.listing import listed, runs_under

PUBLISHED = Path(__file__).resolve().parents[1] / "results" / "runs"


def change(run: Path, **status: Any) -> None:
    file = run / "status.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | status))


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """A finished run with a control, one that was killed, one whose status is damaged, and other folders."""
    shutil.copytree(PUBLISHED / "nano-guide-0", tmp_path / "runs" / "good")
    shutil.copytree(PUBLISHED / "nano-control-0", tmp_path / "runs" / "good" / "control")
    shutil.copytree(PUBLISHED / "nano-hard-1", tmp_path / "runs" / "deep" / "killed")
    updated = datetime.fromtimestamp(time.time() - 7200, UTC).strftime("%Y-%m-%dT%H:%M:%S%z")
    change(tmp_path / "runs" / "deep" / "killed", state="running", updated=updated, epoch=2.5)
    shutil.copytree(PUBLISHED / "nano-hard-2", tmp_path / "runs" / "odd\x1b[31m")
    (tmp_path / "runs" / "odd\x1b[31m" / "status.json").write_text('{"state": 7}')
    (tmp_path / "runs" / "good" / "checkpoints" / "status").mkdir(parents=True)
    (tmp_path / "runs" / "notes").mkdir()
    return tmp_path / "runs"


def test_all_runs_are_found_and_described(runs: Path) -> None:
    found = {str(path.relative_to(runs)): listed(path) for path in runs_under(runs)}
    assert list(found) == ["deep/killed", "good", "good/control", "odd\x1b[31m"]
    killed, good, control, odd = found.values()
    assert (killed.state, killed.age, killed.epoch) == ("killed", "2 h", "2.5 of 6")
    lines = [json.loads(line) for line in (runs / "deep/killed/metrics.jsonl").read_text().splitlines()]
    newest = [line for line in lines if line["event"] == "eval"][-1]
    assert killed.accuracy == f"{newest['student/top1']:.2f} test"
    status = json.loads((runs / "good" / "status.json").read_text())
    assert good.state == "finished"
    assert good.accuracy == f"{status['metrics']['student/top1']:.2f}"
    assert (good.teacher, good.parameters) == ("cifar_resnet20", f"{status['parameters']['student'] / 1e6:.2f} M")
    assert control.teacher == "none"
    assert odd.state == "unreadable"


def test_a_run_that_a_living_process_holds_is_running(runs: Path) -> None:
    path = runs / "deep" / "killed"
    code = (
        "import fcntl, sys, time; file = open(sys.argv[1], 'w'); fcntl.lockf(file, fcntl.LOCK_EX);"
        "print('held', flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code, path / ".lock"], stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        assert listed(path).state == "running"
        holder.kill()
    assert listed(path).state == "killed"


def test_the_commands_print_it(runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(runs.parent)
    assert main(["runs"]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in ("deep/killed", "good/control", "cifar_resnet20"))
    assert "\x1b[31m" not in printed
    assert all(len(line) <= 80 for line in printed.splitlines())
    assert main(["show", "runs/good"]) == 0
    shown = {line.split()[0]: line.split(maxsplit=1)[1].strip() for line in capsys.readouterr().out.splitlines()}
    assert shown["teacher"] == "cifar_resnet20"
    assert shown["methods"] == "guide"
    assert shown["student/top1"].startswith(listed(runs / "good").accuracy)
    assert "go" not in shown


@pytest.mark.parametrize(
    ("command", "begins"),
    [
        (["distill/train.py", "r.yaml", "seed=1", "--out", "elsewhere", "--resume", "auto"],
         "accelerate launch distill/train.py r.yaml seed=1"),
        (["/x/distill/train.py", "r.yaml"], "accelerate launch -m distill.train r.yaml"),
        (["/x/distill/cli.py", "train", "r.yaml"], "distill train r.yaml"),
        (["/bin/distill", "train", "r.yaml", "--out=elsewhere", "--plugin", "p q.py"],
         "distill train r.yaml --plugin 'p q.py'"),
    ],
)  # fmt: skip
def test_a_killed_run_says_how_to_go_on(
    command: list[str], begins: str, runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("distill.console.console.width", 200)
    file = runs / "deep" / "killed" / "environment.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"command": command}))
    monkeypatch.chdir(runs)
    assert main(["show", "deep/killed"]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("go on")]
    assert line.removeprefix("go on").strip() == f"{begins} --out deep/killed --resume auto"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["runs", "nowhere"], "nowhere: no such folder"), (["runs", "empty"], "empty: no runs in it"),
     (["show", "empty"], "empty: not a run directory")],
)  # fmt: skip
def test_where_no_runs_are(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_it_takes_no_torch(runs: Path) -> None:
    code = f"import sys; from distill.cli import main; main(['runs', {str(runs)!r}]); sys.exit('torch' in sys.modules)"
    root = str(Path(__file__).resolve().parents[1])
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | {"PYTHONPATH": root})
