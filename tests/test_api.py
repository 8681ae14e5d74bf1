"""The Python API: what goes in, what comes out, and that nothing is left behind."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

import distill
from tests.conftest import environment

ROOT = Path(__file__).resolve().parents[1]
RECIPE: dict[str, Any] = {
    "name": "held",
    "data": {"validation": 0.25, "resolution": 8, "augment": {"hflip": True}, "background": [0, 0, 128]},
    "teacher": {"min_accuracy": 0.0},
    "student": {"model": "vit_nano", "patch_size": 4, "drop_path": 0.1},
    "distill": [{"method": "hard", "weight": 0.5}],
    "optim": {"warmup_epochs": 0},
    "train": {"epochs": 20, "batch_size": 16, "log_every": 1, "max_steps": 2},
}
CONTRACT = distill.Contract((0.5, 0.5, 0.5), (0.25, 0.25, 0.25), 8)


def split(size: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Images uint8 [size, 3, 8, 8] of 4 classes told apart by brightness, and their labels."""
    labels = torch.arange(size) % 4
    noise = torch.randint(0, 64, (size, 3, 8, 8), generator=torch.Generator().manual_seed(seed))
    return (noise + 60 * labels.view(-1, 1, 1, 1)).to(torch.uint8), labels


def held() -> dict[str, Any]:
    return {"train": split(96), "test": split(40, seed=1), "classes": ["a", "b", "c", "d"]}


def network() -> nn.Module:
    """An untrained classifier with dropout and a batch norm, in training mode."""
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        layers = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Dropout(), nn.Linear(288, 4)
    torch.set_default_dtype(dtype)
    return nn.Sequential(*layers)


def recipe(**train: Any) -> dict[str, Any]:
    return RECIPE | {"train": RECIPE["train"] | train}


