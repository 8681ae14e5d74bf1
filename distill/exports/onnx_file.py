"""A student as an ONNX file: pixels in, logits or features out, in standard operators only.

Input `images`, float32 [batch, C, size, size] in [0, 1]: normalisation is inside. Output 0, `logits`, float32 [batch,
classes]: of both heads, merged, where there are two; of a student without heads `features`, float32 [batch, D].
"""

from __future__ import annotations

import copy
import json
import logging
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from distill.errors import InputError
from distill.students import Student, merge_heads
from distill.version import __version__

ONNX_FILE = "model.onnx"
OPSET = 18
EXPORTER_LOGGERS = ("torch.onnx", "onnxscript", "onnx_ir")
"""They log what the exporter has to say of its own code."""
TOLERANCE = 1e-4
"""Largest difference between the logits of onnxruntime and of torch."""
LARGEST = 2**31 - 2**20
"""Bytes of weights that go into one ONNX file, whose format ends at 2 GiB."""


class FromPixels(nn.Module):
    """Images [B, C, size, size] in [0, 1] -> logits [B, classes]; a copy of the student, in eval mode on the CPU."""

    def __init__(self, student: Student) -> None:
        super().__init__()
        self.adapter = copy.deepcopy(student.adapter).cpu()
        self.model = merge_heads(copy.deepcopy(student.model).cpu())
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        return self.model(self.adapter(images))


def check_installed() -> None:
    """InputError unless the packages of the extra `onnx` are there."""
    if missing := [name for name in ("onnx", "onnxscript", "onnxruntime") if find_spec(name) is None]:
        raise InputError(
            f'--onnx, and --int8 with it, needs {", ".join(missing)}: python -m pip install "distill-vit[onnx]"'
        )


def write_onnx(student: Student, path: Path, class_names: Sequence[str]) -> None:
    """Write the student to `path`, any number of images at a time.

    Raises:
        InputError: it is too large for one ONNX file, or torch cannot express it in ONNX.
    """
    module = FromPixels(student)
    if sum(tensor.nbytes for tensor in module.state_dict().values()) > LARGEST:
        raise InputError("--onnx: the student is larger than the 2 GiB that fit into an ONNX file; leave --onnx away.")
    example = example_images(student)
    try:
        with errors_only(*EXPORTER_LOGGERS), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                module,
                (example,),
                dynamo=True,
                dynamic_shapes=({0: torch.export.Dim("batch")},),
                input_names=["images"],
                output_names=["logits" if student.heads else "features"],
                opset_version=OPSET,
                verbose=False,
            )
    except torch.onnx.OnnxExporterError as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"--onnx: {student.architecture} cannot be expressed in ONNX ({reason}).") from error
    assert program is not None
    proto = program.model_proto
    for node in list(proto.graph.node):  # where each came from in this code: as much again as the graph itself
        del node.metadata_props[:]
        node.doc_string = ""
    described = {
        "distill": __version__,
        "architecture": student.architecture,
        "labels": json.dumps(list(class_names), ensure_ascii=False),
        "images": "RGB or grey pixels in [0, 1], of the student's size, not normalised",
    }
    for key, value in described.items():
        proto.metadata_props.add(key=key, value=value)
    path.write_bytes(proto.SerializeToString(deterministic=True))


def example_images(student: Student, number: int = 2) -> Tensor:
    """Random images in [0, 1] of the student's size, the same everywhere."""
    contract = student.adapter.contract
    assert contract.size is not None, "a student has one input size"
    shape = (number, len(contract.mean), contract.size, contract.size)
    return torch.rand(shape, generator=torch.Generator().manual_seed(0))


def open_session(path: Path) -> Any:
    """onnxruntime's session of a file, on the CPU, with as many threads as torch."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def onnx_logits(path: Path, batches: Iterable[Tensor]) -> Tensor:
    """What onnxruntime makes of images [B, C, size, size] in [0, 1]: float32 [N, classes]."""
    session = open_session(path)
    return torch.cat([torch.from_numpy(session.run(None, {"images": images.numpy()})[0]) for images in batches])


class Compared(NamedTuple):
    """What is between two logits of the same images."""

    difference: float
    """The largest."""
    others: int
    """Images that are decided otherwise, ties aside: the two best classes are further apart than the tolerance."""

    @property
    def problem(self) -> str | None:
        if self.difference <= TOLERANCE and not self.others:
            return None
        return f"logits differ by {self.difference:.3g}, and {self.others} images are decided otherwise"


def compare_logits(logits: Tensor, expected: Tensor) -> Compared:
    """[N, classes] each."""
    chosen = expected.gather(1, logits.argmax(1, keepdim=True))[:, 0]
    return Compared((logits - expected).abs().max().item(), int((chosen < expected.amax(1) - TOLERANCE).sum()))


@contextmanager
def errors_only(*names: str) -> Iterator[None]:
    """These loggers log nothing below an error."""
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
