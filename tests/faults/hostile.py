"""Exports and run directories as somebody hostile would make them, with checksums that fit."""

from __future__ import annotations

import copy
import json
import os
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor

from distill.files.checksum import CHECKSUM
from distill.files.digests import state_digest
from distill.files.tensors import write_tensors
from distill.inputs import InputContract
from distill.students import Student, register_models
from distill.students.saved import CONFIG_DIGEST, CONFIG_FILE, WEIGHTS_DIGEST, WEIGHTS_FILE, config_digest, read_export

CLASSES = ("red", "green", "blue", "grey")
Change = Callable[[dict[str, Any]], Any]
"""Changes a JSON object in place, or returns what stands in its place: an object, a text or bytes."""


def make_export(folder: Path) -> Path:
    """The export of a very small student with random weights, for four classes of 3x8x8 images."""
    register_models()
    arguments = {"img_size": 8, "patch_size": 4, "embed_dim": 12, "depth": 2, "num_heads": 3, "distilled": True}
    arguments |= {"attention": {"max_area": 2, "blocks": [0]}}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = timm.create_model("area_vit_nano", num_classes=len(CLASSES), **arguments)
    contract = InputContract((0.5,) * 3, (0.2,) * 3, 8)
    student = Student(model, contract, architecture="area_vit_nano", model_args=arguments)
    folder.mkdir(parents=True)
    (folder / CONFIG_FILE).write_text(json.dumps(student.timm_config(CLASSES)))
    seal(folder, model.state_dict(), {})
    return folder


def as_bytes(value: Any) -> bytes:
    if isinstance(value, bytes | str):
        return value.encode("utf-8", "surrogatepass") if isinstance(value, str) else value
    return json.dumps(value).encode()


def changed(content: dict[str, Any], change: Change) -> bytes:
    """The JSON text of a changed object."""
    content = copy.deepcopy(content)
    result = change(content)
    return as_bytes(content if result is None else result)