@pytest.fixture(autouse=True)
def in_an_empty_folder_without_the_fresh_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """tests/test_export.py is where the fresh process that reads an export is tested."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("distill.exports.folder._compare_with_reloaded", lambda *args: None)


def state_of_the_process() -> dict[str, Any]:
    """All that a call must leave as it was."""
    log = logging.getLogger("distill")
    return {
        "environment": {name: value for name, value in os.environ.items() if name != "PYTEST_CURRENT_TEST"},
        "handlers": {int(number): signal.getsignal(number) for number in signal.valid_signals()},
        "threads": {thread.name for thread in threading.enumerate()},
        "children": multiprocessing.active_children(),
        "log": (log.level, log.propagate, list(log.handlers), list(log.filters)),
        "python": random.getstate(),
        "numpy": str(np.random.get_state()),  # noqa: NPY002
        "torch": torch.get_rng_state().tolist(),
        "settings": (
            torch.get_num_threads(), torch.get_default_dtype(), torch.empty(0).device, torch.is_grad_enabled(),
            torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled(),
            torch.backends.cudnn.deterministic, torch.utils.deterministic.fill_uninitialized_memory,  # type: ignore[attr-defined]
        ),
        "accelerate": [dict(kind._shared_state) for kind in (PartialState, AcceleratorState, GradientState)],
        "group": torch.distributed.is_initialized(),
        "folder": os.getcwd(),
    }  # fmt: skip


@pytest.fixture
def unchanged() -> Iterator[None]:
    """The process is as before behind the test, though its settings are unusual ones."""
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    torch.set_default_dtype(torch.float64)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    torch.manual_seed(random.randrange(1000))
    AcceleratorState._reset_state()
    Accelerator(mixed_precision="bf16")
    try:
        before = state_of_the_process()
        yield
        after = state_of_the_process()
        for key, value in before.items():
            assert after[key] == value, key
    finally:
        torch.set_num_threads(threads)
        AcceleratorState._reset_state()
        torch.set_default_dtype(torch.float32)
        torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> distill.Run:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("distill.exports.folder._compare_with_reloaded", lambda *args: None)
        out = tmp_path_factory.mktemp("finished") / "run"
        return distill.train(RECIPE, out=out, data=held(), teacher=(network(), CONTRACT))


# What comes out


def test_a_run_tells_what_it_did(finished: distill.Run) -> None:
    assert str(finished.path) in repr(finished)
    assert finished.status["state"] == "finished"
    assert [line["step"] for line in finished.metrics("train")] == [1, 2]
    assert [line["event"] for line in finished.metrics()][:2] == ["start", "preflight"]
    (test,) = [line for line in finished.metrics("eval") if line["split"] == "test"]
    found = finished.predictions()
    assert found.keys() == {"labels", "student.fused", "student.cls", "student.dist", "teacher"}
    assert torch.equal(found["labels"], held()["test"][1])
    right = (found["student.fused"].argmax(1) == found["labels"]).float().mean()
    assert test["student/top1"] == pytest.approx(100 * right.item())
    reference = network().eval()
    normal = (held()["test"][0] / 255 - 0.5) / 0.25
    torch.testing.assert_close(found["teacher"], reference(normal), rtol=0, atol=1e-4)
    assert (finished.path / "report.html").is_file()


def test_the_student_of_a_run_answers_as_it_did(finished: distill.Run) -> None:
    student = finished.student()
    images, _ = held()["test"]
    pictures = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in images]
    logits = student.model(torch.stack([student.transform(picture) for picture in pictures]))
    torch.testing.assert_close(logits, finished.predictions()["student.fused"], rtol=0, atol=1e-4)
    assert student.labels == ["a", "b", "c", "d"]
    shares = logits.softmax(1)
    for classes, share in zip(distill.predict(student, pictures), shares, strict=True):
        assert [probability for _, probability in classes] == pytest.approx(sorted(share.tolist(), reverse=True))
        assert classes[0][0] == student.labels[int(share.argmax())]
    transparent, background = Image.new("RGBA", (9, 8)), Image.new("RGB", (9, 8), (0, 0, 128))
    assert torch.equal(student.transform(transparent), student.transform(background))
    assert "transparent pixels laid on\nrgb(0, 0, 128)." in (finished.path / "export" / "README.md").read_text()
    pictures[0].save("one.png")
    assert distill.predict(finished.path / "export", ["one.png"]) == distill.predict(student, pictures[:1])


@pytest.mark.usefixtures("unchanged")
def test_a_run_is_evaluated_exported_and_compared(finished: distill.Run, tmp_path: Path) -> None:
    before = load_file(finished.path / "predictions.safetensors")
    measured = distill.evaluate(finished, data=held(), teacher=(network(), CONTRACT))
    (test,) = [line for line in finished.metrics("eval") if line["split"] == "test"]
    assert {name: metrics.top1 for name, metrics in measured.items()} == {
        "student.fused": test["student/top1"], "student.cls": test["student.cls/top1"],
        "student.dist": test["student.dist/top1"], "teacher": test["teacher/top1"],
    }  # fmt: skip
    after = load_file(finished.path / "predictions.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert distill.export(finished, tmp_path / "cls", head="cls") == tmp_path / "cls"
    assert distill.load_student(tmp_path / "cls").labels == ["a", "b", "c", "d"]
    report = distill.compare([finished], tmp_path / "report.html")
    assert report.files[0] == tmp_path / "report.html"
    assert {row.model for row in report.comparison.rows} == {"teacher", "student"}
    assert finished.report().comparison.rows == report.comparison.rows


@pytest.mark.usefixtures("unchanged")
def test_teachers_are_loaded_and_evaluated_by_name(toy: Any) -> None:
    teacher = distill.load_teacher({"model": "cifar_resnet20", "weights": str(toy.teacher)}, 4)
    assert teacher(torch.zeros(2, 3, 32, 32, dtype=torch.float32)).shape == (2, 4)
    overrides = [f"teacher.weights={toy.teacher}", "data.name=toy.safetensors", f"data.root={toy.root}"]
    assert distill.evaluate("cifar_resnet20", overrides=overrides).keys() == {"teacher"}
    with pytest.raises(distill.InputError, match="no teacher to evaluate"):
        distill.evaluate({"name": "alone", "data": {"name": "digits"}})


def test_what_is_no_run_is_said(tmp_path: Path) -> None:
    with pytest.raises(distill.InputError, match=r"not a run directory \(it has no status.json\)"):
        distill.Run(tmp_path)
    with pytest.raises(AttributeError, match="module 'distill' has no attribute 'trian'"):
        distill.trian  # type: ignore[attr-defined]  # noqa: B018


def test_importing_takes_no_torch() -> None:
    """And the functions are not replaced by modules of their names, whatever is imported."""
    code = """
        import sys, distill
        assert {"train", "Run", "Contract"} <= set(dir(distill))
        distill.InputError, distill.Recipe
        assert "torch" not in sys.modules
        import distill.pipeline, distill.dry_run, distill.evaluate_command
        import distill.exports.command, distill.sweeps.command
        print([name for name in distill.__all__ if not callable(getattr(distill, name))])
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (0, "[]\n"), done.stderr


