"""A student as a folder that timm loads: config.json, model.safetensors, README.md, and perhaps model.onnx."""

from __future__ import annotations

import copy
import json
import os
import shutil
import subprocess
import sys
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import timm
import torch
from torch import Tensor

from distill import faults, registry
from distill.errors import InputError
from distill.exports.onnx_file import ONNX_FILE, compare_logits, example_images, onnx_logits, write_onnx
from distill.files.checksum import CHECKSUM
from distill.files.digests import state_digest
from distill.files.durable import clear, flush_folder
from distill.files.tensors import write_tensors
from distill.files.text import write_text
from distill.inputs import InputContract, Preparation
from distill.out_of_memory import bounded_allocation
from distill.recipe.reading import short
from distill.students import Student, check_name, register_models
from distill.students.saved import (
    CONFIG_DIGEST,
    CONFIG_FILE,
    WEIGHTS_DIGEST,
    WEIGHTS_FILE,
    config_digest,
    read_export,
    variants_in,
)
from distill.version import __version__

TOLERANCE = 1e-6
"""Largest difference, absolute plus relative, between the logits here and those of the reloaded model."""


HALF_TOLERANCE = 0.02
"""Largest difference of logits that float16 weights may make, as a share of the largest logit."""


class Differs(RuntimeError):
    """The reloaded export is another model than the student."""


