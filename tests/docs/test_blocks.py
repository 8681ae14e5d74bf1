"""Every block of the documentation: shell and Python blocks run, in their order, unless they say why not; commands are
parsed in any case; recipes are valid.
"""

from __future__ import annotations

import importlib.util
import io
import json
import re
import tomllib
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from accelerate.commands.launch import launch_command_parser
from PIL import Image
from sklearn.datasets import load_digits

import distill
from distill import cli
from distill.data import open_dataset
from distill.exports.onnx_file import onnx_logits
from distill.files.contents import METRICS, RUN_FILES
from distill.recipe import from_mapping, load
from distill.run import read_metrics, read_recipe
from distill.sweeps.schema import read_sweep
from tests import warm
from tests.conftest import image_folder
from tests.docs.blocks import PAGES, ROOT, Block, blocks, words_of

ALL = [block for page in PAGES for block in blocks(page)]
SHELL = [block for block in ALL if block.language == "bash"]
RUN = dict.fromkeys(one.page for one in ALL if one.not_run is None and one.language in ("bash", "python"))
"""Pages."""
OTHER_TOOLS = {"pytest", "pre-commit", "ruff", "sbatch", "launcher=$!", "trap", "wait", "grep"}
"""Of blocks that are not run."""


def test_blocks_are_of_known_languages() -> None:
    assert {block.language for block in ALL} <= {"bash", "python", "yaml", "text"}
    assert sum(block.not_run is None for block in SHELL) > 10


# What commands say