# What is left behind: nothing


def export_of(run: distill.Run) -> bytes:
    return (run.path / "export" / "model.safetensors").read_bytes()


SCRIPT = """
    import sys
    sys.path.insert(0, {root!r})
    import distill
    from tests.test_api import CONTRACT, held, network, recipe

    run = distill.train(recipe(max_steps=3), out="alone", data=held(), teacher=(network(), CONTRACT))
    assert run.status["state"] == "finished"
"""


def write(script: str, path: Path) -> Path:
    path.write_text(textwrap.dedent(script).format(root=str(ROOT)))
    return path


@pytest.mark.soak
@pytest.mark.usefixtures("unchanged")
def test_runs_in_one_process_are_those_of_processes_of_their_own(tmp_path: Path) -> None:
    """One that finishes, one that is refused, one that fails, then the one in question, beside a plain script."""
    teacher = network()
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    first = distill.train(RECIPE | {"seed": 3}, out="first", data=held(), teacher=(teacher, CONTRACT))
    with pytest.raises(distill.InputError, match=r"student\.model"):
        distill.train(
            RECIPE | {"student": {"model": "vit_nan"}}, out="refused", data=held(), teacher=(teacher, CONTRACT)
        )
    with pytest.raises(distill.RunFailed, match="max_bad_steps=2 in a row"):
        distill.train(
            recipe(max_bad_steps=2, max_steps=9), out="failed", overrides=["optim.lr=1e30", "optim.clip_grad=null"],
            data=held(), teacher=(teacher, CONTRACT),
        )  # fmt: skip
    assert distill.Run("failed").status["state"] == "failed"
    second = distill.train(recipe(max_steps=3), out="second", data=held(), teacher=(teacher, CONTRACT))
    done = subprocess.run(
        [sys.executable, write(SCRIPT, tmp_path / "script.py")], env=environment(), capture_output=True, text=True,
        timeout=280, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert export_of(second) == export_of(distill.Run("alone"))
    assert export_of(second) != export_of(first)
    assert teacher.training
    assert all(parameter.requires_grad for parameter in teacher.parameters())
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())


def test_one_call_at_a_time() -> None:
    class Nested(Dataset[Any]):
        def __len__(self) -> int:
            return 8

        def __getitem__(self, index: int) -> Any:
            with pytest.raises(distill.InputError, match="another run, evaluation or export is active in this process"):
                distill.train(RECIPE, data=held())
            raise RuntimeError("looked")

    with pytest.raises(
        distill.InputError, match=r"train\[0\] cannot be read as \(image, label\) \(RuntimeError: looked"
    ):
        distill.train(RECIPE, data=(Nested(), Nested()))


# Stopping, threads and going on


def when(path: Path, text: str, action: Callable[[], object]) -> threading.Thread:
    """Act, on another thread, once the file at `path` has this text in it."""

    def watch() -> None:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            if path.exists() and text in path.read_text():
                action()
                return
            time.sleep(0.01)

    thread = threading.Thread(target=watch)
    thread.start()
    return thread