def seal(folder: Path, weights: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write the weights with digests that fit them and the config.json beside them."""
    digests = {WEIGHTS_DIGEST: state_digest(weights), CONFIG_DIGEST: config_digest(folder), CHECKSUM: ""}
    write_tensors(folder / WEIGHTS_FILE, weights, {**metadata, **digests})


def hostile_export(
    good: Path,
    folder: Path,
    *,
    config: Change | None = None,
    weights: Callable[[dict[str, Tensor]], Any] | None = None,
    metadata: Mapping[str, str] | None = None,
) -> Path:
    """A changed copy of an export, whose digests fit."""
    saved = read_export(good)
    folder.mkdir(parents=True)
    (folder / CONFIG_FILE).write_bytes(changed(saved.config, config or (lambda _: None)))
    tensors = dict(saved.weights)
    if weights is not None:
        tensors = weights(tensors) or tensors
    seal(folder, tensors, {**saved.metadata, **(metadata or {})})
    return folder


def setting(*path: str | int, to: Any) -> Change:
    """Sets one value within the object."""

    def change(content: Any) -> None:
        for key in path[:-1]:
            content = content[key]
        content[path[-1]] = to

    return change


def without(*path: str | int) -> Change:
    """Removes one key within the object."""

    def change(content: Any) -> None:
        for key in path[:-1]:
            content = content[key]
        del content[path[-1]]

    return change


def deep(kind: str, depth: int = 100_000) -> str:
    opening, closing = {"list": ("[", "]"), "object": ('{"a":', "}")}[kind]
    return opening * depth + ("1" if kind == "object" else "") + closing * depth


HOSTILE_CONFIGS: dict[str, Change] = {
    "empty file": lambda _: b"",
    "no JSON": lambda _: b"\x80\x04\x95cos\nsystem",
    "a list": lambda _: [],
    "a number": lambda _: "1",
    "deep lists": lambda _: deep("list"),
    "deep objects": lambda _: deep("object"),
    "deep enough to walk": lambda config: {**config, "model_args": json.loads(deep("object", 200))},
    "too long": lambda config: json.dumps(config) + " " * (5 << 20),
    "a key twice": lambda config: json.dumps(config)[:-1] + ', "architecture": "resnet18"}',
    "half a surrogate pair": setting("label_names", 0, to="\ud800"),
    "not UTF-8": lambda config: json.dumps(config).replace("green", "gr\udcffn").encode("utf-8", "surrogateescape"),
    "400 digits": lambda config: json.dumps(config).replace('"num_classes": 4', f'"num_classes": {"4" * 400}'),
    "5,000 digits": lambda config: json.dumps(config).replace('"num_classes": 4', f'"num_classes": {"4" * 5000}'),
    "no architecture": without("architecture"),
    "no classes": without("num_classes"),
    "no names": without("label_names"),
    "no arguments": without("model_args"),
    "no inputs": without("pretrained_cfg"),
    "no mean": without("pretrained_cfg", "mean"),
    "no std": without("pretrained_cfg", "std"),
    "no size": without("pretrained_cfg", "input_size"),
    "no interpolation": without("pretrained_cfg", "interpolation"),
    "architecture is a list": setting("architecture", to=["resnet18"]),
    "architecture of the hub": setting("architecture", to="hf-hub:somebody/something"),
    "architecture is a folder": setting("architecture", to="local-dir:/tmp"),
    "architecture is a path": setting("architecture", to="../../etc/passwd"),
    "another architecture": setting("architecture", to="resnet18"),
    "a very large architecture": setting("architecture", to="vit_giant_patch14_224"),
    "inputs are a list": setting("pretrained_cfg", to=[]),
    "names are a text": setting("label_names", to="abcd"),
    "names are numbers": setting("label_names", to=[1, 2, 3, 4]),
    "one name for all classes": setting("label_names", to=["a"]),
    "the same name for all": setting("label_names", to=["a"] * 4),
    "no name": setting("label_names", to=[]),
    "no class": setting("num_classes", to=0),
    "negative classes": setting("num_classes", to=-4),
    "more classes than weights": lambda config: config.update(
        num_classes=5, label_names=list("abcde"), pretrained_cfg={**config["pretrained_cfg"], "num_classes": 5}
    ),
    "terabytes of classes": setting("pretrained_cfg", "num_classes", to=10**15),
    "mean is NaN": setting("pretrained_cfg", "mean", to=[float("nan")] * 3),
    "std is infinite": setting("pretrained_cfg", "std", to=[float("inf")] * 3),
    "std is 0": setting("pretrained_cfg", "std", to=[0.0] * 3),
    "std is negative": setting("pretrained_cfg", "std", to=[-1.0] * 3),
    "mean of one channel": setting("pretrained_cfg", "mean", to=[0.5]),
    "mean is a text": setting("pretrained_cfg", "mean", to="0.5"),
    "size is negative": setting("pretrained_cfg", "input_size", to=[3, -8, -8]),
    "size is huge": setting("pretrained_cfg", "input_size", to=[3, 10**9, 10**9]),
    "size is no list": setting("pretrained_cfg", "input_size", to=8),
    "size of two": setting("pretrained_cfg", "input_size", to=[3, 8]),
    "size is not square": setting("pretrained_cfg", "input_size", to=[3, 8, 16]),
    "channels do not fit": lambda config: config["pretrained_cfg"].update(input_size=[1, 8, 8], mean=[0.5], std=[0.2]),
    "unknown interpolation": setting("pretrained_cfg", "interpolation", to="../../x"),
    "weights from an address": setting("pretrained_cfg", "url", to="http://127.0.0.1:9/x.pth"),
    "weights from another file": setting("pretrained_cfg", "file", to="/etc/passwd"),
    "weights from the hub": setting("pretrained_cfg", "hf_hub_id", to="somebody/something"),
    "arguments are a list": setting("model_args", to=[1]),
    "unknown argument": setting("model_args", "no_such_argument", to=1),
    "argument pretrained": setting("model_args", "pretrained", to=True),
    "argument checkpoint_path": setting("model_args", "checkpoint_path", to="/etc/passwd"),
    "argument pretrained_cfg_overlay": setting("model_args", "pretrained_cfg_overlay", to={"url": "http://x"}),
    "patch of 0": setting("model_args", "patch_size", to=0),
    "negative patch": setting("model_args", "patch_size", to=-4),
    "patch is a text": setting("model_args", "patch_size", to="4"),
    "terabytes of image": setting("model_args", "img_size", to=10**9),
    "gigabytes of image": setting("model_args", "img_size", to=2**16),
    "terabytes of width": setting("model_args", "embed_dim", to=99_999),
    "millions of blocks": setting("model_args", "depth", to=10**6),
    "many blocks": setting("model_args", "depth", to=10**5),
    "negative heads": setting("model_args", "num_heads", to=-3),
    "unknown attention": lambda config: config["model_args"]["attention"].update(no_such_option=1),
    "attention in no block": lambda config: config["model_args"]["attention"].update(blocks=[10**6]),
    "attention is a list": setting("model_args", "attention", to=[]),
    "preparation is a list": setting("preparation", to=[1]),
    "unknown preparation": setting("preparation", "no_such_key", to=1),
    "channels of no image": setting("preparation", "channels", to=1000),
    "ground of no colour": setting("preparation", "background", to=[10**9, -1, 0]),
    "ground of one value": setting("preparation", "background", to=[0]),
    "channels are a text": setting("preparation", "channels", to="3"),
}
"""What config.json becomes. All are refused."""


def nan_weights(weights: dict[str, Tensor]) -> None:
    weights["head_dist.weight"] = torch.full_like(weights["head_dist.weight"], float("nan"))


HOSTILE_WEIGHTS: dict[str, Callable[[dict[str, Tensor]], Any]] = {
    "no tensor": lambda weights: weights.clear(),
    "a tensor is missing": lambda weights: weights.__delitem__("head.weight"),
    "a tensor more": lambda weights: weights.update({"../../x": torch.zeros(1)}),
    "another shape": lambda weights: weights.update({"head.weight": torch.zeros(4, 1)}),
    "no dimension": lambda weights: weights.update({"head.weight": torch.zeros(())}),
    "no value": lambda weights: weights.update({"head.weight": torch.zeros(4, 0)}),
    "integers": lambda weights: weights.update({"pos_embed": torch.zeros(3, dtype=torch.int64)}),
    "positions of one dimension": lambda weights: weights.update({"pos_embed": torch.zeros(7)}),
}

HOSTILE_METADATA: dict[str, dict[str, str]] = {
    "variants are no JSON": {"variants": "{"},
    "variants are deep": {"variants": deep("list")},
    "variants are a list": {"variants": "[]"},
    "a variant is a number": {"variants": '{"methods/hard": 1}'},
    "a variant of no group": {"variants": '{"os/system": "x"}'},
    "a variant of a path": {"variants": '{"methods/../../x": "y"}'},
    "a variant that injects": {"variants": '{}, "command": 1'},
}


def files_that_are_none(good: Path, folder: Path) -> dict[str, Path]:
    """Export folders with something else where a file should be; a link to a file is as good as the file."""
    found = {}
    for number, name in enumerate((CONFIG_FILE, WEIGHTS_FILE)):
        for kind in ("folder", "pipe", "broken link", "loop", "device"):
            path = folder / f"{kind} {number}"
            path.mkdir(parents=True)
            for other in (CONFIG_FILE, WEIGHTS_FILE):
                if other != name:
                    (path / other).write_bytes((good / other).read_bytes())
            match kind:
                case "folder":
                    (path / name).mkdir()
                case "pipe":
                    os.mkfifo(path / name)
                case "broken link":
                    (path / name).symlink_to("nowhere")
                case "loop":
                    (path / name).symlink_to(name)
                case "device":
                    (path / name).symlink_to("/dev/zero")
            found[f"{name}: {kind}"] = path
    return found


def raw_safetensors(header: Any, data: bytes = b"") -> bytes:
    """A file of that format with any header."""
    text = as_bytes(header)
    return struct.pack("<Q", len(text)) + text + data


HOSTILE_HEADERS: dict[str, bytes] = {
    "empty": b"",
    "terabytes of header": struct.pack("<Q", 2**42) + b"{}",
    "no JSON": raw_safetensors("{"),
    "deep": raw_safetensors(deep("object", 10_000)),
    "negative offsets": raw_safetensors({"a": {"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]}}),
    "terabytes of tensor": raw_safetensors(
        {"a": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}, bytes(4)
    ),
    "overflowing shape": raw_safetensors(
        {"a": {"dtype": "F32", "shape": [2**62, 2**62], "data_offsets": [0, 4]}}, bytes(4)
    ),
    "unknown dtype": raw_safetensors({"a": {"dtype": "F1024", "shape": [1], "data_offsets": [0, 4]}}, bytes(4)),
    "metadata of numbers": raw_safetensors({"__metadata__": {"sha256/weights": 1}}),
}
