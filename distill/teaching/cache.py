"""Exact cache of a teacher's logits during training, for resumed runs, sweeps and other students.

Order and augmentation are functions of (seed, epoch, sample), and pairs are mixed by their positions in the order, so
the teacher's inputs and logits at a position of an epoch depend neither on the batch size nor on the number of
processes. Logits are stored as float16, and the run that stores them uses the rounded values too: a replayed run has
the same losses bit for bit. If two runs store the same logits at the same time, the file keeps the later values.

Each process reads and writes the records of its own samples only. On several machines the folder, which is relative to
the working directory like `runs/`, has to be on shared storage; a machine without the file computes the logits.
"""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import math
import re
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from distill import run
from distill.data import BatchPlan, Dataset
from distill.launching.processes import on_main
from distill.recipe import Recipe
from distill.teaching.logit_file import LogitFile
from distill.version import __version__
from teachers import Ensemble, Teacher

FOLDER = run.RUNS / "teacher-cache"
FORMAT = 1
FINGERPRINT_IMAGES = 64
PROBE_IMAGES = 2
PENDING_BYTES = 64 << 20
"""Limit of logits on the device that are not written yet; they are also written at each logging interval."""
_LARGEST = torch.finfo(torch.float16).max
_log = logging.getLogger("distill")


class TeacherCache:
    """The logits of one run. Look-ups use positions only, so the device is synchronised just for writing."""

    def __init__(
        self, file: LogitFile, description: dict[str, Any], accelerator: Accelerator, *, steps: int, plan: BatchPlan
    ) -> None:
        self.file, self.description, self.accelerator = file, description, accelerator
        self._steps, self._plan = steps, plan
        self._pending: list[tuple[int, int, Tensor]] = []
        self._pending_bytes = 0
        self._found = self._requested = 0

    def start(self) -> None:
        """Create the file if missing, and open it; before, nothing is read or stored. Collective.

        Raises:
            InputError: not enough disk space.
        """
        on_main(lambda: self.file.make(json.dumps(self.description, indent=1)))
        self.file.open()
        _log.info("teacher cache: %s has about %.0f %% of this run", self.file.path, 100 * self.recorded())

    def recorded(self) -> float:
        """Fraction of this run's records that exist, estimated from up to 1,000 evenly spaced ones."""
        per_epoch = self.description["samples"] // self._plan.batch_size * self._plan.batch_size
        total = self._steps * self._plan.batch_size
        positions = np.linspace(0, total - 1, min(total, 1000)).astype(int)
        records = (self.file.read(epoch, slice(at, at + 1)) for epoch, at in np.stack(divmod(positions, per_epoch), 1))
        return float(np.mean([found[0] for _, found in records]))

    def logits(self, epoch: int, part: slice, compute: Callable[[], Tensor]) -> Tensor:
        """float32 [B, classes] on the device, of the positions `part` of the epoch's order: the stored ones; if any is
        missing, `compute` is called for the whole micro-batch.

        New logits are rounded to float16 and clamped to its range.
        """
        stored, found = self.file.read(epoch, part)
        count = int(found.sum())
        self._found += count
        self._requested += len(found)
        if count == len(found):
            return self._to_device(stored).float()
        logits = compute()
        # A row that is no numbers stays that, and is not stored.
        numbers = logits.amax(1, keepdim=True).isfinite()
        logits = torch.where(numbers, logits.clamp(-_LARGEST, _LARGEST), torch.nan).half()
        if count:
            logits = torch.where(self._to_device(found)[:, None], self._to_device(stored), logits)
        self._pending.append((epoch, part.start, logits))
        self._pending_bytes += logits.nbytes
        if self._pending_bytes > PENDING_BYTES:
            self.flush()
        return logits.float()

    def _to_device(self, values: np.ndarray) -> Tensor:
        tensor, device = torch.from_numpy(np.ascontiguousarray(values)), self.accelerator.device
        return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)

    def flush(self) -> None:
        """Write new logits, with one transfer from the device."""
        if self._pending:
            values = torch.cat([logits for *_, logits in self._pending]).cpu().numpy()
            ends = np.cumsum([len(logits) for *_, logits in self._pending])[:-1]
            parts = zip(self._pending, np.split(values, ends), strict=True)
            self.file.write((epoch, start, rows) for (epoch, start, _), rows in parts)
        self._pending, self._pending_bytes = [], 0

    def take_hits(self) -> float | None:
        """Hit rate since the last call, over all processes; None: no logits were asked for. Collective."""
        counts = torch.tensor([self._found, self._requested], device=self.accelerator.device)
        found, requested = self.accelerator.reduce(counts, "sum").tolist()
        self._found = self._requested = 0
        return found / requested if requested else None


