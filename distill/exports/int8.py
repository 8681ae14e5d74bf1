"""An ONNX file with int8 weights and activations: onnxruntime's static quantization, and what it costs.

Layers with weights of their own are put between quantize and dequantize nodes (QDQ); products of activations, as in
attention, and what is element by element stay in float32. Weights are quantized per channel, to 7 bits: on CPUs with
AVX2 or AVX-512 and without VNNI, onnxruntime adds two products of an unsigned and a signed byte in 16 bits, which
overflow with 8 (onnxruntime's documentation, "Quantize ONNX models", on U8S8). With 8 bits a student lost 8 points
there, with 7 a tenth of a point.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from distill.data import Dataset
from distill.data.randomness import permutation
from distill.environment import device_name
from distill.errors import InputError
from distill.exports.folder import Differs
from distill.exports.onnx_file import ONNX_FILE, FromPixels, errors_only, onnx_logits, open_session
from distill.report.runs import INT8_FORMAT
from distill.report.statistics import PairedTest, mcnemar
from distill.students import Student

INT8_FILE = "model.int8.onnx"
CALIBRATION_IMAGES = 512
SENSITIVITY_IMAGES = 128
BATCH = 64
LAYERS = ("MatMul", "Gemm", "Conv")
SPEED_RUNS = 100
MOST_NAMED = 5


class Int8(NamedTuple):
    """How an int8 file is asked for."""

    max_drop: float = 0.5
    """Points of top-1 that it may lose."""
    keep_float: Sequence[str] = ()
    """Layers that are not quantized; 'blocks.5' means all of them in it."""


class Cost(NamedTuple):
    """An int8 file beside the float32 one that it was made of."""

    correct: tuple[int, int]
    """Test images that are answered right; float32 first, as in all pairs."""
    test: PairedTest
    images: int
    """Of the test."""
    agreements: int
    """Test images that both decide alike."""
    milliseconds: tuple[float, float]
    """Of one image, on this machine."""
    bytes: tuple[int, int]

    @property
    def top1(self) -> tuple[float, float]:
        """In percent."""
        float32, int8 = self.correct
        return 100 * float32 / self.images, 100 * int8 / self.images

    @property
    def drop(self) -> float:
        """In points of top-1."""
        return self.top1[0] - self.top1[1]

    @property
    def words(self) -> str:
        milliseconds, megabytes = self.milliseconds, [size / 1e6 for size in self.bytes]
        agreement = 100 * self.agreements / self.images
        return (
            f"top-1 {self.top1[1]:.2f} % instead of {self.top1[0]:.2f} % on {self.images:,} test images: "
            f"{self.test.words}; {agreement:.2f} % of them decided alike; one image in {milliseconds[1]:.2f} ms "
            f"instead of {milliseconds[0]:.2f}; {megabytes[1]:.2f} MB instead of {megabytes[0]:.2f}"
        )


def record_of(cost: Cost, *, data: str, head: str, kept: Sequence[str]) -> dict[str, Any]:
    """Content of a run's `int8.json`; see `distill.files.records.Int8Values`.

    Args:
        data: digest of the data that it was measured on.
        kept: layers that stay in float32.
    """
    return {
        "format": INT8_FORMAT,
        "data": data,
        "head": head,
        "images": cost.images,
        "correct": list(cost.correct),
        "only_int8_right": cost.test.only_first_right,
        "only_float32_right": cost.test.only_second_right,
        "agreements": cost.agreements,
        "latency_seconds": [milliseconds / 1000 for milliseconds in cost.milliseconds],
        "bytes": list(cost.bytes),
        "kept": list(kept),
        "machine": device_name(torch.device("cpu")),
        "threads": torch.get_num_threads(),
        "onnxruntime": version("onnxruntime"),
    }


def add_int8(student: Student, folder: Path, dataset: Dataset, asked: Int8, seed: int) -> Cost:
    """Write an int8 file beside the ONNX file of `student` in `folder`, and measure it on the test images.

    Raises:
        InputError: a layer that is to stay in float32 is none of the student's.
        Differs: it loses more than `max_drop` points; the message has the layers that change the logits most.
    """
    source, target = folder / ONNX_FILE, folder / INT8_FILE
    layers = layers_of(source, student)
    for kept in asked.keep_float:
        if not any(_within(layer, kept) for layer in layers):
            raise InputError(f"--keep-float {kept}: no such layer. There are {', '.join(layers)}.")
    quantized = {
        layer: node for layer, node in layers.items() if not any(_within(layer, kept) for kept in asked.keep_float)
    }
    if not quantized:  # onnxruntime takes an empty list for all
        raise InputError("--keep-float: no layer is left to be quantized; keep fewer, or leave --int8 away.")
    images = calibration_images(student, dataset, seed)
    quantize(source, target, images, list(quantized.values()))
    cost = measure(source, target, student, dataset)
    if cost.drop > asked.max_drop:
        worst = [layer for layer, _ in sensitivities(source, images, quantized)[:MOST_NAMED]]
        raise Differs(
            f"int8 loses {cost.drop:.2f} points of top-1 ({cost.top1[1]:.2f} % instead of {cost.top1[0]:.2f} %), more "
            f"than --max-drop {asked.max_drop:g}. The layers that change the logits most are {', '.join(worst)}. Keep "
            f"some of them in float32 (--keep-float {worst[0]}), or allow more"
        )
    return cost


def _within(layer: str, part: str) -> bool:
    return layer == part or layer.startswith(f"{part}.")


def calibration_images(student: Student, dataset: Dataset, seed: int, count: int = CALIBRATION_IMAGES) -> list[Tensor]:
    """Training images without augmentation, a function of the seed, in batches [B, C, H, W] in [0, 1] of its size."""
    size = dataset.info.sizes["train"]
    chosen = permutation(seed, 0, size, torch.device("cpu"))[: min(count, size)].tolist()
    if dataset.in_order:  # an image is found by reading all before it
        wanted, batches = set(chosen), dataset.evaluation_batches("train", 0, max(chosen) + 1, 1)
        found = {index: image.cpu() for index, (image, _) in enumerate(batches) if index in wanted}
        images = [found[index] for index in chosen]
    else:
        images = [next(dataset.evaluation_batches("train", index, index + 1, 1))[0].cpu() for index in chosen]
    return list(student.adapter.fit(torch.cat(images)).split(BATCH))


def layers_of(file: Path, student: Student) -> dict[str, str]:
    """The layers with weights in an ONNX file of this student: name of the module -> name of the node."""
    import onnx
    from onnx import numpy_helper

    graph = onnx.load(file).graph
    constants = {constant.name: constant for constant in graph.initializer}
    model = FromPixels(student).model
    weights = {_content(module.weight): name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    found = {}
    for node in graph.node:
        if node.op_type not in LAYERS or (constant := constants.get(node.input[1])) is None:
            continue
        name = constant.name.removeprefix("model.").removesuffix("_bias").removesuffix(".weight")
        if node.op_type == "MatMul":  # a transposed weight has lost its name
            values = torch.from_numpy(numpy_helper.to_array(constant).copy())
            name = weights.get(_content(values.t()), name)
        found[name.removeprefix("body.")] = node.name
    return found


def _content(values: Tensor) -> bytes:
    return values.detach().contiguous().numpy().tobytes() + bytes(str(tuple(values.shape)), "ascii")


def quantize(source: Path, target: Path, images: Sequence[Tensor], nodes: Collection[str]) -> None:
    """Write an int8 version of the ONNX file `source`, in which these nodes are quantized.

    Args:
        images: batches [B, C, H, W] in [0, 1] for the ranges of the activations: their smallest and largest values.
    """
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Images(CalibrationDataReader):
        def __init__(self) -> None:
            self.batches = iter(images)

        def get_next(self) -> dict[str, Any] | None:
            batch = next(self.batches, None)
            return None if batch is None else {"images": batch.numpy()}

    prepared = target.with_suffix(".prepared.onnx")
    with errors_only("root"):  # onnxruntime logs there which weights have no channels
        quant_pre_process(source, prepared, skip_symbolic_shape=True)
        quantize_static(
            prepared,
            target,
            Images(),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=list(LAYERS),
            nodes_to_quantize=list(nodes),
            per_channel=True,
            reduce_range=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
        )
    prepared.unlink()


def sensitivities(source: Path, images: Sequence[Tensor], layers: Mapping[str, str]) -> list[tuple[str, float]]:
    """How much each layer alone, quantized, changes the logits: layer, mean squared change; the largest first."""
    few = list(torch.cat(list(images))[:SENSITIVITY_IMAGES].split(BATCH))
    target = source.with_name("sensitivity.onnx")
    expected = onnx_logits(source, few)
    found = []
    for layer, node in layers.items():
        quantize(source, target, few, [node])
        found.append((layer, (onnx_logits(target, few) - expected).square().mean().item()))
        target.unlink()
    return sorted(found, key=lambda pair: -pair[1])


def measure(source: Path, target: Path, student: Student, dataset: Dataset) -> Cost:
    """The int8 file `target` beside the float32 file `source`, on all test images, in turns."""
    sessions = [open_session(path) for path in (source, target)]
    labels = dataset.labels("test")
    decisions: tuple[list[Any], list[Any]] = [], []
    for images, _ in dataset.evaluation_batches("test", 0, len(labels), BATCH):
        fitted = {"images": student.adapter.fit(images).cpu().numpy()}
        for session, found in zip(sessions, decisions, strict=True):
            found.append(session.run(None, fitted)[0].argmax(1))
    float32, int8 = (np.concatenate(found) for found in decisions)
    right = [answers == labels.numpy() for answers in (float32, int8)]
    one = {"images": fitted["images"][:1]}
    seconds: tuple[list[float], list[float]] = [], []
    for _ in range(SPEED_RUNS):
        for session, times in zip(sessions, seconds, strict=True):
            began = time.perf_counter()
            session.run(None, one)
            times.append(time.perf_counter() - began)
    return Cost(
        (int(right[0].sum()), int(right[1].sum())),
        mcnemar("int8", "float32", right[1], right[0]),
        len(labels),
        int((float32 == int8).sum()),
        (1000 * median(seconds[0]), 1000 * median(seconds[1])),
        (source.stat().st_size, target.stat().st_size),
    )
