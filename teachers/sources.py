"""Loads the network of a recipe's `teacher` section: trained weights and input contract."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from http.client import HTTPException
from pathlib import Path
from typing import Any, Literal, NamedTuple

import timm
import torchvision
from huggingface_hub.errors import EntryNotFoundError
from torch import nn

import teachers.cifar_resnet  # noqa: F401  registers the names with timm
from distill import recipe
from distill.errors import InputError
from distill.files.digests import file_digest
from distill.files.plain_data import MOST_BYTES, parse_json
from distill.files.records import TimmConfig, check
from distill.files.regular import read_bytes
from distill.inputs import InputContract
from distill.out_of_memory import bounded_allocation
from distill.recipe.reading import short
from teachers.weights import download, load_weights, transformers_model
from teachers.zoo import ZOO

_TORCH_INTERPOLATIONS = ("nearest", "bilinear", "bicubic")
MOST_TENSORS = 10_000
"""Of a teacher's weights."""
_FOLDER_FILES = ("model.safetensors", "pytorch_model.bin", "pytorch_model.pth", "model.pth")


Scheme = Literal["zoo", "local-dir", "hf_hub", "torchvision", "timm"]
_PREFIXES: dict[str, Scheme] = {
    "local-dir:": "local-dir", "hf_hub:": "hf_hub", "hf-hub:": "hf_hub", "torchvision/": "torchvision"
}  # fmt: skip


class Address(NamedTuple):
    """Where a teacher's `model` is found, and its name or folder there."""

    scheme: Scheme
    name: str


def parse(model: str) -> Address:
    """Parse a recipe's `teacher.model`: a name in the zoo, one with a prefix, or else a timm name."""
    if model in ZOO:
        return Address("zoo", model)
    for prefix, scheme in _PREFIXES.items():
        if model.startswith(prefix):
            return Address(scheme, model.removeprefix(prefix))
    return Address("timm", model)


class Source(NamedTuple):
    network: nn.Module
    contract: InputContract
    num_classes: int
    """Of its logits; 0 without a classifier."""
    class_names: tuple[str, ...] | None = None
    """Of its outputs, where a folder or a configuration of the hub records them."""


def contract_is_assumed(spec: recipe.Teacher) -> bool:
    """Whether a weights file of the user's own gets the input contract of a library's name, at least in part."""
    if spec.weights is None or spec.model is None or None not in (spec.size, spec.mean, spec.std):
        return False
    scheme, name = parse(spec.model)
    known = scheme == "zoo" and file_digest(Path(spec.weights)).startswith(ZOO[name].sha256)
    return scheme != "local-dir" and not known


def open_source(spec: recipe.Teacher, num_classes: int) -> Source:
    """The network of `spec`, with all weights trained.

    The contract is the recipe's, by default that of the zoo, the timm configuration or torchvision.

    Raises:
        InputError: unknown model, weights that cannot be loaded or do not fit, or another number of classes than
            `num_classes` or 0.
    """
    assert spec.model is not None
    scheme, name = parse(spec.model)
    match scheme:
        case "zoo":
            return _from_zoo(spec, name, num_classes)
        case "local-dir":
            return _from_folder(spec, Path(name), num_classes)
        case "hf_hub":
            return _from_hub(spec, name, num_classes)
        case "torchvision":
            return _from_torchvision(spec, name, num_classes)
        case "timm":
            return _from_timm(spec, name, num_classes)


def untrained_source(spec: recipe.Teacher, num_classes: int) -> Source:
    """The network of `spec` with random weights, and its contract; downloads at most a configuration of the hub.

    Raises:
        InputError: no such model.
    """
    if spec.model is None:
        raise InputError(f"teacher.recipe: {spec.recipe} trains this teacher; give teacher.model instead.")
    scheme, name = parse(spec.model)
    match scheme:
        case "zoo":
            return _zoo_source(spec, name, num_classes)
        case "torchvision":
            _, contract = _torchvision_preset(spec, name)
            return Source(
                torchvision.models.get_model(name, weights=None, num_classes=num_classes), contract, num_classes
            )
        case "local-dir":
            network = _folder_network(spec, Path(name))
        case "hf_hub":
            _hub_config(name)
            network = timm.create_model(f"hf-hub:{name}")
        case "timm":
            _timm_config(name)
            network = timm.create_model(name)
    network.reset_classifier(num_classes)
    return Source(network, _contract(spec, _timm_contract(network.pretrained_cfg)), num_classes)


def classes_of_weights(spec: recipe.Teacher) -> int | None:
    """The number of classes of the weights that `spec.model` names, which are not loaded; 0: no classifier; None: it is
    not recorded.

    Raises:
        InputError: no such model, or it has no weights.
    """
    assert spec.model is not None
    scheme, name = parse(spec.model)
    match scheme:
        case "zoo":
            return ZOO[name].num_classes
        case "local-dir":
            return int(_folder_network(spec, Path(name)).num_classes)
        case "hf_hub":
            return _hub_config(name).get("num_classes")
        case "torchvision":
            return len(_torchvision_preset(spec, name)[0].meta["categories"])
        case "timm":
            config = _timm_config(name)
            _require_weights(name, config)
            return int(config.num_classes)


