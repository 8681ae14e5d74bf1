"""A path that cannot be looked at is one message and exit code 2, on every command and for every key; so is an
optimizer that this machine cannot have. Whoever reads the messages can: RANK does not silence them.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image
from timm.optim import list_optimizers
from torch import nn

import distill
from distill.errors import InputError
from distill.recipe.schema import Optim
from distill.training.optim import build_optimizer
from tests.conftest import Toy, environment
from tests.faults.hostile import make_export
from tests.faults.warm import Warm
from tests.report.conftest import run_maker

ROOT = Path(__file__).resolve().parents[2]
LONG = "x" * 300
"""A part of a path that no file system takes."""
PLACES = {"long": LONG, "hidden": "hidden/a", "in a file": "file/a", "loop": "loop/a"}
EVERYWHERE = {"data.root of a folder", "compare --out", "predict", "train --out"}
"""Commands that are tried with all of them; the others with the first two."""


@pytest.fixture(scope="module")
def cwd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with a good export, a run, an image, and a folder that nobody may look into."""
    folder = tmp_path_factory.mktemp("unreachable")
    make_export(folder / "export")
    run_maker(folder)("run")
    shutil.copytree(folder / "export", folder / "run" / "export")
    Image.new("RGB", (8, 8)).save(folder / "image.png")
    (folder / "file").write_text("")
    (folder / "loop").symlink_to("loop")
    (folder / "hidden").mkdir()
    (folder / "hidden").chmod(0)
    yield folder
    (folder / "hidden").chmod(0o755)


COMMANDS = {
    "train RECIPE": ["train", "PLACE.yaml"],
    "train --out": ["train", "TOY", "--out", "PLACE"],
    "train --resume": ["train", "TOY", "--resume", "PLACE"],
    "train --resume auto": ["train", "TOY", "--out", "PLACE", "--resume", "auto"],
    "train --plugin": ["train", "TOY", "--plugin", "PLACE.py"],
    "data.root": ["train", "TOY", "data.root=PLACE"],
    "data.root of a folder": ["train", "TOY", "data.name=folder", "data.root=PLACE"],
    "data.root of torchvision": ["train", "TOY", "data.name=mnist", "data.root=PLACE"],
    "teacher.weights": ["train", "TOY", "teacher.weights=PLACE"],
    "teacher.model": ["train", "TOY", "teacher.weights=null", "teacher.model=local-dir:PLACE"],
    "teacher.recipe": ["train", "TOY", "teacher={recipe: PLACE}"],
    "student.weights": ["train", "TOY", "student.weights=PLACE"],
    "--dry-run": ["train", "TOY", "--dry-run", "data.root=PLACE"],
    "validate": ["validate", "PLACE.yaml"],
    "evaluate": ["evaluate", "PLACE"],
    "evaluate data.root": ["evaluate", "TOY", "data.root=PLACE"],
    "compare": ["compare", "PLACE"],
    "compare --out": ["compare", "run", "--out", "PLACE/report.html"],
    "export": ["export", "PLACE", "--to", "new"],
    "export --to": ["export", "run", "--to", "PLACE"],
    "predict": ["predict", "PLACE", "image.png"],
    "predict IMAGE": ["predict", "export", "PLACE"],
    "teachers": ["teachers", "PLACE.yaml"],
}


@pytest.mark.parametrize("name", COMMANDS)
def test_paths_that_cannot_be_looked_at(name: str, cwd: Path, toy: Toy, warm: Warm) -> None:
    before = sorted(path for path in cwd.rglob("*") if path.name != "passed.json")
    for where, place in [*PLACES.items()][: None if name in EVERYWHERE else 2]:
        arguments = [word.replace("PLACE", place).replace("TOY", str(toy.recipe)) for word in COMMANDS[name]]
        done = warm.run(*arguments, cwd=cwd, modest=True)
        said = [line for line in done.stdout.splitlines() if "error: " in line]
        assert done.returncode == 2, (where, done.stdout[-2000:])
        assert len(said) == 1, (where, done.stdout[-2000:])
        assert "Traceback" not in done.stdout
        assert "--resume" not in done.stdout or "--resume" in arguments, (where, done.stdout)
        assert sorted(path for path in cwd.rglob("*") if path.name != "passed.json") == before, where


