"""Loads the network of a recipe's `teacher` section: trained weights and input contract."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Mapping
from http.client import HTTPException
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torchvision
from huggingface_hub.errors import EntryNotFoundError
from timm.models._registry import _deprecated_models
from torch import nn

import teachers.cifar_resnet  # noqa: F401  registers the names with timm
from distill import recipe
from distill.errors import InputError
from distill.files.digests import file_digest
from distill.files.plain_data import MOST_BYTES, parse_json, read_json
from distill.files.records import TimmConfig, check
from distill.files.regular import read_bytes
from distill.inputs import InputContract
from distill.out_of_memory import bounded_allocation
from distill.recipe.reading import short
from teachers.addresses import parse
from teachers.contracts import contract_of, interpolation_of, timm_contract
from teachers.heads import take_off_classifier
from teachers.licences import Origin, identifier, of_folder, of_hub
from teachers.weights import download, load_weights, transformers_model
from teachers.zoo import ZOO

MOST_TENSORS = 10_000
"""Of a teacher's weights."""
_log = logging.getLogger("distill")
_FOLDER_FILES = ("model.safetensors", "pytorch_model.bin", "pytorch_model.pth", "model.pth")


class Source(NamedTuple):
    network: nn.Module
    contract: InputContract
    num_classes: int
    """Of its logits; 0 without a classifier."""
    class_names: tuple[str, ...] | None = None
    """Of its outputs, where a folder or a configuration of the hub records them."""
    origin: Origin = Origin()


def contract_is_assumed(spec: recipe.Teacher) -> bool:
    """Whether the weights may have been trained with other inputs than the contract says, which the recipe leaves open
    at least in part: those of a file of the user's own, and of a folder or a hub's repository, for which timm writes
    the values of the architecture.
    """
    if spec.model is None or None not in (spec.size, spec.mean, spec.std):
        return False
    scheme, name = parse(spec.model)
    if scheme == "local-dir":
        return "preparation" not in (read_json(Path(name) / "config.json") or {})  # which our exports have
    if spec.weights is None:
        return scheme == "hf_hub"
    return not (scheme == "zoo" and file_digest(Path(spec.weights)).startswith(ZOO[name].sha256))


class Wanted(NamedTuple):
    """What a teacher is to tell apart."""

    classes: int
    others: bool = False
    """Whether a classifier of another number of classes is taken off, rather than an error."""


def open_source(spec: recipe.Teacher, wanted: Wanted) -> Source:
    """The network of `spec`, with all weights trained.

    The contract is the recipe's, by default that of the zoo, the timm configuration or torchvision.

    Raises:
        InputError: unknown model, weights that cannot be loaded or do not fit, or another number of classes than
            those wanted or 0.
    """
    assert spec.model is not None
    scheme, name = parse(spec.model)
    match scheme:
        case "zoo":
            return _from_zoo(spec, name, wanted)
        case "local-dir":
            return _from_folder(spec, Path(name), wanted)
        case "hf_hub":
            return _from_hub(spec, name, wanted)
        case "torchvision":
            return _from_torchvision(spec, name, wanted)
        case "timm":
            return _from_timm(spec, name, wanted)


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
            origin = of_folder(Path(name), network.pretrained_cfg)
        case "hf_hub":
            origin = of_hub(name, _hub_config(name))
            network = timm.create_model(f"hf-hub:{name}")
        case "timm":
            config = _timm_config(name)
            origin = Origin(identifier(config.license), config.hf_hub_id or None)
            network = timm.create_model(name)
    if network.num_classes:
        network.reset_classifier(num_classes)
    contract = contract_of(spec, timm_contract(network.pretrained_cfg))
    return Source(network, contract, network.num_classes, origin=origin)


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
    contract = contract_of(spec, InputContract(entry.mean, entry.std, entry.size, entry.interpolation))
    network = timm.create_model(entry.architecture, num_classes=num_classes, in_chans=len(contract.mean))
    return Source(network, contract, num_classes)


def _from_zoo(spec: recipe.Teacher, name: str, wanted: Wanted) -> Source:
    entry = ZOO[name]
    known = wanted.classes if spec.weights else _same_classes(f"the weights of {name}", entry.num_classes, wanted)
    source = _zoo_source(spec, name, known)
    weights = Path(spec.weights or download(entry.url, entry.sha256))
    known = load_weights(source.network, weights, num_classes=known, any_classifier=wanted.others)
    own = file_digest(weights).startswith(entry.sha256)
    origin = Origin(identifier(entry.license)) if own else Origin()
    return _fitted(source._replace(num_classes=known, origin=origin), wanted)


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
    try:  # of an old name, such as tf_efficientnet_b0_ns, those that timm builds under it
        config = timm.get_pretrained_cfg(_deprecated_models.get(name) or name)
        return config or timm.models.PretrainedCfg()  # a registered architecture may have none
    except RuntimeError as error:  # an unknown tag after the dot
        known = ", ".join(timm.list_pretrained(base + ".*")) or "none"
        raise InputError(f"teacher.model: {error} timm has: {known}.") from None


