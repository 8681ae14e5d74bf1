"""Distributed prediction of a split in file order, and the predictions file."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from distill.console import track
from distill.data import Dataset, Split
from distill.errors import RunFailed
from distill.files.checksum import CHECKSUM
from distill.files.tensors import write_tensors
from distill.launching.processes import with_process_index
from distill.launching.signals import stoppable
from distill.out_of_memory import is_out_of_memory, release_frames

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
    what: str = "evaluation",
) -> list[Tensor]:
    """Run `forward` over samples `start` to `stop` - 1 (None: to the end) of a split, each exactly once.

    Args:
        forward: images [B, C, H, W] in [0, 1] -> logits, one [B, classes] per output.
        batch_size: per process.
        what: the console calls this.

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
    for images, _ in track(batches, what, -(-min(share, max(0, size - first)) // batch_size)):
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


def save_predictions(
    path: Path, predictions: Mapping[str, Tensor], labels: Tensor, metadata: Mapping[str, str]
) -> None:
    """Write `predictions.safetensors`: labels int64 [N] and one float32 [N, classes] per name."""
    # With one head its logits are the fused ones too, and safetensors refuses tensors that share memory.
    tensors = {"labels": labels} | {name: logits.clone() for name, logits in predictions.items()}
    write_tensors(path, tensors, {**metadata, CHECKSUM: ""})