@pytest.mark.usefixtures("unchanged")
def test_ctrl_c_saves_and_what_was_handed_over_is_asked_for_again(tmp_path: Path) -> None:
    asked, teacher = recipe(max_steps=40, ema=0.9), (network(), CONTRACT)
    watch = when(tmp_path / "run/metrics.jsonl", '"step": 3,', lambda: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(distill.Interrupted, match="SIGINT"):
        distill.train(asked, out="run", data=held(), teacher=teacher)
    watch.join()
    run = distill.Run("run")
    assert run.status["state"] == "interrupted"
    assert 3 <= run.status["step"] < 40

    def resumed(**given: Any) -> distill.Run:
        return distill.train(asked, out="run", resume="auto", **given)

    needs = {"data": held(), "teacher": teacher}
    for missing, words in (("data", r"data=\.\.\."), ("teacher", r"teacher=\(module, distill\.Contract")):
        with pytest.raises(distill.InputError, match=rf"began with Python objects.* {words}"):
            resumed(**{key: value for key, value in needs.items() if key != missing})
    with pytest.raises(distill.InputError, match="this run began on other data"):
        resumed(data=held() | {"train": split(96, seed=2)}, teacher=teacher)
    other = network()
    nn.init.zeros_(other[0].weight)  # type: ignore[index]
    with pytest.raises(distill.InputError, match="these teacher weights are not those that run began with"):
        resumed(data=held(), teacher=(other, CONTRACT))
    contract = distill.Contract((0.5, 0.5, 0.5), (0.5, 0.5, 0.5), 8)
    with pytest.raises(distill.InputError, match=r"teacher\.std: \[0\.25, 0\.25, 0\.25\] -> \[0\.5, 0\.5, 0\.5\]"):
        resumed(data=held(), teacher=(network(), contract))

    states: list[str] = []
    ended: list[distill.Run] = []
    thread = threading.Thread(target=lambda: ended.append(resumed(**needs)))
    thread.start()  # which gets no signals
    while thread.is_alive():
        states.append(run.status["state"])  # must not let go of the run's lock
        taken = subprocess.run(
            [sys.executable, "-c", "import fcntl; fcntl.lockf(open('run/.lock', 'a'), fcntl.LOCK_EX | fcntl.LOCK_NB)"],
            capture_output=True, check=False,
        )  # fmt: skip
        if run.status["state"] == "running" and thread.is_alive():
            assert taken.returncode != 0
    assert [run.status["state"] for run in ended] == ["finished"]
    assert "running" in states
    assert "killed" not in states
    assert [line["step"] for line in run.metrics("train")] == list(range(1, 41))


@pytest.mark.soak
def test_a_run_without_teacher_and_with_a_time_limit_in_a_script_of_two_processes(tmp_path: Path) -> None:
    script = """
        import os, sys
        sys.path.insert(0, {root!r})
        import torch.distributed, distill
        from tests.test_api import held, recipe

        alone = recipe(max_minutes=1e-6) | {{"teacher": None, "distill": []}}
        try:
            distill.train(alone, out="run", data=held())
        except distill.Interrupted as error:
            assert "time limit" in str(error)
        assert not torch.distributed.is_initialized()
        run = distill.train(alone, out="run", resume="auto", overrides=["train.max_minutes=null"], data=held())
        print(run.status["state"], len(run.metrics("resume")), os.environ["RANK"])
        rank = int(os.environ["RANK"])
        try:
            distill.train(alone, out="other", data=held() | {{"train": tuple(part[rank:] for part in held()["train"])}})
        except distill.InputError as error:
            print("refused:", error)
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    done = subprocess.run(
        [*command, write(script, tmp_path / "script.py")], env=environment(), capture_output=True, text=True,
        timeout=280, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert sorted(line for line in done.stdout.splitlines() if line.startswith("finished")) == [
        "finished 1 0", "finished 1 1",
    ]  # fmt: skip
    assert done.stdout.count("refused: data: not the same on all processes") >= 1
    assert json.loads((tmp_path / "run/environment.json").read_text())["processes"] == 2
    assert not (tmp_path / "other").exists()


@pytest.mark.soak
def test_a_notebook(tmp_path: Path) -> None:
    """Executed by a kernel of its own, where an event loop runs on the main thread."""
    nbclient = pytest.importorskip("nbclient")
    nbformat = pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel")
    cells = [
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "import signal, distill\nfrom tests.test_api import CONTRACT, held, network, recipe\n"
        "handler = signal.getsignal(signal.SIGINT)",
        "run = distill.train(recipe(), out='run', data=held(), teacher=(network(), CONTRACT))\nrun",
        "assert signal.getsignal(signal.SIGINT) is handler\nrun.report().comparison.rows[0].model",
        "distill.train(recipe(), out='run', data=held(), teacher=(network(), CONTRACT))",
    ]
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    kernel = nbclient.NotebookClient(
        book, timeout=200, allow_errors=True, resources={"metadata": {"path": str(tmp_path)}}
    )
    kernel.execute(env=environment() | {"JUPYTER_PLATFORM_DIRS": "1"})
    outputs = [json.dumps(cell["outputs"]) for cell in book["cells"]]
    assert "Run('run'): finished" in outputs[1], outputs
    assert "step 2" in outputs[1]
    assert "teacher" in outputs[2]
    assert "there is a run already, and it is finished" in outputs[3]


# What goes in


class Listed(Dataset[Any]):
    """A Dataset of what it is given; with `targets` and `classes`, as torchvision's have them."""

    def __init__(self, items: Sequence[Any], **attributes: Any) -> None:
        self.items = items
        self.__dict__ |= attributes

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Any:
        return self.items[index]


def pictures(pair: tuple[Tensor, Tensor]) -> list[tuple[Image.Image, int]]:
    return [(Image.fromarray(image.permute(1, 2, 0).numpy()), int(label)) for image, label in zip(*pair, strict=True)]


def first_loss(capsys: pytest.CaptureFixture[str], data: Any, *overrides: str) -> str:
    from distill.api import dry_run

    dry_run(RECIPE, overrides=overrides, data=data, teacher=(network(), CONTRACT))
    return capsys.readouterr().out.rpartition("first step  ")[2]


@pytest.mark.usefixtures("unchanged")
def test_all_forms_of_the_same_data_give_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    train, test = held()["train"], held()["test"]
    expected = first_loss(capsys, held())
    assert expected.startswith("loss ")
    assert first_loss(capsys, (train, test)) == expected
    assert first_loss(capsys, (TensorDataset(*train), TensorDataset(*test))) == expected
    named = {"targets": train[1].tolist(), "classes": ["a", "b", "c", "d"]}
    listed = {"train": Listed(pictures(train), **named), "test": Listed(pictures(test))}
    assert first_loss(capsys, listed) == expected
    stream = "data.stream=true", "data.workers=1"  # which takes ImageNet's statistics for the student
    assert first_loss(capsys, listed, *stream) == first_loss(capsys, dict(listed, train=TensorDataset(*train)), *stream)
    assert not Path("runs").exists()


GREY = Image.new("L", (8, 8))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (split(8), "data: the test split is missing|data: tuple"),
        ({"train": split(8)}, "the test split is missing"),
        ({"train": split(8), "test": split(8), "dev": split(8)}, "no split 'dev'"),
        (7, "data: int; give data="),
        ({"train": split(8), "test": Listed(pictures(split(8)))}, "tensors for train only"),
        ({"train": (split(8)[0] / 255, split(8)[1]), "test": split(8)}, r"train\.images is float32 .* not uint8"),
        ({"train": split(8), "test": (split(8)[0][:7], split(8)[1])}, r"test\.labels is int64 \[8\], not int64 \[7\]"),
        ({"train": split(3), "test": split(8)}, "class '3' has no training image"),
        ({"train": split(8), "test": split(8), "classes": "abc"}, "label 3 in train.labels is out of range"),
        ((Listed([]), Listed(pictures(split(8)))), "train is no map-style Dataset, or is empty"),
        ((iter(()), iter(())), "train is no map-style Dataset"),
        ((Listed([(torch.rand(3, 8, 8), 0)] * 4),) * 2, r"holds torch.float32 \[3, 8, 8\] instead of an image"),
        ((Listed([GREY] * 4),) * 2, r"train\[0\] is Image, not \(image, label\)"),
        ((Listed([(GREY, "cat")] * 4),) * 2, "has the label 'cat'; labels are whole numbers"),
        ((Listed([(GREY, torch.eye(4)[1])] * 4),) * 2, r"has the label tensor\(.*labels are whole numbers"),
        ((Listed([{"image": GREY, "label": 1}] * 4),) * 2, r"\[0\] is a mapping of image, label, not \(image, label\)"),
        ((Listed([(GREY, 0)] * 4),) * 2, "at least two different ones are needed"),
        ((Listed([(Image.new("F", (8, 8)), 0)] * 4),) * 2, "pixels of PIL mode F"),
    ],
)  # fmt: skip
def test_data_that_cannot_be_used_are_refused(data: Any, message: str) -> None:
    with pytest.raises(distill.InputError, match=message):
        distill.train(RECIPE, data=data, teacher=(network(), CONTRACT))
    assert not Path("runs").exists()


