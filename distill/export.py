"""A student as a folder that timm loads: config.json, model.safetensors, README.md."""

from __future__ import annotations

import copy
import json
import os
import shutil
import subprocess
import sys
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path

import timm
import torch
from torch import Tensor, nn

from distill import faults
from distill.digests import state_digest
from distill.durable import clear, flush_folder
from distill.errors import InputError
from distill.inputs import InputContract
from distill.seal import SEAL
from distill.students import Student, check_name, register_models
from distill.students.saved import (
    CONFIG_DIGEST,
    CONFIG_FILE,
    WEIGHTS_DIGEST,
    WEIGHTS_FILE,
    config_digest,
    read_export,
)
from distill.tensor_files import write_tensors
from distill.text_files import markdown, write_text

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
    faults.point("export begun")
    try:
        model = copy.deepcopy(student.model).cpu().to(memory_format=torch.contiguous_format).eval()
        weights = {name: tensor.detach().contiguous() for name, tensor in model.state_dict().items()}
        config = student.timm_config(class_names)
        write_text(staging / CONFIG_FILE, json.dumps(config, indent=2, ensure_ascii=False) + "\n")
        digests = {WEIGHTS_DIGEST: state_digest(weights), CONFIG_DIGEST: config_digest(staging)}
        write_tensors(staging / WEIGHTS_FILE, weights, {**metadata, "format": "pt", **digests, SEAL: ""})
        write_text(staging / "README.md", _readme(student, card))
        _compare_with_reloaded(model, staging)
        faults.point("export compared")
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
    if state_digest(model.state_dict()) != state_digest(weights):
        raise InputError(
            f"{folder}: this version of timm ({timm.__version__}) does not load the weights as they were written."
        )
    inputs = config["pretrained_cfg"]
    contract = InputContract(
        tuple(inputs["mean"]), tuple(inputs["std"]), inputs["input_size"][-1], inputs["interpolation"]
    )
    student = Student(model, contract, architecture=config["architecture"], model_args=config["model_args"])
    return student.eval(), list(config["label_names"])


def _compare_with_reloaded(model: nn.Module, folder: Path) -> None:
    # The fresh process finds this project where this one did, runs on the CPU, and is no rank of anything.
    roots = [str(Path(__file__).resolve().parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, roots)), "CUDA_VISIBLE_DEVICES": ""}
    command = "import sys; from distill.export import reload; reload(*sys.argv[1:])"
    arguments = [str(folder), str(torch.get_num_threads())]
    result = subprocess.run(
        [sys.executable, "-c", command, *arguments], env=environment, capture_output=True, text=True, check=False
    )
    if result.returncode:
        raise RuntimeError(f"the export cannot be loaded in a fresh process:\n{result.stderr}")
    reloaded = json.loads(result.stdout.splitlines()[-1])
    expected, digest = _described(model, folder)
    if reloaded["weights"] != digest:
        raise RuntimeError("the reloaded export has other weights than the student")
    logits = torch.tensor(reloaded["logits"])
    if not torch.allclose(logits, expected, rtol=TOLERANCE, atol=TOLERANCE):
        difference = (logits - expected).abs().max().item()
        raise RuntimeError(f"the reloaded export gives other logits than the student: they differ by {difference:.3g}")


def reload(folder: str, threads: str) -> None:
    """In a fresh process: load `folder` as any user of timm would; print its logits and the digest of its weights."""
    register_models()
    torch.set_num_threads(int(threads))
    logits, digest = _described(timm.create_model(f"local-dir:{folder}", pretrained=True).eval(), Path(folder))
    print(json.dumps({"logits": logits.tolist(), "weights": digest}))


def _described(model: nn.Module, folder: Path) -> tuple[Tensor, str]:
    """Logits on two random images of the size that the config names, the same everywhere, and the weights' digest."""
    size = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))["pretrained_cfg"]["input_size"]
    with torch.inference_mode():
        logits = model(torch.randn(2, *size, generator=torch.Generator().manual_seed(0)))
    return logits, state_digest(model.state_dict())


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


def _readme(student: Student, card: str) -> str:
    stock = type(student.model).__module__.startswith("timm.") and "stem" not in student.model_args
    imports = "import timm\n" if stock else "import distill.students  # this project's architectures\nimport timm\n"
    contract = markdown(str(student.adapter.contract))
    return (
        "---\nlibrary_name: timm\npipeline_tag: image-classification\n---\n\n"
        f"{card.strip()}\n\n## Load it\n\n```python\n{imports}\n"
        'model = timm.create_model("local-dir:PATH/OF/THIS/FOLDER", pretrained=True).eval()\n```\n\n'
        f"It takes {contract} (images in [0, 1] before that) and gives the mean of its heads' logits.\n"
    )


def _beside(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}-{uuid.uuid4().hex[:8]}")
