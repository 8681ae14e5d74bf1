"""An export from anybody is read rightly, or refused in one message: by every function that reads one."""

from __future__ import annotations

import resource
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image

import distill
from distill.errors import InputError
from distill.students.saved import CONFIG_FILE, WEIGHTS_FILE
from tests.conftest import Command, Counted
from tests.faults import hostile


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return hostile.make_export(tmp_path_factory.mktemp("good") / "export")


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("image") / "image.png"
    Image.new("RGB", (8, 8), "green").save(path)
    return path


@pytest.fixture(autouse=True)
def bounded_memory() -> Iterator[None]:
    """Within, an allocation of another eight GiB fails."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + (8 << 30), before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


def message(action: Callable[[], object], folder: Path) -> str | None:
    """The message that an action is refused with, if it is one line that names the folder."""
    try:
        action()
    except InputError as error:
        text = str(error)
        return text if "\n" not in text and str(folder) in text and len(text) < 1000 else None
    return None


def test_the_good_one_is_read(good: Path, image: Path, tmp_path: Path) -> None:
    copy = hostile.hostile_export(good, tmp_path / "copy")
    assert distill.predict(copy, [image]) == distill.predict(good, [image])
    links = tmp_path / "links"  # as the Hugging Face Hub's client keeps them
    links.mkdir()
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        (links / name).symlink_to(good / name)
    assert distill.predict(links, [image]) == distill.predict(good, [image])


def test_hostile_exports_are_refused(good: Path, image: Path, tmp_path: Path, counted: Counted) -> None:
    makers = {
        **{f"config: {name}": {"config": change} for name, change in hostile.HOSTILE_CONFIGS.items()},
        **{f"weights: {name}": {"weights": change} for name, change in hostile.HOSTILE_WEIGHTS.items()},
        **{f"metadata: {name}": {"metadata": change} for name, change in hostile.HOSTILE_METADATA.items()},
    }
    folders = {
        name: hostile.hostile_export(good, tmp_path / str(number), **options)
        for number, (name, options) in enumerate(makers.items())
    }
    folders |= hostile.files_that_are_none(good, tmp_path / "none")
    for number, (name, content) in enumerate(hostile.HOSTILE_HEADERS.items()):
        folders[f"header: {name}"] = folder = tmp_path / f"header {number}"
        folder.mkdir()
        (folder / CONFIG_FILE).write_bytes((good / CONFIG_FILE).read_bytes())
        (folder / WEIGHTS_FILE).write_bytes(content)
    found = {
        name: message(lambda folder=folder: distill.load_student(folder), folder) for name, folder in folders.items()
    }
    assert {name for name, text in found.items() if text is None} == set()
    counted("hostile exports refused in one message", done=len([*filter(None, found.values())]), of=len(found))


def test_what_the_messages_say(good: Path, tmp_path: Path) -> None:
    def refused(name: str, change: hostile.Change) -> str:
        folder = hostile.hostile_export(good, tmp_path / name, config=change)
        return message(lambda: distill.load_student(folder), folder) or ""

    assert "label_names should be 4 different names" in refused("names", hostile.setting("label_names", to=["a"]))
    assert "pretrained_cfg.mean" in refused("mean", hostile.HOSTILE_CONFIGS["mean is NaN"])
    assert "pretrained_cfg.url: extra inputs" in refused("url", hostile.HOSTILE_CONFIGS["weights from an address"])
    assert "preparation.fit" in refused("fit", hostile.setting("preparation", "fit", to="stretched"))
    assert "far larger than its weights" in refused("size", hostile.HOSTILE_CONFIGS["gigabytes of image"])
    assert "nested more than 50 deep" in refused("deep", hostile.HOSTILE_CONFIGS["deep lists"])
    assert "duplicate key 'architecture'" in refused("twice", hostile.HOSTILE_CONFIGS["a key twice"])


def test_weights_that_are_no_numbers(good: Path, image: Path, tmp_path: Path) -> None:
    """They are loaded, since a diverged student is one; what it answers is no probability."""
    folder = hostile.hostile_export(good, tmp_path / "nan", weights=hostile.nan_weights)
    assert torch.isnan(distill.load_student(folder).model.state_dict()["head.weight"]).any()
    assert message(lambda: distill.predict(folder, [image]), image) is not None


@pytest.mark.parametrize("name", ["deep lists", "one name for all classes", "no std", "terabytes of image"])
def test_commands_say_it_once(good: Path, image: Path, tmp_path: Path, command: Command, name: str) -> None:
    folder = hostile.hostile_export(good, tmp_path / "hostile", config=hostile.HOSTILE_CONFIGS[name])
    done = command("predict", folder, image)
    assert done.returncode == 2
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith(f"error: {folder}")


OF_TEACHERS = ["no JSON", "deep lists", "a key twice", "400 digits", "no architecture", "architecture is a list",
               "architecture of the hub", "mean is NaN", "std is 0", "size is huge", "size of two", "unknown argument",
               "argument checkpoint_path", "terabytes of image", "gigabytes of image", "many blocks"]  # fmt: skip


@pytest.mark.parametrize(
    "names", [OF_TEACHERS[::6], pytest.param(OF_TEACHERS, marks=pytest.mark.soak)], ids=["some", "all"]
)
def test_hostile_folders_of_teachers(good: Path, tmp_path: Path, names: list[str]) -> None:
    """Their config.json has no digest, and may be of timm's or of an older form."""
    assert distill.load_teacher(f"local-dir:{good}", 4).num_classes == 4
    for number, name in enumerate(names):
        folder = hostile.hostile_export(good, tmp_path / str(number), config=hostile.HOSTILE_CONFIGS[name])
        text = message(lambda folder=folder: distill.load_teacher(f"local-dir:{folder}", 4), folder)
        assert text is not None, name
        assert "config.json: does not describe a model that timm can build" in text