def test_a_dataset_that_draws_or_contradicts_itself_is_refused() -> None:
    class Drawing(Listed):
        def __getitem__(self, index: int) -> Any:
            return torch.randint(0, 256, (3, 8, 8), dtype=torch.uint8), index % 4

    given = {"teacher": (network(), CONTRACT)}
    with pytest.raises(distill.InputError, match=r"train\[0\] differs when it is read again"):
        distill.train(RECIPE, data=(Drawing(range(8)), Drawing(range(8))), **given)
    lying = Listed(pictures(split(96)), targets=[0] * 48 + [1] * 48)
    overrides = ["data.stream=true", "data.workers=0"]
    with pytest.raises(distill.InputError, match=r"train\[\d+\] has the label \d, the Dataset's `targets` say \d"):
        distill.train(RECIPE, data=(lying, Listed(pictures(split(40)))), overrides=overrides, **given)
    with pytest.raises(distill.InputError, match=r"data\.stream: tensors are held in memory"):
        distill.train(RECIPE, data=held(), overrides=overrides, **given)


class Uncopyable(nn.Module):
    def __deepcopy__(self, memo: object) -> Any:
        raise TypeError("one of a kind")


@pytest.mark.parametrize(
    ("teacher", "message"),
    [
        (network(), r"teacher: give \(module, distill\.Contract"),
        ((network(), (0.5, 0.5)), r"teacher: give \(module, distill\.Contract"),
        ((network(), distill.Contract((0.5,), (0.0,))), r"teacher\.std: deviations are above 0"),
        ((network(), distill.Contract((0.5,) * 3, (0.5,) * 3, 9)), "teacher python: cannot take its inputs"),
        ((nn.Sequential(*network()[:-1]), CONTRACT), "teacher python: no classifier of 4 classes"),
        ((Uncopyable(), CONTRACT), r"teacher: the module cannot be copied \(TypeError: one of a kind"),
    ],
)  # fmt: skip
def test_teachers_that_cannot_be_used_are_refused(teacher: Any, message: str) -> None:
    with pytest.raises(distill.InputError, match=message):
        distill.train(RECIPE, data=held(), teacher=teacher)
    assert not Path("runs").exists()


def test_preflight_judges_a_teacher_from_python() -> None:
    with pytest.raises(distill.InputError, match=r"teacher python: .* below the required 99\.00%"):
        distill.train(
            RECIPE, overrides=["teacher.min_accuracy=0.99"], data=held(), teacher=(network(), CONTRACT)
        )  # fmt: skip
    assert not Path("runs").exists()


def test_the_name_python_needs_python_code(command: Any, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("data: {name: python}\nteacher: {model: python}\n")
    refused = command("train", "recipe.yaml")
    assert refused.returncode == 2
    assert "data.name: 'python' needs data from Python code" in refused.stderr
    with pytest.raises(distill.InputError, match=r"teacher\.model: 'python' needs a module"):
        distill.train("recipe.yaml", overrides=["data.resolution=8", "student.patch_size=4"], data=held())