@pytest.mark.parametrize("block", SHELL, ids=str)
def test_commands_are_understood(block: Block, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    for command in block.commands:
        words, _ = words_of(command)
        match words:
            case ["distill", *arguments]:
                _understood(arguments, monkeypatch)
            case ["accelerate", "launch", *arguments]:
                launched = launch_command_parser().parse_args(arguments)
                assert launched.training_script == ("distill.train" if launched.module else "distill/train.py")
                assert launched.config_file is None or Path(launched.config_file).is_file()
                _understood(["train", *launched.training_script_args], monkeypatch)
            case ["python", "-m", "pip", "install", "-e", what]:
                extras = tomllib.loads(Path("pyproject.toml").read_text())["project"]["optional-dependencies"]
                assert set(re.findall(r"\[(\w+)\]", what)) <= set(extras)
            case ["python", "-m", module, *_]:
                assert importlib.util.find_spec(module) is not None
            case [tool, *_]:
                assert block.not_run, f"{command}: cannot be run by a test; say why, <!-- not run: ... -->"
                assert tool in OTHER_TOOLS


def _understood(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The parser takes it; recipes of this package that it names take its overrides."""
    seen: list[Any] = []
    name = arguments[0]
    summary, add_arguments, _ = cli.COMMANDS[name]
    monkeypatch.setitem(cli.COMMANDS, name, (summary, add_arguments, lambda options: seen.append(options)))
    monkeypatch.setattr(cli, "_load_plugins", lambda options: None)
    assert cli.main(arguments) == 0
    (options,) = seen
    if str(target := getattr(options, "target", "")).startswith("recipes/"):
        load(target, options.overrides)


@pytest.mark.parametrize("block", [block for block in ALL if block.language == "yaml"], ids=str)
def test_recipes_are_valid(block: Block, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    (tmp_path / "photos-teacher.yaml").write_text("{}")
    (tmp_path / "my_method.py").write_text(_file("my_method.py").text)
    monkeypatch.chdir(tmp_path)
    Path("given.yaml").write_text(block.text)
    content = yaml.safe_load(block.text)
    if "keys" in content:
        assert read_sweep(Path("given.yaml")).total > 1
    elif block.file is None:
        assert load("given.yaml") if "base" in content else from_mapping(content)


def _file(name: str) -> Block:
    (found,) = [block for block in ALL if block.file == name]
    return found


# Running


@dataclass
class World:
    """A folder in which a reader tries what is written: recipes, photographs, and what earlier blocks have written. A
    command that several pages have is run once.
    """

    folder: Path
    done: dict[str, str] = field(default_factory=dict)
    """What each command printed."""

    def run(self, page: str) -> dict[str, Any]:
        """All blocks of a page; returns the names that its Python blocks, one program, have defined."""
        names: dict[str, Any] = {}
        for block in (block for block in blocks(page) if block.not_run is None):
            if block.file is not None:
                (self.folder / block.file).write_text(block.text)
            elif block.language == "bash":
                for command in block.commands:
                    self.command(command)
            elif block.language == "python":
                exec(compile(block.text, str(block), "exec"), names)
        return names

    def command(self, command: str) -> None:
        words, output = words_of(command)
        if command in self.done or "pip" in words:
            return
        assert words[0] == "distill", command
        errors = self.folder.with_name("errors")
        errors.unlink(missing_ok=True)
        launched = warm.launch(words[1:], cwd=self.folder, before=in_little_time, errors=errors, report=True)
        codes = launched.wait()
        assert codes == [0], f"{command}\n{launched.output}\n{errors.read_text()}"
        self.done[command] = launched.output
        if output is not None:
            (self.folder / output).write_text(launched.output)
        if words[1] == "init":
            self.shorten("photos.yaml", teacher={"recipe": "photos-teacher.yaml", "min_accuracy": 0.0})
            self.shorten("photos-teacher.yaml")

    def shorten(self, name: str, **changes: Any) -> None:
        """Let the recipe train for an epoch; what it teaches is not tested."""
        recipe = yaml.safe_load((self.folder / name).read_text())
        recipe["train"]["epochs"] = recipe["optim"]["warmup_epochs"] = 1
        (self.folder / name).write_text(yaml.safe_dump(recipe | changes))


def in_little_time() -> None:
    """`distill init` measures few steps, and nothing is analysed for reports, which takes longer than all else."""
    from distill import evaluate_command, finishing
    from distill.scaffold import estimate

    estimate.SECONDS = 0
    evaluate_command.analyse = finishing.analyse = lambda *_, **__: None
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("docs") / "world"
    folder.mkdir()
    for name in ("recipes", "results"):
        (folder / name).symlink_to(ROOT / name)
    image_folder(folder / "photos", ["cat", "dog", "owl"], {"train": 8, "test": 2}, width=40, height=36)
    Image.open(folder / "photos" / "test" / "cat" / "0.png").save(folder / "image.jpg")
    world = World(folder)
    world.run("README.md")
    return world


@pytest.fixture(autouse=True)
def _in_little_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also what Python blocks do in this process, without the fresh one that loads an export."""
    monkeypatch.setattr("distill.exports.folder._compare_with_reloaded", lambda *args: None)
    for module in ("finishing", "evaluate_command"):
        monkeypatch.setattr(f"distill.{module}.analyse", lambda *_, **__: None)


def check_python(names: dict[str, Any], world: World) -> None:
    assert names["run"].status["state"] == "finished"
    assert names["run"].metrics("eval")[-1]["student/top1"] > 60
    assert names["logits"].shape == (297, 10)
    assert names["names"] == [str(digit) for digit in range(10)]
    assert {"report.html", "runs", "students"} <= {path.name for path in world.folder.iterdir()}


def check_use_of_a_student(names: dict[str, Any], world: World) -> None:
    """All three ways gave answers of the three classes, the ONNX file those of the run; the published student reads a
    digit.
    """
    assert names["config"]["label_names"] == ["cat", "dog", "owl"]
    assert names["logits"].shape == (1, 3)
    assert [name for name, _ in sorted(names["answers"][0])] == ["cat", "dog", "owl"]
    run = world.folder / "runs" / "photos"
    dataset = open_dataset(read_recipe(run).data, seed=0, device=torch.device("cpu"))
    images = (images for images, _ in dataset.evaluation_batches("test", 0, 6, 4))
    logits = onnx_logits(world.folder / "students" / "photos" / "model.onnx", images)
    torch.testing.assert_close(logits, distill.Run(run).predictions()["student.fused"], rtol=0, atol=1e-4)
    printed = world.done["distill export runs/photos --to students/photos --onnx"].splitlines()
    assert "on 6 test images" in printed[-2]
    assert printed[-1] == "students/photos"
    digits = load_digits()
    model, transform, labels = distill.load_student(world.folder / "results" / "digits-nano")
    image = Image.fromarray((digits.images[0] * 15).astype("uint8"))
    assert labels[model(transform(image)[None]).argmax()] == str(digits.target[0])


CHECKS: dict[str, Callable[[dict[str, Any], World], None]] = {
    "docs/how-to/python.md": check_python,
    "docs/how-to/use-a-student.md": check_use_of_a_student,
}


@pytest.mark.parametrize("page", RUN)
def test_blocks_run(page: str, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(world.folder)
    with redirect_stdout(io.StringIO()):
        names = world.run(page)
    if page in CHECKS:
        CHECKS[page](names, world)


def test_a_run_has_the_files_and_the_keys_that_the_reference_names(world: World) -> None:
    run = world.folder / "runs" / "photos"
    found = {f"{path.name}/" if path.is_dir() else path.name for path in run.iterdir() if path.name[0] != "."}
    beside_the_report = {name for name in found if re.fullmatch(r"report\.(md|json)|report-\w+\.svg", name)}
    assert found - beside_the_report <= set(RUN_FILES)
    others = {"test_split.txt", "analysis.json", "analysis.safetensors", "int8.json", "control/"}
    assert set(RUN_FILES) - found == others
    parts = "|".join(re.sub("[A-Z]+", r"\\w+", re.escape(key)) for key in METRICS)
    logged = {key for event in ("train", "eval") for line in read_metrics(run, event) for key in line}
    heads = {re.sub(r"^student\.\w+/", "student/", key) for key in logged}
    unknown = {key for key in heads if not re.fullmatch(parts, key.replace("teacher/", "student/"))}
    assert unknown == set()
    assert json.loads((run / "status.json").read_text())["state"] == "finished"
