"""The exact teacher cache: a teacher's logits of a run, replayed for its resumption, for a sweep, for another student.

Augmentation and order are functions of (seed, epoch, sample), and pairs are mixed by their positions in the order, so
what the teacher sees at a position of an epoch, and with it its logits, depend neither on the batch size nor on the
number of processes. They are stored as float16, and the run that records them learns from the rounded values as well:
a replayed run has its losses bit for bit. Two runs that record the same at the same time are each within rounding of
the teacher, and the file keeps the values of the later one.

Each process reads and writes the records of its own samples only. On several machines the folder, which is relative to
the working directory as `runs/` is, has to be on storage that all of them see; a machine that does not see the file
asks its teacher every time, and learns the same.
"""

from __future__ import annotations

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
PENDING_BYTES = 64 << 20
"""What is held on the device before it is written, if the logging interval does not come first."""
_LARGEST = torch.finfo(torch.float16).max
_log = logging.getLogger("distill")


class TeacherCache:
    """The logits of one run; `accelerator` is that of its processes.

    Only the host decides what is there, from the positions of a micro-batch: the device is not waited for, except
    where new records are written.
    """

    def __init__(
        self, file: LogitFile, description: dict[str, Any], accelerator: Accelerator, *, steps: int, plan: BatchPlan
    ) -> None:
        self.file, self.description, self.accelerator = file, description, accelerator
        self._steps, self._plan = steps, plan
        self._pending: list[tuple[int, int, Tensor]] = []
        self._pending_bytes = 0
        self._found = self._asked = 0

    def start(self) -> None:
        """Make the file where it is missing; before that nothing is read or kept. Collective.

        Raises:
            InputError: there is no room for it.
        """
        on_main(lambda: self.file.make(json.dumps(self.description, indent=1)))
        self.file.open()
        _log.info("teacher cache: %s has about %.0f %% of this run", self.file.path, 100 * self.recorded())

    def recorded(self) -> float:
        """Share of this run's records that are there, from up to 1,000 of them spread evenly."""
        per_epoch = self.description["samples"] // self._plan.batch_size * self._plan.batch_size
        total = self._steps * self._plan.batch_size
        places = np.linspace(0, total - 1, min(total, 1000)).astype(int)
        records = (self.file.read(epoch, slice(at, at + 1)) for epoch, at in np.stack(divmod(places, per_epoch), 1))
        return float(np.mean([found[0] for _, found in records]))

    def logits(self, epoch: int, part: slice, ask: Callable[[], Tensor]) -> Tensor:
        """float32 [B, classes] on the device, of the positions `part` of the epoch's order: stored ones, and where any
        is missing what `ask` returns for all of them.

        What is new is rounded to float16, values beyond its range to its largest.
        """
        stored, found = self.file.read(epoch, part)
        count = int(found.sum())
        self._found += count
        self._asked += len(found)
        if count == len(found):
            return self._to_device(stored).float()
        logits = ask().clamp(-_LARGEST, _LARGEST).half()
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
        """Write what is new, after one transfer from the device."""
        if self._pending:
            values = torch.cat([logits for *_, logits in self._pending]).cpu().numpy()
            ends = np.cumsum([len(logits) for *_, logits in self._pending])[:-1]
            parts = zip(self._pending, np.split(values, ends), strict=True)
            self.file.write((epoch, start, rows) for (epoch, start, _), rows in parts)
        self._pending, self._pending_bytes = [], 0

    def take_hits(self) -> float:
        """Share of the samples since the last call, over all processes, whose logits were there. Collective."""
        counts = torch.tensor([self._found, self._asked], device=self.accelerator.device)
        found, asked = self.accelerator.reduce(counts, "sum").tolist()
        self._found = self._asked = 0
        return found / asked


def open_cache(
    recipe: Recipe, teacher: Teacher | None, dataset: Dataset, accelerator: Accelerator, *, steps: int, plan: BatchPlan
) -> TeacherCache | None:
    """The cache of a run of so many `steps`, where its recipe wants one; nothing is written yet. Collective.

    Raises:
        InputError: the disk has no room for it.
    """
    if teacher is None or not recipe.teachers[0].cache:
        return None
    description = on_main(lambda: describe(recipe, teacher, dataset, accelerator.mixed_precision))
    key = hashlib.sha256(json.dumps(description, sort_keys=True).encode()).hexdigest()
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


def describe(recipe: Recipe, teacher: Teacher, dataset: Dataset, precision: str) -> dict[str, Any]:
    """All that the logits depend on, as plain data.

    The first images of the first epoch, as the teacher will see them, stand for the code of order and augmentation.
    """
    members = teacher.teachers if isinstance(teacher, Ensemble) else [teacher]
    samples = dataset.info.sizes["train"]
    first = min(FINGERPRINT_IMAGES, samples - samples % 2) or 1
    (batch,) = next(dataset.training_batches(BatchPlan(seed=recipe.seed, batch_size=first), 0))
    return {
        "format": FORMAT,
        "distill": __version__,
        "teacher": teacher.digest,
        "members": [
            {
                "name": member.name,
                "weights": member.digest,
                # Layers and their settings; the address of a function among them is no part of it.
                "network": hashlib.sha256(re.sub(" at 0x[0-9a-f]+", "", repr(member.network)).encode()).hexdigest(),
                "inputs": asdict(member.contract),
            }
            for member in members
        ],
        "precision": precision,
        "data": dataset.info.digest,
        "samples": samples,
        "classes": dataset.info.num_classes,
        "validation": recipe.data.validation,
        "select_on": recipe.data.select_on,
        "resolution": recipe.data.resolution,
        "augment": recipe.data.augment.model_dump(mode="json"),
        "seed": recipe.seed,
        "first_batch": batch.digest(),
    }