def _from_timm(spec: recipe.Teacher, name: str, wanted: Wanted) -> Source:
    config = _timm_config(name)
    contract = contract_of(spec, timm_contract(config.to_dict()))
    origin = Origin(identifier(config.license), config.hf_hub_id or None)
    if spec.weights is not None:
        network = timm.create_model(name, num_classes=wanted.classes, in_chans=len(contract.mean))
        known = _load(network, spec.weights, wanted)
        # A name with a tag is one of certain weights; without it only the architecture is known.
        return Source(network, contract, known, origin=origin if "." in name else Origin())
    _require_weights(name, config)
    _same_classes(f"timm's weights for {name}", config.num_classes, wanted)
    url = f"https://huggingface.co/{config.hf_hub_id}" if config.hf_hub_id else config.url
    return _fitted(Source(_pretrained(name, url), contract, config.num_classes, origin=origin), wanted)


def _load(network: Any, weights: str, wanted: Wanted) -> int:
    return load_weights(network, Path(weights), num_classes=wanted.classes, any_classifier=wanted.others)


def _fitted(source: Source, wanted: Wanted) -> Source:
    """The source, without a classifier that has another number of classes.

    Raises:
        InputError: it cannot be taken off.
    """
    if source.num_classes in (0, wanted.classes):
        return source
    if not take_off_classifier(source.network):
        raise InputError(
            f"teacher.model: {type(source.network).__name__} has {source.num_classes} classes, and its classifier "
            "cannot be taken off; take another model."
        )
    _log.info("teacher: its classifier of %d classes is not used: only feature maps are", source.num_classes)
    return source._replace(num_classes=0, class_names=None)


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


def _from_hub(spec: recipe.Teacher, name: str, wanted: Wanted) -> Source:
    url = f"https://huggingface.co/{name}"
    config = _hub_config(name)
    contract = contract_of(spec, timm_contract(config))
    known = _same_classes(f"hf_hub:{name}", config.get("num_classes"), wanted)
    names, origin = _label_names(config), of_hub(name, config)
    if spec.weights is None:
        return _fitted(Source(_pretrained(f"hf-hub:{name}", url), contract, known, names, origin), wanted)
    network = timm.create_model(f"hf-hub:{name}", num_classes=wanted.classes)
    return Source(network, contract, _load(network, spec.weights, wanted), names, origin)


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


def _from_folder(spec: recipe.Teacher, folder: Path, wanted: Wanted) -> Source:
    network = _folder_network(spec, folder)
    known = _same_classes(str(folder), network.num_classes, wanted)
    candidates = [Path(spec.weights)] if spec.weights else [folder / name for name in _FOLDER_FILES]
    weights = next((path for path in candidates if path.is_file()), candidates[0])
    known = load_weights(network, weights, num_classes=known, any_classifier=wanted.others)
    config = network.pretrained_cfg
    contract, origin = contract_of(spec, timm_contract(config)), of_folder(folder, config)
    return _fitted(Source(network, contract, known, _label_names(config), origin), wanted)


def _torchvision_preset(spec: recipe.Teacher, name: str) -> tuple[Any, InputContract]:
    """torchvision's default weights for a classifier, and their contract."""
    names = torchvision.models.list_models(module=torchvision.models)
    if name not in names:
        near = ", ".join(difflib.get_close_matches(name, names, n=3)) or "none"
        raise InputError(f"teacher.model: torchvision has no classifier '{name}'. Close names: {near}.")
    weights = torchvision.models.get_model_weights(name).DEFAULT
    preset = weights.transforms()
    interpolation = interpolation_of(preset.interpolation.value)
    contract = InputContract(tuple(preset.mean), tuple(preset.std), preset.crop_size[0], interpolation)
    return weights, contract_of(spec, contract)


def _from_torchvision(spec: recipe.Teacher, name: str, wanted: Wanted) -> Source:
    weights, contract = _torchvision_preset(spec, name)
    if spec.weights is not None:
        network = torchvision.models.get_model(name, num_classes=wanted.classes)
        return Source(network, contract, _load(network, spec.weights, wanted))
    known = _same_classes(f"torchvision's weights for {name}", len(weights.meta["categories"]), wanted)
    try:
        network = torchvision.models.get_model(name, weights=weights)
    except (OSError, HTTPException) as error:
        raise InputError(_no_download(weights.url, error)) from error
    except Exception as error:  # see _pretrained
        raise InputError(_unusable(name, weights.url, error)) from error
    return _fitted(Source(network, contract, known), wanted)


def _same_classes(what: str, theirs: int | None, wanted: Wanted) -> int:
    """`theirs`; raises InputError unless it is as many as wanted, or 0 (no classifier), or others will do."""
    if theirs is None or (theirs not in (0, wanted.classes) and not wanted.others):
        raise InputError(
            f"teacher: {what}: {theirs} classes, the data have {wanted.classes}. Fine-tune the model on your data "
            "first (recipes/teachers/cifar10_resnet18_finetune.yaml shows how), or give others: teacher.weights=PATH."
        )
    return theirs
