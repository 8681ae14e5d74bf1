"""Logits and feature maps of a frozen network in one forward pass: by timm's `forward_intermediates`, or else by
torchvision's feature extraction."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

from distill.errors import InputError
from distill.features import with_maps

Reader = Callable[[Tensor], tuple[Tensor, dict[str, Tensor]]]
"""The network's inputs [B, C, H, W] -> its logits [B, classes] and the maps [B, C, h, w] by name."""


def map_names(network: nn.Module, inputs: Tensor) -> list[str]:
    """The network's stages, first to last: timm's feature information, or, of another network, for each map size of
    square `inputs` the last of the outermost modules.
    """
    return _timm_names(network) or _last_of_each_size(network, inputs)


def reader_of(name: str, network: nn.Module, names: Sequence[str], inputs: Tensor) -> Reader:
    """A function that returns the maps `names`, one or more, of teacher `name`.

    Raises:
        InputError: no such map; the message lists the known ones, `map_names(network, inputs)`.
    """
    known = _timm_names(network)
    if not known:
        return _traced(name, network, names, inputs)
    if wrong := [one for one in names if one not in known]:
        raise no_map(name, wrong[0], known)
    order = sorted({known.index(one) for one in names})
    return partial(_by_timm, network, {known[index]: index for index in order})


def cannot_be_read(teacher: str, reason: str) -> InputError:
    """The error for a teacher that cannot return maps along with its logits."""
    return InputError(
        f"teacher {teacher}: its feature maps cannot be read ({reason}). Take a timm model, or a method on logits."
    )


def no_map(teacher: str, wrong: str, known: Sequence[str]) -> InputError:
    """The error for an unknown map name."""
    return InputError(f"teacher {teacher}: no feature map '{wrong}'; it has {', '.join(known) or 'none'}.")


def _timm_names(network: nn.Module) -> list[str]:
    if not hasattr(network, "forward_intermediates"):
        return []
    information = getattr(network, "feature_info", None) or []
    return [stage["module"] for stage in getattr(information, "info", information)]


def _by_timm(network: nn.Module, indices: dict[str, int], inputs: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    logits, maps = with_maps(network, inputs, list(indices.values()))
    return logits, dict(zip(indices, maps, strict=True))


def _traced(name: str, network: nn.Module, names: Sequence[str], inputs: Tensor) -> Reader:
    """By torch.fx; `names` are those of modules or of graph nodes."""
    try:
        _, nodes = get_graph_node_names(network, suppress_diff_warning=True)
        # A module's output is its last node; the network's output is the last of all.
        ends = {one: [node for node in nodes if f"{node}.".startswith(f"{one}.")][-1:] for one in names}
        if wrong := [one for one, end in ends.items() if end in ([], nodes[-1:])]:
            raise no_map(name, wrong[0], map_names(network, inputs))
        # Keys without dots: they become attributes.
        keys = {node: f"map_{index}" for index, (node,) in enumerate(ends.values())}
        extractor = create_feature_extractor(
            network, train_return_nodes=keys, eval_return_nodes=keys | {nodes[-1]: "logits"}, suppress_diff_warning=True
        )
    except InputError:
        raise
    except Exception as error:  # fx fails in many ways on what it cannot trace
        raise cannot_be_read(name, str(error).partition("\n")[0]) from None

    def read(images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        outputs = extractor(images)
        return outputs["logits"], {one: outputs[keys[node]] for one, (node,) in ends.items()}

    extractor.eval()
    _clone_outputs(extractor, keys.values())
    return read


def _clone_outputs(extractor: Any, keys: Iterable[str]) -> None:
    """Make `extractor` return copies under these keys, because later modules may work in place."""
    (output,) = (node for node in extractor.graph.nodes if node.op == "output")
    returned = dict(output.args[0])
    for key in keys:
        with extractor.graph.inserting_after(returned[key]):
            returned[key] = extractor.graph.call_function(_copy, (returned[key],))
    output.args = (returned,)
    extractor.recompile()


def _copy(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


def _last_of_each_size(network: nn.Module, inputs: Tensor) -> list[str]:
    last: dict[int, str] = {}

    def note(name: str, output: Any) -> None:
        if not isinstance(output, Tensor) or output.dim() != 4:
            return
        height, width = output.shape[2:]
        # Maps are square here, unless channels are last.
        if height == width > 1 and (width not in last or name.count(".") <= last[width].count(".")):
            last[width] = name

    handles = [
        module.register_forward_hook(lambda _module, _inputs, output, name=name: note(name, output))
        for name, module in network.named_modules()
        if name and not isinstance(module, nn.AdaptiveAvgPool2d)  # the head's, which may enlarge maps
    ]
    try:
        with torch.no_grad():
            network(inputs)
    finally:
        for handle in handles:
            handle.remove()
    return list(last.values())