def open_cache(
    recipe: Recipe, teacher: Teacher | None, dataset: Dataset, accelerator: Accelerator, *, steps: int, plan: BatchPlan
) -> TeacherCache | None:
    """The cache of a run of `steps` steps, if its recipe enables one; writes nothing. Collective.

    Raises:
        InputError: not enough disk space.
    """
    if teacher is None or not recipe.teachers[0].cache:
        return None
    description = on_main(lambda: describe(recipe, teacher, dataset, accelerator.mixed_precision))
    key = cache_key(description)
    samples = dataset.info.sizes["train"]
    file = LogitFile(
        FOLDER / f"{key}.logits",
        key,
        epochs=math.ceil(steps / plan.steps_per_epoch(samples)),
        samples=samples,
        classes=dataset.info.num_classes,
    )
    on_main(file.check_space)
    return TeacherCache(file, description, accelerator, steps=steps, plan=plan)


def cache_key(description: dict[str, Any]) -> str:
    """SHA-256 (hex) of what `describe` returns, without the names of the teachers."""
    members = [{key: value for key, value in member.items() if key != "name"} for member in description["members"]]
    return hashlib.sha256(json.dumps(description | {"members": members}, sort_keys=True).encode()).hexdigest()


@torch.no_grad()
def answers_digest(teacher: Teacher, images: Tensor) -> str:
    """SHA-256 (hex) of the teacher's logits on images [B, C, H, W] in [0, 1].

    Computed in float64 on the CPU and rounded to a hundred-thousandth of a row's largest logit, so that it depends
    neither on the device nor on the number of threads, nor on rounding.
    """
    exact, images = copy.deepcopy(teacher).cpu(), images.cpu()
    try:
        logits, steps = exact.double()(images.double()), 1e5
    except (RuntimeError, TypeError, ValueError):  # a network that computes in float32 only, whatever its weights
        logits, steps = exact.float()(images.float()), 1e2
    logits = logits.double()
    rounded = (logits / logits.abs().amax(1, keepdim=True).clamp_min(1e-30) * steps).round()
    return hashlib.sha256(rounded.nan_to_num().to(torch.int64).numpy().tobytes()).hexdigest()


def describe(recipe: Recipe, teacher: Teacher, dataset: Dataset, precision: str) -> dict[str, Any]:
    """Everything that the logits depend on, as plain data.

    The first augmented images of the first epoch represent the code of order and augmentation; the teacher's answers to
    some of them represent its own code and those of its settings that its layers do not show.
    """
    members = teacher.teachers if isinstance(teacher, Ensemble) else [teacher]
    samples = dataset.info.sizes["train"]
    first = min(FINGERPRINT_IMAGES, samples - samples % 2) or 1
    with torch.compiler.set_stance("force_eager"):  # a batch of another size, for which nothing is compiled
        (batch,) = next(dataset.training_batches(BatchPlan(seed=recipe.seed, batch_size=first), 0))
    return {
        "format": FORMAT,
        "distill": __version__,
        "teacher": teacher.digest,
        "members": [
            {
                "name": member.name,
                "weights": member.digest,
                # Layers and their settings, without the addresses of functions.
                "network": hashlib.sha256(re.sub(" at 0x[0-9a-f]+", "", repr(member.network)).encode()).hexdigest(),
                "inputs": asdict(member.contract),
            }
            for member in members
        ],
        "answers": answers_digest(teacher, batch.images[:PROBE_IMAGES]),
        "precision": precision,
        "data": dataset.info.digest,
        "samples": samples,
        "classes": dataset.info.num_classes,
        "validation": recipe.data.validation,
        "select_on": recipe.data.select_on,
        "sampler": recipe.data.sampler,
        "long_tail": recipe.data.long_tail,
        "resolution": recipe.data.resolution,
        "augment": (recipe.data.views[0] if recipe.data.views else recipe.data.augment).model_dump(mode="json"),
        "seed": recipe.seed,
        "first_batch": batch.digest(),
    }
