"""The analysis of a finished student, beside its run's predictions: `analysis.json` and `analysis.safetensors`."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from distill.analysis.attention import look
from distill.analysis.corruptions import CORRUPTIONS, SEVERITIES, corrupt
from distill.analysis.costs import measure_costs
from distill.analysis.neighbours import pixel_accuracy, shown_neighbours
from distill.console import track
from distill.data import Dataset, Split
from distill.data.randomness import permutation
from distill.environment import device_name
from distill.evaluation import named_heads
from distill.evaluation.frozen import Found
from distill.files.checksum import CHECKSUM
from distill.files.tensors import write_tensors
from distill.files.text import write_text
from distill.out_of_memory import is_out_of_memory
from distill.report.metrics import agree, as_numbers, decisions
from distill.students import Student
from teachers import Teacher

NAME = "analysis"
FORMAT = "1"
PICTURES = 60
THUMBNAIL = 64
"""Pixels of a picture's side, at most."""
LOOKED_AT = 64
"""Images over which cosines are averaged."""
DRAWN = 4
"""Of these, pictures whose attention is drawn."""
CORRUPTED = {"cpu": 1000, "cuda": 10_000}
"""Images that are corrupted, at most; on a CPU also a tenth of the training images: then all corruptions take about the
time of an epoch."""
PIXELS_AT_ONCE = 2**22
"""Values of images that are corrupted, and held as noise, at a time."""
KEPT_BYTES = 2**29
Answers = Callable[[Tensor], dict[str, Tensor]]
"""Pixels in [0, 1], [B, C, H, W] -> logits [B, classes] by output."""
_log = logging.getLogger("distill")


def analyse(
    folder: Path,
    student: Student,
    teacher: Teacher | None,
    dataset: Dataset,
    predictions: Mapping[str, Tensor],
    validation: Mapping[str, Tensor],
    found: Found | None = None,
    *,
    stage: str = "analysis",
) -> None:
    """Write the analysis into a run directory; too little disk or memory is a warning: the report does without. On one
    process.

    Args:
        student: as exported, on the dataset's device, in eval mode; so is the teacher.
        predictions: logits [N, classes] on the test set by name (`student.fused`, ..., `teacher`).
        validation: the same on the validation split; empty without one, and for a student without a classifier.
        found: what its features tell on the test set, where that was asked for.
        stage: what the console calls this.
    """
    has_classes = teacher is not None and teacher.num_classes
    models: dict[str, Any] = {"student": student} | ({} if teacher is None else {"teacher": teacher})

    def answers(pixels: Tensor) -> dict[str, Tensor]:
        return named_heads(student.logits(pixels)) | ({"teacher": models["teacher"](pixels)} if has_classes else {})

    with _spared(folder / NAME):
        labels, device = dataset.labels("test"), dataset.device
        sample = _take(dataset, [0]).to(device) / 255
        shown = _disagreements(predictions, labels)
        looked_at = _stratified(labels, LOOKED_AT)
        corrupted = _stratified(labels, _how_many(dataset, sample[0].numel())) if student.heads else []
        if corrupted:
            _log.info("analysis for the report: %d images under %d corruptions", len(corrupted), len(CORRUPTIONS))
        drawn = looked_at[:DRAWN]  # the same for all runs on these data, so that they can be compared
        indices = sorted({*shown, *looked_at, *corrupted})
        images = _take(dataset, indices)
        row = {index: number for number, index in enumerate(indices)}

        def of(chosen: list[int]) -> Tensor:
            return images[[row[index] for index in chosen]]

        tensors: dict[str, Tensor] = {}
        if validation:
            tensors |= {f"validation.{name}": logits.clone() for name, logits in validation.items()}
            tensors["validation.labels"] = dataset.labels("validation")
        if shown:
            tensors |= {"pictures.indices": torch.tensor(shown), "pictures.images": _thumbnails(of(shown))}
        costs = measure_costs(models, sample)
        costs["student"]["bytes"] = sum(path.stat().st_size for path in (folder / "export").glob("*.safetensors"))
        values: dict[str, Any] = {
            "format": FORMAT,
            "data": dataset.info.digest,
            "device": device.type,
            "machine": device_name(device),
            "costs": costs,
        }
        if corrupted:
            numbers = torch.tensor(corrupted)
            values["robustness"] = _robustness(answers, of(corrupted), labels[corrupted], numbers, device, stage)
        if found is not None and found.votes is not None:
            every = _stratified(labels, len(labels))
            values["pixels"] = pixel_accuracy(dataset, found, every)
            tensors |= _neighbours(dataset, found, every)
        seen = look(student, torch.cat([of(drawn), of(looked_at)]).to(device) / 255, len(drawn))
        if seen is not None:
            values["tokens"] = {"names": seen.tokens, "token_cosines": seen.cosines}
            tensors |= {
                "attention.indices": torch.tensor(drawn),
                "attention.images": _thumbnails(of(drawn)),
                "attention.patches": seen.patches.half(),
            }
            tensors |= {f"attention.areas.{block}": masks for block, masks in seen.areas.items()}
        metadata = {"format": FORMAT, "data": dataset.info.digest, CHECKSUM: ""}
        try:
            write_tensors(folder / f"{NAME}.safetensors", tensors, metadata)
            write_text(folder / f"{NAME}.json", json.dumps(values, indent=1) + "\n")
        except OSError as error:
            _log.warning("%s: cannot be written (%s); the report does without it", folder / NAME, error.strerror)