def test_functions_raise_input_errors(cwd: Path, tmp_path: Path) -> None:
    place = tmp_path / LONG
    for action in (
        lambda: distill.predict(place, [cwd / "image.png"]),
        lambda: distill.predict(cwd / "export", [place]),
        lambda: distill.load_student(place),
        lambda: distill.load_teacher(f"local-dir:{place}", 4),
        lambda: distill.compare([place], tmp_path / "report.html"),
        lambda: distill.compare([cwd / "run"], place / "report.html"),
        lambda: distill.evaluate(place),
        lambda: distill.export(place, tmp_path / "new"),
        lambda: distill.Run(place),
        lambda: distill.train(place),
    ):
        with pytest.raises(InputError, match=LONG[:100]):
            action()


def test_every_optimizer_can_be_had_or_is_refused() -> None:
    refused = {}
    for name in list_optimizers():
        try:
            build_optimizer(Optim(name=name), nn.Linear(2, 2))
        except InputError as error:
            refused[name] = str(error)
    assert all(message.startswith(f"optim.name: {name} ") for name, message in refused.items())
    assert "adahessian" in refused
    assert torch.cuda.is_available() or {"bnbadam", "fusedlamb"} <= refused.keys()
    assert not refused.keys() & {"adamw", "sgd", "lion", "nmuon"}


@pytest.mark.parametrize("name", ["bnbadam", "fusedlamb"])
def test_optimizers_that_need_a_gpu(name: str, tmp_path: Path, toy: Toy, warm: Warm) -> None:
    done = warm.run("train", toy.recipe, f"optim.name={name}", "--out", "run", cwd=tmp_path)
    assert done.returncode == 2, done.stdout
    assert f"error: optim.name: {name} cannot be had here (" in done.stdout
    assert "Traceback" not in done.stdout
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("arguments", [["validate", "nowhere.yaml"], ["predict", "nowhere", "image.png"],
                                       ["compare", "nowhere"], ["export", "nowhere", "--to", "new"],
                                       ["evaluate", "TOY", "data.root=nowhere"], ["train", "nowhere.yaml"],
                                       ["train", "TOY", "data.root=nowhere"]])  # fmt: skip
@pytest.mark.parametrize("variables", [{"RANK": "3"}, {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2"}])
def test_rank_does_not_silence(
    arguments: list[str], variables: dict[str, str], tmp_path: Path, toy: Toy, warm: Warm
) -> None:
    arguments = [word.replace("TOY", str(toy.recipe)) for word in arguments]
    done = warm.run(*arguments, cwd=tmp_path, environment=variables)
    assert done.returncode == 2
    assert done.stdout.count("error: ") == 1
    assert "nowhere" in done.stdout


def test_nor_within_a_launch_those_of_commands_that_are_not_launched(tmp_path: Path, warm: Warm) -> None:
    variables = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1",
                 "TORCHELASTIC_RUN_ID": "a"}  # fmt: skip
    done = warm.run("compare", "nowhere", cwd=tmp_path, environment=variables)
    assert (done.returncode, done.stdout.count("error: ")) == (2, 1)
    # The other processes of a training leave this one to the first.
    done = warm.run("train", "nowhere.yaml", cwd=tmp_path, environment=variables)
    assert (done.returncode, done.stdout) == (2, "")


def test_predict_prints_where_output_is_not_utf8(tmp_path: Path) -> None:
    make_export(tmp_path / "export")
    Image.new("RGB", (8, 8)).save(tmp_path / "b\u00e4r \u718a.png")
    done = subprocess.run(
        [sys.executable, "-m", "distill.cli", "predict", "export", "b\u00e4r \u718a.png"], cwd=tmp_path, check=False,
        capture_output=True, env=environment(PYTHONIOENCODING="ascii", PYTHONPATH=str(ROOT)),
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, b"")
    first, *lines = done.stdout.decode("ascii").splitlines()
    assert first == "b\\xe4r \\u718a.png"
    assert sorted(line.split()[-1] for line in lines) == ["blue", "green", "grey", "red"]
    for line in lines:
        assert abs(line.count("#") - 0.3 * float(line.split()[0])) <= 0.51, line
