"""Shared fixtures. Tests that need the project's shared folder (real CIFAR-10, public teachers) skip where it is
absent.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Files of tests run side by side, each worker of pytest-xdist with its share of the cores: threads of one that wait for
# those of another would take several times as long. libgomp reads both when torch is imported.
os.environ.setdefault("GOMP_SPINCOUNT", "0")
# cuBLAS reads it at its first product, which may be that of a test before the one with train.deterministic.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
if hasattr(os, "sched_setaffinity"):
    if worker := os.environ.get("PYTEST_XDIST_WORKER"):
        all_cores = sorted(os.sched_getaffinity(0))
        share = all_cores[int(worker.removeprefix("gw")) :: int(os.environ["PYTEST_XDIST_WORKER_COUNT"])]
        os.sched_setaffinity(0, share or all_cores)
    # Whether or not others are busy: runs that are compared need the same number of threads.
    os.environ["OMP_NUM_THREADS"] = str(len(os.sched_getaffinity(0)))

import numpy as np
import pytest
import timm
import torch
import yaml
from accelerate.state import AcceleratorState, PartialState
from PIL import Image

Command = Callable[..., subprocess.CompletedProcess[str]]
Counted = Callable[..., None]

SOAK_TIMEOUT = 4 * 3600
"""Seconds for one of the large counts: beside trainings, a machine takes several times as long as alone. What they
launch has limits of its own.
"""

DEVICES = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
"""For what is to hold on a GPU too; where there is none, the CPU rehearses it."""


def some(cases: Iterable[Any], *kept: int) -> list[Any]:
    """The parameters of a long test: those at `kept` (by default the first) run in the suite, the others by -m soak."""
    return [
        case
        if index in (kept or (0,))
        else pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=pytest.mark.soak)
        for index, case in enumerate(cases)
    ]


SHARED = Path(os.environ.get("DISTILL_SHARED", Path(__file__).resolve().parents[2] / "shared"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("soak"):
            item.add_marker(pytest.mark.timeout(SOAK_TIMEOUT))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Where there is a GPU, only tests marked `gpu` use it. Before the fixtures, which may build a trainer."""
    on_gpu = item.get_closest_marker("gpu") is not None
    if torch.cuda.is_available():
        AcceleratorState._reset_state(reset_partial_state=True)
        PartialState(cpu=not on_gpu)
    elif on_gpu:
        pytest.skip("no CUDA device")


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What tests and their commands pack does not go into the cache of whoever runs them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DISTILL_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def _shared(part: str) -> Path:
    path = SHARED / part
    if not path.exists():
        pytest.skip(f"shared folder absent: {part} is neither beside the checkout nor under $DISTILL_SHARED")
    return path


@pytest.fixture(scope="session")
def cifar10_root() -> Path:
    """The folder with the real CIFAR-10 as cifar10.safetensors."""
    return _shared("data/cifar10")


@pytest.fixture(scope="session")
def teacher_weights() -> Path:
    """The folder with the public CIFAR ResNet weights."""
    return _shared("weights")


@dataclass(frozen=True)
class Toy:
    """A dataset and a teacher so small that a whole run takes seconds: 3x8x8 images of 4 classes told apart by
    brightness.
    """

    root: Path
    teacher: Path
    recipe: Path

    def mapping(self, **changes: Any) -> dict[str, Any]:
        """The toy recipe as plain data, with some top-level sections merged into it."""
        raw = yaml.safe_load(self.recipe.read_text())
        for key, value in changes.items():
            raw[key] = raw.get(key, {}) | value if isinstance(value, dict) and isinstance(raw.get(key), dict) else value
        return raw


TOY_RECIPE = """
data:
  name: toy.safetensors
  root: {root}
  validation: 0.25
  resolution: 8
  augment: {{crop_padding: 1, hflip: true, random_erasing: 0.25, mixup: 0.8, cutmix: 1.0}}
teacher: {{model: cifar_resnet20, weights: {teacher}, min_accuracy: 0.0}}
student:
  model: vit_nano
  patch_size: 4
  attention: {{kind: area, max_area: 2, blocks: [0, 1]}}
  drop_path: 0.1
distill:
  - {{method: hard, weight: 0.25}}
  - {{method: soft, weight: 0.25, temperature: 2.0}}
optim: {{warmup_epochs: 1}}
train: {{epochs: 3, batch_size: 16, gradient_accumulation: 2, precision: fp32, ema: 0.9, log_every: 1,
        keep_checkpoints: 100}}
report: {{analysis: none}}  # which takes four fifths of so small a run
"""


@pytest.fixture(scope="session")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Toy:
    from distill.data.packed import write_packed

    folder = tmp_path_factory.mktemp("toy")
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for split, size in (("train", 128), ("test", 50)):
        labels = torch.arange(size) % 4
        noise = torch.randint(0, 64, (size, 3, 8, 8), generator=generator)
        tensors[f"{split}.labels"] = labels
        tensors[f"{split}.images"] = (noise + 60 * labels.view(-1, 1, 1, 1)).to(torch.uint8)
    write_packed(folder / "toy.safetensors", name="toy", class_names=("a", "b", "c", "d"), tensors=tensors)
    torch.manual_seed(0)
    import teachers.cifar_resnet  # noqa: F401 - registers them with timm

    network = timm.create_model("cifar_resnet20", num_classes=4)
    torch.save(network.state_dict(), folder / "teacher.pth")
    recipe = folder / "toy.yaml"
    recipe.write_text(TOY_RECIPE.format(root=folder, teacher=folder / "teacher.pth"))
    return Toy(folder, folder / "teacher.pth", recipe)


def image_folder(root: Path, labels: Iterable[str], counts: dict[str, int], *, width: int, height: int) -> None:
    """Write PNG files of random pixels as root/<split>/<label>/<number>.png; `counts`: of each label, by split."""
    chance = np.random.default_rng(0)
    for split, count in counts.items():
        for label in labels:
            (folder := root / split / label).mkdir(parents=True)
            for number in range(count):
                pixels = chance.integers(0, 256, (height, width, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{number}.png")


def environment(**values: str) -> dict[str, str]:
    """The environment of a real command in a test: on the CPU, out of any launcher."""
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("ACCELERATE_")}
    return inherited | {"ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": ""} | values


@pytest.fixture
def command(tmp_path: Path) -> Command:
    """Runs the `distill` command in a process of its own, in an empty folder."""
    from tests import warm

    return lambda *arguments, timeout=120.0: warm.run(arguments, cwd=tmp_path, timeout=timeout)


@pytest.fixture
def counted(record_property: Callable[[str, object], None]) -> Counted:
    """Prints and records how often a promise of reliability held, for results/reliability; asserts that it always did.

    `counted("a crash while saving", done=100, of=100)`; further figures by name.
    """

    def record(promise: str, *, done: int, of: int, **figures: float | str) -> None:
        values = {"promise": promise, "done": done, "of": of, **figures}
        print(f"\n{json.dumps(values)}")
        record_property("reliability", json.dumps(values))
        assert done == of > 0, values

    return record
