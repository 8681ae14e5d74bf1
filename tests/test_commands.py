"""The commands, from the ways to start one to what each prints and writes."""

from __future__ import annotations

import json
import logging
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import timm
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file

import distill.exports.folder
from distill import api, cli
from distill.cli import main
from distill.cores import cores
from distill.recipe import load
from tests.conftest import Command, Toy, environment, image_folder

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "distill" / "train.py"


@pytest.fixture(autouse=True)
def surroundings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An empty working directory; commands in this process leave its threads and its log as they were."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(distill.exports.folder, "_compare_with_reloaded", lambda *args: None)
    log = logging.getLogger("distill")
    before = log.level, log.propagate, list(log.handlers), torch.get_num_threads()
    yield
    log.level, log.propagate, log.handlers = before[:3]
    torch.set_num_threads(before[3])


def start(*arguments: object, cwd: Path, stdin: str = "") -> subprocess.CompletedProcess[str]:
    """Python with these arguments, under the one thread that `accelerate launch` gives, and no terminal's width."""
    given = {key: value for key, value in environment(OMP_NUM_THREADS="1").items() if key != "COLUMNS"}
    return subprocess.run(
        [sys.executable, *map(str, arguments)], cwd=cwd, env=given, input=stdin,
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip


def tree(*folders: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for folder in folders for path in folder.rglob("*")}


# Ways to start


@pytest.mark.parametrize("name", sorted(cli.COMMANDS))
def test_every_command_explains_itself(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([name, "--help"])
    assert ended.value.code == 0
    printed = capsys.readouterr().out
    assert printed.startswith(f"usage: distill {name} ")
    assert "key=value [" not in printed


def test_what_goes_into_a_pipe_is_wide(toy: Toy, tmp_path: Path) -> None:
    """rich takes 80 columns there, and cuts what is longer."""
    run = tmp_path / "runs" / f"a-name-of-some-{'sixty-' * 10}characters"
    run.mkdir(parents=True)
    (run / "status.json").write_text('{"state": "finished", "metrics": {"student/top1": 12.25}}')
    (run / "resolved.yaml").write_text(load(toy.recipe).to_yaml())
    printed = start("-m", "distill.cli", "runs", cwd=tmp_path).stdout
    assert any(run.name in line and "12.25" in line for line in printed.splitlines())


def test_all_ways_to_start_lead_to_the_same_place(tmp_path: Path) -> None:
    """`python -i` goes on behind the script: nothing in distill/ may be importable by its file name."""
    look = "import importlib.util as u; print([n for n in ('inputs', 'run', 'trainer', 'optim') if u.find_spec(n)])\n"
    ways = [("-i", SCRIPT), ("-i", "-m", "distill.train"), ("-i", "-m", "distill.cli", "train")]
    for way in ways:
        result = start(*way, "--out", "run", "nowhere.yaml", "seed=1", cwd=tmp_path, stdin=look)
        assert "error: nowhere.yaml: cannot read the recipe: no such file" in result.stderr, result.stderr
        assert "SystemExit: 2" in result.stderr
        assert result.stdout.strip() == "[]"
    script = Path(sys.executable).with_name("distill")
    result = subprocess.run([script, "train", "nowhere.yaml"], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr.count("error: nowhere.yaml: cannot read")) == (2, 1)


@pytest.mark.parametrize(
    "arguments",
    [
        "{} seed=1 train.epochs=2 --out there --resume auto --dry-run",
        "--dry-run --resume auto {} --out there seed=1 train.epochs=2",
        "--out there {} seed=1 --dry-run train.epochs=2 --resume=auto",
        "--out there seed=1 {} train.epochs=2 --resume auto --dry-run",
    ],
)
def test_options_come_in_any_order(arguments: str, toy: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    answer = SimpleNamespace(path=Path("there"))
    for name in ("dry_run", "train"):
        monkeypatch.setattr(api, name, lambda *args, name=name, **kwargs: seen.append((name, args, kwargs)) or answer)
    monkeypatch.setattr(cli, "_show", lambda path: seen.append(path))
    words = arguments.format(toy.recipe).split()
    assert main(["train", *words]) == 0
    assert main(["train", *(word for word in words if word != "--dry-run")]) == 0
    overrides = ["seed=1", "train.epochs=2"]
    expected = {"out": Path("there"), "resume": "auto", "overrides": overrides, "plugins": []}
    assert seen == [
        ("dry_run", (str(toy.recipe),), {"overrides": overrides}),
        ("train", (str(toy.recipe),), expected),
        Path("there"),
    ]


# A run by the real command, as a file, from another folder


@pytest.fixture(scope="module")
def launched(toy: Toy, tmp_path_factory: pytest.TempPathFactory) -> subprocess.CompletedProcess[str]:
    folder = tmp_path_factory.mktemp("launched")
    overrides = ("train.max_steps=3", "control=true", "data.augment.mix_off_epoch=9", "report.analysis=full")
    result = start(SCRIPT, "--out", "run", toy.recipe, *overrides, cwd=folder)
    assert result.returncode == 0, result.stdout + result.stderr
    result.args = folder / "run"
    return result


@pytest.fixture
def finished(launched: subprocess.CompletedProcess[str], tmp_path: Path) -> Path:
    """A copy of its run directory."""
    shutil.copytree(launched.args, tmp_path / "run", symlinks=True)
    return tmp_path / "run"


def test_a_run_ends_with_its_table_and_its_paths(launched: subprocess.CompletedProcess[str], finished: Path) -> None:
    assert {path.name for path in finished.iterdir()} - {".lock"} == {
        "recipe.yaml", "resolved.yaml", "environment.json", "status.json", "metrics.jsonl", "train.log", "checkpoints",
        "predictions.safetensors", "export", "report.html", "report.md", "report.json", "report-loss.svg",
        "report-top1.svg", "control", "analysis.json", "analysis.safetensors",
    }  # fmt: skip
    for row in ("teacher", "student, both heads", "student, class head", "student, dist. head", "control, both heads"):
        assert row in launched.stdout
    for what, name in (("student", "run/export"), ("report", "run/report.html"), ("run", "run")):
        assert re.search(rf"^{what} +{name}$", launched.stdout, re.MULTILINE)
    log = (finished / "train.log").read_text()
    assert "preflight: teacher top-1" in launched.stdout
    assert all(f"step {step}  epoch" in log for step in (1, 2, 3))
    assert "mix_off_epoch: epoch 9 is not reached" in log
    assert "normal" not in launched.stderr
    assert "Traceback" not in launched.stderr


def test_the_process_takes_free_cores_whatever_the_launcher_set(finished: Path) -> None:
    found = json.loads((finished / "environment.json").read_text())
    assert found["processes"] == 1
    assert 1 <= found["threads"] <= found["cores"] == cores()


def correct(run: Path, name: str) -> str:
    found = load_file(run / "predictions.safetensors")
    return f"{int((found[name].argmax(1) == found['labels']).sum())} of 50"


def test_evaluate_a_run(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = finished / "predictions.safetensors"
    before = load_file(file)
    counts = {name: correct(finished, name) for name in before if name != "labels"}
    file.unlink()
    assert main(["evaluate", str(finished)]) == 0
    after = load_file(file)
    assert before.keys() == after.keys()
    for name in before:
        torch.testing.assert_close(after[name], before[name], rtol=0, atol=1e-5, msg=name)
    printed = capsys.readouterr().out
    for name, count in counts.items():
        assert re.search(rf"{re.escape(name)} .*{count}", printed), printed


def test_evaluating_keeps_what_predictions_say_of_their_origin(finished: Path) -> None:
    def metadata() -> dict[str, str]:
        with safe_open(finished / "predictions.safetensors", "pt") as file:
            return file.metadata()

    before = metadata()
    assert before.keys() >= {"step", "weights", "run", "teacher"}
    assert main(["evaluate", str(finished)]) == 0
    assert metadata() == before


def test_evaluate_a_teacher_by_its_name_and_by_a_recipe(
    finished: Path, toy: Toy, capsys: pytest.CaptureFixture[str]
) -> None:
    data = ["data.name=toy.safetensors", f"data.root={toy.root}"]
    assert main(["evaluate", "cifar_resnet20", *data, f"teacher.weights={toy.teacher}"]) == 0
    named = capsys.readouterr().out
    assert main(["evaluate", data[0], "cifar_resnet20", data[1], f"teacher.weights={toy.teacher}"]) == 0
    assert capsys.readouterr().out == named
    assert correct(finished, "teacher") in named
    assert "inputs" in named, "the input contract is printed"
    assert main(["evaluate", str(toy.recipe)]) == 0
    assert capsys.readouterr().out == named
    assert main(["evaluate", str(toy.recipe), "teacher=null", "distill=[]"]) == 2
    assert "has no teacher to evaluate" in capsys.readouterr().err
    shutil.copy(toy.recipe, "cnn.yaml")
    overrides = ["teacher={recipe: cnn.yaml}"]
    assert main(["evaluate", str(toy.recipe), *overrides]) == 2
    assert "cnn.yaml is not trained yet" in capsys.readouterr().err
    assert not Path("runs").exists()


def test_export(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    to = tmp_path / "new" / "student"
    assert main(["export", str(finished), "--to", str(to)]) == 0
    images = torch.randn(3, 3, 8, 8)
    models = [timm.create_model(f"local-dir:{path}", pretrained=True).eval() for path in (finished / "export", to)]
    assert torch.equal(models[0](images), models[1](images))
    assert (to / "config.json").read_bytes() == (finished / "export" / "config.json").read_bytes()
    assert main(["export", "--to", str(to), str(finished)]) == 2
    assert f"--to {to}: exists already" in capsys.readouterr().err
    assert main(["export", str(tmp_path / "none"), "--to", str(tmp_path / "other")]) == 2
    assert "none" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


def test_an_export_is_compared_on_the_images_of_a_folder(
    toy: Toy, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image_folder(tmp_path / "images", "abcd", {"train": 8, "test": 2}, width=8, height=8)
    overrides = ["data.name=folder", f"data.root={tmp_path / 'images'}", "train.max_steps=1", "data.validation=0",
                 "teacher=null", "distill=[]", "report.analysis=none"]  # fmt: skip
    assert main(["train", str(toy.recipe), "--out", "run", *overrides]) == 0
    capsys.readouterr()
    assert main(["export", "run", "--to", "half", "--fp16"]) == 0
    assert "on 8 test images" in capsys.readouterr().out
    (tmp_path / "images" / "test" / "a" / "0.png").unlink()
    assert main(["export", "run", "--to", "again", "--fp16"]) == 0
    assert "not at hand" in capsys.readouterr().out


def test_a_second_export_has_the_card_of_the_first(finished: Path, tmp_path: Path) -> None:
    assert main(["export", str(finished), "--to", str(tmp_path / "again")]) == 0
    first, again = ((path / "README.md").read_text() for path in (finished / "export", tmp_path / "again"))
    assert again.count("library_name: timm") == 1
    assert again.count("## Load it") == 1
    assert again == first


def test_the_export_tells_what_came_of_the_run(finished: Path) -> None:
    """Also of the control, which came after it."""
    found = load_file(finished / "predictions.safetensors")
    percent = f"{2 * int((found['student.fused'].argmax(1) == found['labels']).sum()):.2f}"
    with safe_open(finished / "export" / "model.safetensors", "pt") as file:
        metadata = file.metadata()
    assert metadata["accuracy"] == percent
    assert metadata.keys() >= {"format", "distill_version", "recipe_sha256", "teacher", "teacher_sha256", "run"}
    card = (finished / "export" / "README.md").read_text()
    assert re.search(rf"^\| student, both heads \| {percent} \|", card, re.MULTILINE)
    assert re.search(r"^\| teacher \| ", card, re.MULTILINE)
    assert re.search(r"^\| control, both heads \| ", card, re.MULTILINE)
    assert "distilled from cifar_resnet20" in card


def test_compare(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = tmp_path / "reports" / "both.html"
    assert main(["compare", str(finished), "--out", str(report), str(finished / "control")]) == 0
    assert sorted(path.name for path in report.parent.iterdir()) == [
        "both-loss.svg", "both-top1.svg", "both.html", "both.json", "both.md",
    ]  # fmt: skip
    printed = capsys.readouterr().out
    assert str(report) in printed
    rows = json.loads(report.with_suffix(".json").read_text())["rows"]
    assert {(row["run"], row["model"]) for row in rows} == {
        ("run", "teacher"), ("run", "student"), ("run", "control"), ("control", "control"),
    }  # fmt: skip
    assert main(["compare", "--measure", str(finished), str(finished / "control"), "--out", str(report)]) == 0
    assert "measuring 2 networks" in capsys.readouterr().out
    data = json.loads(report.with_suffix(".json").read_text())
    speeds = {(row["model"], row["latency_ms"]) for row in data["rows"]}
    assert {model for model, _ in speeds} == {"teacher", "student", "control"}
    assert len({speed for model, speed in speeds if model != "teacher"}) == 1
    assert {row["measured_apart"] for row in data["rows"]} == {None}
    assert data["summary"]["facts"]["speeds"].startswith("measured together on ")
    (finished / "status.json").write_text(json.dumps({"state": "interrupted"}))
    assert main(["compare", str(finished)]) == 2
    assert "not finished" in capsys.readouterr().err


def test_teachers_and_validate(toy: Toy, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["teachers"]) == 0
    assert re.search("cifar_resnet20 .*91.73.*measured", capsys.readouterr().out)
    assert main(["teachers", "cifar_resnet56"]) == 0
    shown = capsys.readouterr().out
    assert "93.39" in shown
    assert re.search("layer3 .* 64 .* 8 x 8", shown)
    assert main(["teachers", "torchvision/resnet18", "teacher.size=64"]) == 0
    assert re.search("layer2 .* 128 .* 8 x 8", capsys.readouterr().out)
    assert main(["teachers", str(toy.recipe)]) == 0
    assert re.search("layer1 .* 16 .* 32 x 32", capsys.readouterr().out)
    trained = ROOT / "recipes" / "teachers" / "digits_cnn.yaml"
    assert main(["teachers", str(ROOT / "recipes" / "quickstart.yaml"), f"teacher.recipe={trained}"]) == 0
    shown = capsys.readouterr().out
    assert f"{trained} trains it: cifar_resnet20 at 16 px" in shown
    assert re.search("layer3 .* 64 .* 4 x 4", shown)
    assert "91.73" not in shown
    assert main(["teachers", str(ROOT / "recipes" / "cifar10" / "dino.yaml")]) == 2
    assert "names no model as its teacher" in capsys.readouterr().err
    assert main(["teachers", "resnet57"]) == 2
    assert "'resnet57' is neither in the zoo" in capsys.readouterr().err
    assert main(["validate", str(toy.recipe), "seed=4"]) == 0
    assert capsys.readouterr().out == load(toy.recipe, ["seed=4"]).to_yaml()


# --dry-run


def test_a_dry_run_tells_all_and_writes_nothing(toy: Toy, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = tree(tmp_path, toy.root)
    assert main(["train", str(toy.recipe), "--dry-run", "control=true"]) == 0
    printed = capsys.readouterr().out
    assert tree(tmp_path, toy.root) == before
    assert "cache: null" not in printed, "facts, not the recipe"
    assert len(printed.splitlines()) < 20
    student = timm.create_model("area_vit_nano", num_classes=4, img_size=8, patch_size=4, distilled=True)
    parameters = sum(parameter.numel() for parameter in student.parameters())
    teacher = sum(parameter.numel() for parameter in timm.create_model("cifar_resnet20", num_classes=4).parameters())
    assert f"student {parameters:,}, teacher {teacher:,}" in printed
    assert f"data        toy in {toy.root}, 178 images: train 96, validation 32, test 50" in printed
    assert "classes     4: a, b, c, d" in printed
    assert "images      8 x 8 pixels; colour, 3 channels; each model resizes them to its own size" in printed
    assert f"pack        {toy.root / 'toy.safetensors'}, 0.0 MB" in printed
    assert re.search(r"FLOPs +0\.0\d{3} G", printed)
    assert re.search(r"memory +[\d,]+ MiB", printed)
    assert re.search(r"steps +18, 6 an epoch", printed)
    assert re.search(r"^teacher +cifar_resnet20: 0.27 M .*; preflight \d+\.\d\d %$", printed, re.MULTILINE)
    assert "student     vit_nano, learning by hard 0.25, soft 0.25, labels 0.5" in printed
    assert re.search(r"time +some \d+\.\d minutes of training at \d+ ms a step, and for its control", printed)
    assert "writes      runs/toy-DATE, or --out: checkpoints, export" in printed
    assert re.search(r"loss \d\.\d{4}$", printed, re.MULTILINE)


def test_names_in_brackets_are_printed_as_they_are(
    toy: Toy, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """rich takes [old] for markup unless told otherwise."""
    shutil.copytree(toy.root, tmp_path / "data [old]")
    assert main(["train", str(toy.recipe), "--dry-run", "data.root=data [old]"]) == 0
    assert "toy in data [old], 178 images" in capsys.readouterr().out
    assert main(["export", str(finished), "--to", "student [new]"]) == 0
    assert "student [new]" in capsys.readouterr().out
    assert main(["compare", str(finished), "--out", "report [new].html"]) == 0
    assert "report [new].html" in capsys.readouterr().out


def test_a_dry_run_does_without_a_teacher_that_is_not_trained(
    toy: Toy, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    teacher = toy.mapping(teacher=None, student={}, distill=[], train={"epochs": 7})
    teacher["student"] = {"model": "cifar_resnet20"}
    Path("cnn.yaml").write_text(yaml.safe_dump(teacher))
    overrides = ["teacher={recipe: cnn.yaml}"]
    before = tree(tmp_path, toy.root)
    assert main(["train", str(toy.recipe), "--dry-run", *overrides]) == 0
    printed = capsys.readouterr().out
    assert tree(tmp_path, toy.root) == before
    assert "cnn.yaml is not trained yet" in printed
    assert "student     cifar_resnet20, learning by labels 1" in printed
    assert re.search(r"steps +42, 6 an epoch", printed)
    learning = "student     vit_nano, learning by hard 0.25, soft 0.25, labels 0.5"
    assert learning in printed, "what a run would do, with its teacher"


def test_a_dry_run_without_labels_and_its_teacher_has_its_views(toy: Toy, capsys: pytest.CaptureFixture[str]) -> None:
    teacher = toy.mapping(teacher=None, student={}, distill=[], train={"epochs": 7})
    teacher["student"] = {"model": "cifar_resnet20"}
    Path("cnn.yaml").write_text(yaml.safe_dump(teacher))
    views = "data.views=[{kind: global, count: 2, size: 8}]"
    methods = "distill=[{method: dino, prototypes: 16, hidden: 32, bottleneck: 8}, {method: guide}]"
    changes = [
        views,
        methods,
        "label_weight=0",
        "teacher={recipe: cnn.yaml, ema: {}}",
        "data.augment={}",
        "train.ema=null",
    ]
    assert main(["train", str(toy.recipe), "--dry-run", *changes]) == 0
    loss = re.findall(r"first step  loss ([\d.]+)", capsys.readouterr().out)[-1]
    assert float(loss) > 0.1  # of dino alone; without it nothing is learned


def test_a_dry_run_whose_loss_is_not_finite_fails(toy: Toy, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", str(toy.recipe), "--dry-run", "label_weight=1e39"]) == 3
    assert "the first step: the loss or its gradients are not finite" in capsys.readouterr().err


def test_a_dry_run_is_refused_as_a_run_would_be(toy: Toy, tmp_path: Path, command: Command) -> None:
    result = command("train", "--dry-run", toy.recipe, "teacher.min_accuracy=0.99")
    assert result.returncode == 2
    assert result.stderr.count("error: ") == 1
    assert "below the required 99.00%" in result.stderr
    assert list(tmp_path.iterdir()) == []