def _zoo_source(spec: recipe.Teacher, name: str, num_classes: int) -> Source:
    """The network of a zoo entry, without its weights."""
    entry = ZOO[name]
    contract = _contract(spec, InputContract(entry.mean, entry.std, entry.size, entry.interpolation))
    network = timm.create_model(entry.architecture, num_classes=num_classes, in_chans=len(contract.mean))
    return Source(network, contract, num_classes)


def _from_zoo(spec: recipe.Teacher, name: str, num_classes: int) -> Source:
    entry = ZOO[name]
    if spec.weights is None:
        _same_classes(f"the weights of {name}", entry.num_classes, num_classes)
    source = _zoo_source(spec, name, num_classes)
    weights = Path(spec.weights or download(entry.url, entry.sha256))
    return source._replace(num_classes=load_weights(source.network, weights, num_classes=num_classes))


def _timm_config(name: str) -> timm.models.PretrainedCfg:
    """timm's configuration of a model's weights."""
    base = name.partition(".")[0]
    if not timm.is_model(base):
        near = difflib.get_close_matches(base, [*ZOO, *timm.list_models()], n=3)
        hint = f" Close names: {', '.join(near)}." if near else ""
        raise InputError(
            f"teacher.model: '{name}' is neither in the zoo (`distill teachers` lists it) nor a timm model.{hint} "
            "Other forms are hf_hub:NAME, torchvision/NAME and local-dir:PATH."
        )
    try:
        return timm.get_pretrained_cfg(name)
    except RuntimeError as error:  # an unknown tag after the dot
        known = ", ".join(timm.list_pretrained(base + ".*")) or "none"
        raise InputError(f"teacher.model: {error} timm has: {known}.") from None


def _from_timm(spec: recipe.Teacher, name: str, num_classes: int) -> Source:
    config = _timm_config(name)
    contract = _contract(spec, _timm_contract(config.to_dict()))
    if spec.weights is not None:
        network = timm.create_model(name, num_classes=num_classes, in_chans=len(contract.mean))
        return Source(network, contract, load_weights(network, Path(spec.weights), num_classes=num_classes))
    _require_weights(name, config)
    known = _same_classes(f"timm's weights for {name}", config.num_classes, num_classes)
    url = f"https://huggingface.co/{config.hf_hub_id}" if config.hf_hub_id else config.url
    return Source(_pretrained(name, url), contract, known)


def _require_weights(name: str, config: timm.models.PretrainedCfg) -> None:
    if not config.has_weights:
        raise InputError(f"teacher.model: timm has no weights for '{name}'. Give a file: teacher.weights=PATH.")


def _hub_config(name: str) -> Mapping[str, Any]:
    """The hub's configuration of a model's weights."""
    try:
        config, _, _ = timm.models.load_model_config_from_hf(name)
    except (OSError, EntryNotFoundError, HTTPException) as error:
        raise InputError(_no_download(f"https://huggingface.co/{name}", error)) from error
    except (ValueError, KeyError) as error:
        raise InputError(f"teacher.model: hf_hub:{name} is no model that timm can load ({error}).") from error
    return config


def _from_hub(spec: recipe.Teacher, name: str, num_classes: int) -> Source:
    url = f"https://huggingface.co/{name}"
    config = _hub_config(name)
    contract = _contract(spec, _timm_contract(config))
    known = _same_classes(f"hf_hub:{name}", config.get("num_classes"), num_classes)
    names = _label_names(config)
    if spec.weights is None:
        return Source(_pretrained(f"hf-hub:{name}", url), contract, known, names)
    network = timm.create_model(f"hf-hub:{name}", num_classes=num_classes)
    return Source(network, contract, load_weights(network, Path(spec.weights), num_classes=num_classes), names)


def _label_names(config: Mapping[str, Any]) -> tuple[str, ...] | None:
    """As timm writes them: a list, or a mapping from the index."""
    names = config.get("label_names")
    if isinstance(names, Mapping):
        names = [names.get(index, names.get(str(index))) for index in range(len(names))]
    return tuple(names) if isinstance(names, list | tuple) and all(isinstance(name, str) for name in names) else None


def _pretrained(name: str, url: str) -> nn.Module:
    """timm's model with the head of its weights; timm loads strictly unless another class count is given."""
    try:
        return timm.create_model(name, pretrained=True)
    except (OSError, EntryNotFoundError, HTTPException) as error:
        raise InputError(_no_download(url, error)) from error
    except Exception as error:  # a damaged file, or one that is not only tensors, can fail in any way
        raise InputError(_unusable(name, url, error)) from error


def _unusable(name: str, url: str, error: Exception) -> str:
    reason = str(error).strip().partition("\n")[0] or type(error).__name__
    return f"teacher.model: the weights of {name} ({url}) cannot be used ({reason}). Give others: teacher.weights=PATH."