def _neighbours(dataset: Dataset, found: Found, order: list[int]) -> dict[str, Tensor]:
    """Test images and the training images nearest to them; see `shown_neighbours`."""
    indices, rows, cosines = shown_neighbours(found, dataset.labels("test"), order)
    if not indices:
        return {}
    positions = found.bank.indices[rows]
    wanted = positions.unique()
    pictures = _thumbnails(_take(dataset, wanted.tolist(), "train"))
    return {
        "neighbours.indices": torch.tensor(indices),
        "neighbours.images": _thumbnails(_take(dataset, indices)),
        "nearest.images": pictures[torch.searchsorted(wanted, positions)],
        "nearest.labels": found.bank.labels[rows],
        "nearest.cosines": cosines,
    }


@contextmanager
def _spared(path: Path) -> Iterator[None]:
    """Within, the lack of memory ends in a warning."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        _log.warning("%s: out of memory; the report does without it, and `distill evaluate` repeats it", path)


def _how_many(dataset: Dataset, pixels: int) -> int:
    """Images to corrupt: the same for a student and its control."""
    most = min(CORRUPTED[dataset.device.type], KEPT_BYTES // pixels)
    return most if dataset.device.type == "cuda" else max(1, min(most, dataset.info.sizes["train"] // 10))


def _stratified(labels: Tensor, count: int) -> list[int]:
    """Indices of up to `count` test images, as many of each class as of any other where there are; the same always, and
    the first of more are the ones of fewer."""
    known, taken, turns = labels.tolist(), Counter[int](), {}
    for index in permutation(0, 0, len(labels)).tolist():
        turns[index] = taken[known[index]]
        taken[known[index]] += 1
    return sorted(turns, key=turns.__getitem__)[:count]


def _disagreements(predictions: Mapping[str, Tensor], labels: Tensor) -> list[int]:
    """Indices of test images where student and teacher decide otherwise, the surest first, in turns of: the teacher is
    right, the student is, neither.
    """
    if "teacher" not in predictions:
        return []
    logits = [predictions[name].numpy() for name in ("student.fused", "teacher")]
    sure, teacher_sure = (torch.from_numpy(as_numbers(values)).softmax(1).amax(1) for values in logits)
    says, teacher_says = map(decisions, logits)
    weight = sure * teacher_sure
    differ = torch.from_numpy(~agree(says, teacher_says))
    teacher_right, right = (torch.from_numpy(answers) == labels for answers in (teacher_says, says))
    groups = [differ & teacher_right, differ & right]
    groups.append(differ & ~groups[0] & ~groups[1])
    order = weight.argsort(descending=True, stable=True)
    turns = zip_longest(*(order[group[order]].tolist() for group in groups))
    return [index for turn in turns for index in turn if index is not None][:PICTURES]


def _take(dataset: Dataset, indices: list[int], split: Split = "test") -> Tensor:
    """Images of these indices, which rise: uint8 [n, C, H, W] on the CPU, in one reading of the split."""
    wanted, batch_size, parts = torch.tensor(indices), 256, []
    start = indices[0]
    for images, _ in dataset.evaluation_batches(split, start, indices[-1] + 1, batch_size):
        here = wanted[(wanted >= start) & (wanted < start + len(images))] - start
        parts.append((images[here.to(images.device)] * 255).round().to(torch.uint8).cpu())
        start += len(images)
    return torch.cat(parts)


def _robustness(
    answers: Answers, images: Tensor, labels: Tensor, indices: Tensor, device: torch.device, stage: str
) -> dict[str, Any]:
    """Correct answers by corruption and output: a list over severities, the first being that of the images as they
    are."""

    @torch.inference_mode()
    def count(change: Callable[[Tensor, Tensor], Tensor]) -> Counter[str]:
        counts = Counter[str]()
        for part in torch.arange(len(images)).split(max(1, min(256, PIXELS_AT_ONCE // images[0].numel()))):
            pixels = change(images[part].to(device), indices[part].to(device)) / 255
            for key, logits in answers(pixels).items():
                counts[key] += int((decisions(logits.cpu().numpy()) == labels[part].numpy()).sum())
        return counts

    clean, correct = count(lambda as_they_are, _: as_they_are), {}
    for name in track(CORRUPTIONS, stage, len(CORRUPTIONS)):
        levels = [clean, *(count(partial(corrupt, name, severity)) for severity in range(1, SEVERITIES + 1))]
        correct[name] = {key: [level[key] for level in levels] for key in clean}
    return {"images": len(images), "correct": correct}


def _thumbnails(images: Tensor) -> Tensor:
    """uint8 [n, C, H, W], no side longer than `THUMBNAIL`."""
    longest = max(images.shape[-2:])
    if longest <= THUMBNAIL:
        return images
    size = [max(1, round(side * THUMBNAIL / longest)) for side in images.shape[-2:]]
    smaller = F.interpolate(images.float(), size, mode="bicubic", antialias=True)
    return smaller.clamp(0, 255).round().to(torch.uint8)
