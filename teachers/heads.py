"""Taking off a network's classifier."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

HEADS = ("fc", "classifier", "head", "heads")
"""Where torchvision's networks have it: a linear layer, or one at the end of several layers."""


def take_off_classifier(network: Any) -> bool:
    """Make a network return what its classifier takes, in place; False: nothing is known that can be taken off."""
    if hasattr(network, "reset_classifier"):  # timm's
        network.reset_classifier(0)
        return True
    for name in HEADS:
        head = getattr(network, name, None)
        if isinstance(head, nn.Linear):
            setattr(network, name, nn.Identity())
            return True
        if isinstance(head, nn.Sequential) and len(head) and isinstance(head[-1], nn.Linear):
            head[-1] = nn.Identity()
            return True
    return False


def without_head_keys(network: Any, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights without those of a classifier: the network's own one, or where timm's configuration says that it is."""
    bare = copy.deepcopy(network)
    heads = network.state_dict().keys() - bare.state_dict().keys() if take_off_classifier(bare) else set()
    names = (getattr(network, "pretrained_cfg", None) or {}).get("classifier") or ()
    parts = tuple(f"{name}." for name in ([names] if isinstance(names, str) else names))
    return {key: value for key, value in weights.items() if key not in heads and not (parts and key.startswith(parts))}