def _no_download(url: str, error: Exception) -> str:
    reason = str(error).strip().partition("\n")[0]
    return (
        f"{url}: cannot be downloaded ({reason}). Fetch the weights file on a machine with network access and name it: "
        "teacher.weights=PATH with a timm model, or teacher.model=local-dir:FOLDER for a folder with its config.json."
    )


def _folder_network(spec: recipe.Teacher, folder: Path) -> Any:
    """The network of a folder in timm's layout, without its weights; not one that is far larger than they are."""
    import distill.students  # noqa: F401  registers the architectures of our exports; other teachers need no import

    config = folder / "config.json"
    if not config.is_file():
        raise InputError(f"teacher.model: {folder} has no config.json. Give one that `distill export` or timm wrote.")
    if (advice := transformers_model(folder)) is not None:
        raise InputError(f"teacher.model: {folder} is no folder of timm's. {advice}")
    files = [*folder.iterdir(), *([Path(spec.weights)] if spec.weights else [])]
    size = sum(path.stat().st_size for path in files if path.is_file())
    try:
        content = read_bytes(config, MOST_BYTES, links=True) or b""
        check(TimmConfig, parse_json(content, "it"), "it")
        with bounded_allocation(size, MOST_TENSORS):
            return timm.create_model(f"local-dir:{folder}")
    except Exception as error:  # a wrong configuration can fail anywhere in the model's constructor
        reason = f"{type(error).__name__}: {short(' '.join(str(error).split()))}"
        raise InputError(f"{config}: does not describe a model that timm can build ({reason}).") from error


def _from_folder(spec: recipe.Teacher, folder: Path, num_classes: int) -> Source:
    network = _folder_network(spec, folder)
    known = _same_classes(str(folder), network.num_classes, num_classes)
    candidates = [Path(spec.weights)] if spec.weights else [folder / name for name in _FOLDER_FILES]
    weights = next((path for path in candidates if path.is_file()), candidates[0])
    known = load_weights(network, weights, num_classes=known)
    config = network.pretrained_cfg
    return Source(network, _contract(spec, _timm_contract(config)), known, _label_names(config))


def _torchvision_preset(spec: recipe.Teacher, name: str) -> tuple[Any, InputContract]:
    """torchvision's default weights for a classifier, and their contract."""
    names = torchvision.models.list_models(module=torchvision.models)
    if name not in names:
        near = ", ".join(difflib.get_close_matches(name, names, n=3)) or "none"
        raise InputError(f"teacher.model: torchvision has no classifier '{name}'. Close names: {near}.")
    weights = torchvision.models.get_model_weights(name).DEFAULT
    preset = weights.transforms()
    interpolation = _interpolation(preset.interpolation.value)
    contract = InputContract(tuple(preset.mean), tuple(preset.std), preset.crop_size[0], interpolation)
    return weights, _contract(spec, contract)


def _from_torchvision(spec: recipe.Teacher, name: str, num_classes: int) -> Source:
    weights, contract = _torchvision_preset(spec, name)
    if spec.weights is not None:
        network = torchvision.models.get_model(name, num_classes=num_classes)
        return Source(network, contract, load_weights(network, Path(spec.weights), num_classes=num_classes))
    _same_classes(f"torchvision's weights for {name}", len(weights.meta["categories"]), num_classes)
    try:
        return Source(torchvision.models.get_model(name, weights=weights), contract, num_classes)
    except (OSError, HTTPException) as error:
        raise InputError(_no_download(weights.url, error)) from error
    except Exception as error:  # see _pretrained
        raise InputError(_unusable(name, weights.url, error)) from error


def _same_classes(what: str, theirs: int | None, ours: int) -> int:
    """`theirs`; raises InputError unless it is `ours`, or 0 (no classifier)."""
    if theirs is None or theirs not in (0, ours):
        raise InputError(
            f"teacher: {what}: {theirs} classes, the data have {ours}. Fine-tune the model on your data first "
            "(recipes/teachers/cifar10_resnet18_finetune.yaml shows how), or give others: teacher.weights=PATH."
        )
    return theirs


def _timm_contract(config: Mapping[str, Any]) -> InputContract:
    interpolation = _interpolation(config.get("interpolation"))
    return InputContract(tuple(config["mean"]), tuple(config["std"]), config["input_size"][-1], interpolation)


def _interpolation(name: str | None) -> str:
    """torch has no Lanczos or `random`; bicubic is closest to both."""
    return name if name in _TORCH_INTERPOLATIONS else "bicubic"


def _contract(spec: recipe.Teacher, default: InputContract) -> InputContract:
    contract = InputContract(
        mean=default.mean if spec.mean is None else tuple(spec.mean),
        std=default.std if spec.std is None else tuple(spec.std),
        size=spec.size or default.size,
        interpolation=spec.interpolation or default.interpolation,
    )
    if len(contract.mean) != len(contract.std):
        raise InputError(
            f"teacher.mean, teacher.std: {len(contract.mean)} and {len(contract.std)} channels; give equally many."
        )
    return contract