def write_export(
    student: Student,
    folder: Path,
    *,
    class_names: Sequence[str],
    metadata: Mapping[str, str],
    readme: str,
    half: bool = False,
    onnx: bool = False,
    inspect: Callable[[Path], None] | None = None,
) -> None:
    """Write the student's weights, as they are, to `folder`, replacing an earlier export there.

    The folder appears complete or not at all: it is written beside where it goes, reloaded in a fresh process, compared
    with the student (weights to the bit, logits to 1e-6, those of ONNX to 1e-4) and then renamed.

    Args:
        class_names: one per class, in the order of the logits.
        metadata: goes into the weights file.
        half: store the weights rounded to float16.
        onnx: write the same weights as model.onnx too, in float32.
        inspect: is shown the finished folder before it is renamed, and may raise.

    Raises:
        Differs: the reloaded model is another one.
        InputError: the weights do not fit into float16, or the student not into ONNX.
        In any case nothing is left behind.
    """
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    staging = _beside(folder)
    staging.mkdir()
    faults.point("export begun")
    try:
        student = copy.deepcopy(student).cpu().to(memory_format=torch.contiguous_format)
        student.model.eval()
        weights = {name: tensor.detach().contiguous() for name, tensor in student.model.state_dict().items()}
        if half:
            weights = _halve(student, weights)
        config = student.timm_config(class_names)
        write_text(staging / CONFIG_FILE, json.dumps(config, indent=2, ensure_ascii=False) + "\n")
        _write_weights(staging, weights, metadata)
        write_text(staging / "README.md", readme)
        if onnx:
            write_onnx(student, staging / ONNX_FILE, class_names)
        _compare_with_reloaded(student, staging)
        faults.point("export compared")
        if inspect is not None:
            inspect(staging)
        _move_into_place(staging, folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def describe(folder: Path, metadata: Mapping[str, str], readme: str) -> None:
    """Let an export say this of itself, in the metadata of its weights and in its README; all else stays.

    Raises:
        InputError: the export is damaged.
    """
    saved = read_export(folder)
    if any(saved.metadata.get(key) != value for key, value in metadata.items()):
        _write_weights(folder, saved.weights, {**saved.metadata, **metadata})
    write_text(folder / "README.md", readme)


def _write_weights(folder: Path, weights: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Beside the config.json that they belong to."""
    own = {"format": "pt", "distill_version": __version__, CHECKSUM: ""}
    digests = {WEIGHTS_DIGEST: state_digest(weights), CONFIG_DIGEST: config_digest(folder)}
    write_tensors(folder / WEIGHTS_FILE, weights, {**metadata, **own, **digests})


def _halve(student: Student, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights in float16, and the student's own rounded likewise."""
    halves = {name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in weights.items()}
    images = student.adapter(example_images(student, 8))
    with torch.inference_mode():
        expected = student.model(images)
        student.model.load_state_dict(halves)
        difference, largest = (student.model(images) - expected).abs().max().item(), expected.abs().max().item()
    if not difference <= HALF_TOLERANCE * largest:
        raise InputError(
            f"--fp16: float16 is too coarse for these weights: logits of up to {largest:.3g} change by "
            f"{difference:.3g}. Leave --fp16 away."
        )
    return halves


def load_export(folder: str | Path) -> tuple[Student, list[str]]:
    """The student in an export folder, in eval mode on the CPU, and its class names.

    Raises:
        InputError: a file is missing, damaged or was changed, is of an architecture that is not known here, or the
            model is another one than the weights are of.
    """
    folder = Path(folder)
    config, weights, metadata = read_export(folder)
    registry.check_available(variants_in(metadata, str(folder / WEIGHTS_FILE)), str(folder))
    check_name(config["architecture"], str(folder / CONFIG_FILE))
    try:
        with bounded_allocation(sum(tensor.nbytes for tensor in weights.values()), len(weights)):
            model = timm.create_model(f"local-dir:{folder}", pretrained=True)
        preparation = Preparation.from_json(config["preparation"]) if "preparation" in config else None
    except Exception as error:  # wrong arguments can fail anywhere in the model's constructor
        reason = short(" ".join(str(error).split()) or type(error).__name__)
        raise InputError(f"{folder}: its {CONFIG_FILE} describes no student of these weights ({reason}).") from error
    types = {name: tensor.dtype for name, tensor in model.state_dict().items()}
    cast = {name: tensor.to(types.get(name, tensor.dtype)) for name, tensor in weights.items()}
    if state_digest(model.state_dict()) != state_digest(cast):
        raise InputError(
            f"{folder}: this version of timm ({timm.__version__}) does not load the weights as they were written."
        )
    inputs = config["pretrained_cfg"]
    contract = InputContract(
        tuple(inputs["mean"]), tuple(inputs["std"]), inputs["input_size"][-1], inputs["interpolation"]
    )
    student = Student(
        model,
        contract,
        architecture=config["architecture"],
        model_args=config["model_args"],
        preparation=preparation,
    )
    return student.eval(), list(config["label_names"])


def _compare_with_reloaded(student: Student, folder: Path) -> None:
    # The fresh process finds this project where this one did, runs on the CPU, and is no rank of anything.
    roots = [str(Path(__file__).resolve().parents[2]), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, roots)), "CUDA_VISIBLE_DEVICES": ""}
    command = "import sys; from distill.exports.folder import reload; reload(*sys.argv[1:])"
    arguments = [str(folder), str(torch.get_num_threads()), *registry.plugins()]
    result = subprocess.run(
        [sys.executable, "-c", command, *arguments], env=environment, capture_output=True, text=True, check=False
    )
    if result.returncode:
        raise Differs(f"the export cannot be loaded in a fresh process:\n{result.stderr}")
    reloaded = json.loads(result.stdout.splitlines()[-1])
    images = example_images(student)
    with torch.inference_mode():
        expected = student.model(student.adapter(images))
    if reloaded["weights"] != state_digest(student.model.state_dict()):
        raise Differs("the reloaded export has other weights than the student")
    logits = torch.tensor(reloaded["logits"])
    if not torch.allclose(logits, expected, rtol=TOLERANCE, atol=TOLERANCE):
        difference = (logits - expected).abs().max().item()
        raise Differs(f"the reloaded export gives other logits than the student: they differ by {difference:.3g}")
    if "onnx" in reloaded and (problem := compare_logits(torch.tensor(reloaded["onnx"]), expected).problem):
        raise Differs(f"the ONNX file is another model than the student: {problem}")


def reload(folder: str, threads: str, *plugins: str) -> None:
    """In a fresh process: load `folder` as any user of timm would; print its logits on the example images, as torch and
    onnxruntime compute them, and the digest of its weights.
    """
    torch.set_num_threads(int(threads))
    for plugin in plugins:
        registry.load_plugin(plugin)
    register_models()
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    student, _ = load_export(folder)
    images = example_images(student)
    with torch.inference_mode():
        found = {"logits": model(student.adapter(images)).tolist(), "weights": state_digest(model.state_dict())}
    if (file := Path(folder) / ONNX_FILE).exists():
        found["onnx"] = onnx_logits(file, [images]).tolist()
    print(json.dumps(found))


def _move_into_place(staging: Path, folder: Path) -> None:
    if folder.exists():
        earlier = _beside(folder)
        folder.rename(earlier)
        faults.point("export renamed away")
        staging.rename(folder)
        clear(earlier)
    else:
        staging.rename(folder)
    faults.point("export renamed")
    flush_folder(folder.parent)


def _beside(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}-{uuid.uuid4().hex[:8]}")
