"""Distributed prediction of a split in file order, evaluators, and the predictions file."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from distill.data import Dataset, Split
from distill.errors import RunFailed
from distill.features import mean_over_heads
from distill.files.checksum import CHECKSUM
from distill.files.tensors import write_tensors
from distill.launching.processes import with_process_index
from distill.launching.signals import stoppable
from distill.out_of_memory import is_out_of_memory, release_frames
from distill.report.metrics import are_numbers, measure
from distill.students import Student
from teachers import Teacher

SMALLEST_BATCH = 128
_log = logging.getLogger("distill")


@torch.inference_mode()
def predict(
    forward: Callable[[Tensor], Sequence[Tensor]],
    dataset: Dataset,
    split: Split,
    accelerator: Accelerator,
    *,
    batch_size: int,
    start: int = 0,
    stop: int | None = None,
) -> list[Tensor]:
    """Run `forward` over samples `start` to `stop` - 1 (None: to the end) of a split, each exactly once.

    Args:
        forward: images [B, C, H, W] in [0, 1] -> logits, one [B, classes] per output.
        batch_size: per process.

    Returns:
        One float32 [N, classes] on the CPU per output, in file order, the same on every process.
    """
    size = (dataset.info.sizes[split] if stop is None else stop) - start
    share = -(-size // accelerator.num_processes)
    first = min(size, share * accelerator.process_index)
    batches = dataset.evaluation_batches(split, start + first, start + min(size, first + share), batch_size)
    batches = stoppable(with_process_index(batches), -(-share // batch_size))
    part = batch_size
    rows = []
    for images, _ in batches:
        before = part
        while (outputs_of_batch := _forward_in_parts(forward, images, part)) is None:
            if part == 1:
                raise RunFailed(
                    f"out of memory while evaluating, with one image at a time, the {split} split.\n"
                    "Take a smaller model or resolution, or a device with more memory."
                )
            part = -(-min(part, len(images)) // 2)
        if part < before:
            _log.warning("evaluation: out of memory; from now on %d images at a time", part)
        rows.append(outputs_of_batch)
    outputs = [torch.cat(column) for column in zip(*rows, strict=True)]
    if accelerator.num_processes > 1:
        outputs = [_gather(output, share, accelerator) for output in _same_outputs(outputs, accelerator)]
    outputs = [output[:size].cpu() for output in outputs]
    if any(len(output) != size for output in outputs):
        raise RunFailed(f"evaluation: the {split} split gave {[len(output) for output in outputs]} of {size} samples")
    return outputs


def _forward_in_parts(forward: Callable[[Tensor], Sequence[Tensor]], images: Tensor, size: int) -> list[Tensor] | None:
    """float32 outputs on images [B, C, H, W], `size` at a time; None if out of memory."""
    try:
        parts = [[output.float() for output in forward(part)] for part in images.split(size)]
        return [torch.cat(column) for column in zip(*parts, strict=True)]
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        release_frames(error)
    if images.device.type == "cuda":
        torch.cuda.empty_cache()
    return None


def _same_outputs(outputs: list[Tensor], accelerator: Accelerator) -> list[Tensor]:
    """Outputs for gathering; a process without samples gets empty ones of the others' number and width."""
    widths = max(gather_object([[output.shape[1] for output in outputs]]), key=len)
    return outputs or [torch.zeros(0, width, device=accelerator.device) for width in widths]


def _gather(output: Tensor, share: int, accelerator: Accelerator) -> Tensor:
    padded = torch.zeros(share, output.shape[1], device=output.device)
    padded[: len(output)] = output
    return accelerator.gather(padded)


class Evaluator:
    """Evaluates a student on a split, on all processes together."""

    primary: str
    """Name of the value by which checkpoints are selected; higher is better."""

    def __call__(self, student: Student, split: Split) -> dict[str, float]:
        """Values by name, the same on every process. Leaves the student in eval mode."""
        raise NotImplementedError


class Classification(Evaluator):
    """Accuracies in percent of each head and of their mean, and agreement with the teacher."""

    primary = "student/top1"

    def __init__(self, dataset: Dataset, accelerator: Accelerator, *, batch_size: int = SMALLEST_BATCH) -> None:
        """`batch_size`: images at a time on each process."""
        self.dataset, self.accelerator, self.batch_size = dataset, accelerator, max(SMALLEST_BATCH, batch_size)
        self.teacher_logits: dict[Split, Tensor] = {}
        """[N, classes] by split, for the agreement."""

    def predict_teacher(self, teacher: Teacher, split: Split) -> Tensor:
        """The teacher's logits [N, classes] on a split, stored for the agreement."""
        (self.teacher_logits[split],) = self._predict(lambda images: [teacher(images)], split)
        return self.teacher_logits[split]

    def predict(self, student: Student, split: Split) -> dict[str, Tensor]:
        """The student's logits on a split, as `named_heads`, and `teacher` if predicted before."""
        student.eval()
        outputs = self._predict(lambda images: list(student.logits(images).values()), split)
        named = named_heads(dict(zip(student.heads, outputs, strict=True)))
        return named | ({"teacher": self.teacher_logits[split]} if split in self.teacher_logits else {})

    def __call__(self, student: Student, split: Split) -> dict[str, float]:
        return accuracies(self.predict(student, split), self.dataset.labels(split))

    def _predict(self, forward: Callable[[Tensor], Sequence[Tensor]], split: Split) -> list[Tensor]:
        return predict(forward, self.dataset, split, self.accelerator, batch_size=self.batch_size)


def named_heads(logits: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`student.HEAD` for each head, and `student.fused`, their mean."""
    return {f"student.{head}": of_head for head, of_head in logits.items()} | {"student.fused": mean_over_heads(logits)}


def accuracies(predictions: Mapping[str, Tensor], labels: Tensor) -> dict[str, float]:
    """Metrics under the names of `metrics.jsonl`; `student/top1` is that of the mean over heads."""
    teacher = predictions.get("teacher")
    values: dict[str, float] = {}
    warn_of_missing(predictions)
    for name, logits in predictions.items():
        key = "student" if name == "student.fused" else name
        metrics = measure(logits.numpy(), labels.numpy(), None if teacher is None else teacher.numpy())
        values |= {f"{key}/top1": metrics.top1, f"{key}/top5": metrics.topk, f"{key}/nll": metrics.nll}
        if key == "student" and metrics.agreement is not None:
            values["agreement"] = metrics.agreement
    return values


def warn_of_missing(predictions: Mapping[str, Tensor]) -> None:
    """Log for which outputs rows of logits [N, classes] are not numbers."""
    for name, logits in predictions.items():
        if missing := int((~are_numbers(logits.numpy())).sum()):
            _log.warning(
                "%s: %d of %d rows of logits are not numbers; they count as wrong answers", name, missing, len(logits)
            )


def save_predictions(
    path: Path, predictions: Mapping[str, Tensor], labels: Tensor, metadata: Mapping[str, str]
) -> None:
    """Write `predictions.safetensors`: labels int64 [N] and one float32 [N, classes] per name."""
    # With one head its logits are the fused ones too, and safetensors refuses tensors that share memory.
    tensors = {"labels": labels} | {name: logits.clone() for name, logits in predictions.items()}
    write_tensors(path, tensors, {**metadata, CHECKSUM: ""})
