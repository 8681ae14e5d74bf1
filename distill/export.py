"""A student as a folder that timm loads: config.json, model.safetensors, README.md."""

from __future__ import annotations

import copy
import json
import os
import shutil
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path

import timm
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from distill.errors import InputError
from distill.inputs import InputContract
from distill.students import Student, check_name, register_models
from distill.students.saved import (
    CONFIG_DIGEST,
    CONFIG_FILE,
    WEIGHTS_DIGEST,
    WEIGHTS_FILE,
    config_digest,
    read_export,
    weights_digest,
)
from distill.tensor_files import write_tensors

TOLERANCE = 1e-6
"""Largest difference, absolute plus relative, between the logits here and those of the reloaded model."""


def write_export(
    student: Student, folder: Path, *, class_names: Sequence[str], metadata: Mapping[str, str], card: str
) -> None:
    """Write the student's weights, as they are, to `folder`, replacing an earlier export there.

    The folder appears complete or not at all: it is written beside its place, reloaded by timm in a fresh process,
    compared with the student (weights to the bit, logits to 1e-6) and then renamed.

    Args:
        class_names: one per class, in the order of the logits.
        metadata: goes into the weights file.
        card: Markdown about this student; the README adds how to load it.

    Raises:
        RuntimeError: the reloaded model is another one; nothing is left behind.
    """
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    staging = _beside(folder)
    staging.mkdir()
    try:
        model = copy.deepcopy(student.model).cpu().to(memory_format=torch.contiguous_format).eval()
        weights = {name: tensor.detach().contiguous() for name, tensor in model.state_dict().items()}
        config = student.timm_config(class_names)
        (staging / CONFIG_FILE).write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        digests = {WEIGHTS_DIGEST: weights_digest(weights), CONFIG_DIGEST: config_digest(staging)}
        write_tensors(staging / WEIGHTS_FILE, weights, {**metadata, "format": "pt", **digests})
        shutil.copymode(staging / CONFIG_FILE, staging / WEIGHTS_FILE)  # safetensors lets nobody else read it
        (staging / "README.md").write_text(_readme(student, card), encoding="utf-8")
        _compare_with_reloaded(model, staging, config["pretrained_cfg"]["input_size"])
        _move_into_place(staging, folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def load_export(folder: str | Path) -> tuple[Student, list[str]]:
    """The student in an export folder, in eval mode on the CPU, and its class names.

    Raises:
        InputError: a file is missing, damaged or was changed, or is of an architecture that is not known here.
    """
    folder = Path(folder)
    config, weights = read_export(folder)
    check_name(config["architecture"], str(folder / CONFIG_FILE))
    model = timm.create_model(f"local-dir:{folder}", pretrained=True)
    if weights_digest(model.state_dict()) != weights_digest(weights):
        raise InputError(
            f"{folder}: this version of timm ({timm.__version__}) does not load the weights as they were written."
        )
    inputs = config["pretrained_cfg"]
    contract = InputContract(
        tuple(inputs["mean"]), tuple(inputs["std"]), inputs["input_size"][-1], inputs["interpolation"]
    )
    student = Student(model, contract, architecture=config["architecture"], model_args=config["model_args"])
    return student.eval(), list(config["label_names"])


def _compare_with_reloaded(model: nn.Module, folder: Path, input_size: Sequence[int]) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        images = torch.randn(2, *input_size, generator=torch.Generator().manual_seed(0))
        save_file({"images": images}, Path(scratch) / "images.safetensors")
        # The fresh process finds this project where this one did, runs on the CPU, and is no rank of anything.
        roots = [str(Path(__file__).resolve().parents[1]), os.environ.get("PYTHONPATH", "")]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, roots)), "CUDA_VISIBLE_DEVICES": ""}
        command = "import sys; from distill.export import reload; reload(*sys.argv[1:])"
        arguments = [str(folder), scratch, str(torch.get_num_threads())]
        result = subprocess.run(
            [sys.executable, "-c", command, *arguments], env=environment, capture_output=True, text=True, check=False
        )
        if result.returncode:
            raise RuntimeError(f"the export cannot be loaded in a fresh process:\n{result.stderr}")
        reloaded = load_file(Path(scratch) / "reloaded.safetensors")
    logits = reloaded.pop("/logits")
    with torch.inference_mode():
        expected: Tensor = model(images)
    if weights_digest(reloaded) != weights_digest(model.state_dict()):
        raise RuntimeError("the reloaded export has other weights than the student")
    if not torch.allclose(logits, expected, rtol=TOLERANCE, atol=TOLERANCE):
        difference = (logits - expected).abs().max().item()
        raise RuntimeError(f"the reloaded export gives other logits than the student: they differ by {difference:.3g}")


def reload(folder: str, scratch: str, threads: str) -> None:
    """In a fresh process: load `folder` as any user of timm would; write its weights and its logits on the images."""
    register_models()
    torch.set_num_threads(int(threads))
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    images = load_file(Path(scratch) / "images.safetensors")["images"]
    with torch.inference_mode():
        logits = model(images)
    save_file({**model.state_dict(), "/logits": logits}, Path(scratch) / "reloaded.safetensors")


def _move_into_place(staging: Path, folder: Path) -> None:
    if not folder.exists():
        staging.rename(folder)
        return
    earlier = _beside(folder)
    folder.rename(earlier)
    staging.rename(folder)
    shutil.rmtree(earlier)


def _readme(student: Student, card: str) -> str:
    stock = type(student.model).__module__.startswith("timm.") and "stem" not in student.model_args
    imports = "import timm\n" if stock else "import distill.students  # this project's architectures\nimport timm\n"
    return (
        "---\nlibrary_name: timm\npipeline_tag: image-classification\n---\n\n"
        f"{card.strip()}\n\n## Load it\n\n```python\n{imports}\n"
        'model = timm.create_model("local-dir:PATH/OF/THIS/FOLDER", pretrained=True).eval()\n```\n\n'
        f"It takes {student.adapter.contract} (images in [0, 1] before that) and gives the mean of its heads' logits.\n"
    )


def _beside(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}-{uuid.uuid4().hex[:8]}")
