"""RandAugment, TrivialAugment and colour jitter: random operations and their magnitudes per sample.

A policy is a table of equally likely entries (operation, argument), so that one hash draws both; arguments are computed
once, in float64 on the CPU, and are the same on every device.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import IntEnum
from itertools import permutations
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from distill.data.affine import compose, fixed
from distill.data.randomness import integers, normal_table, uniform
from distill.recipe.augment import Augment, ColorJitter, RandAugment

MAGNITUDE_BITS = 10
FACTOR_BITS = 12
# Arguments are multiples of 2**-ARGUMENT_BITS, hue shifts of 2**-TURN_BITS: with 8-bit grey levels all arithmetic is
# exact in float32 on every device and compiler.
ARGUMENT_BITS, TURN_BITS = 15, 12


class Operation(IntEnum):
    """Operations, with the meaning of their arguments, if any."""

    IDENTITY = 0
    SHEAR_X = 1  # x of the image = x + argument * y, about the top left corner
    SHEAR_Y = 2
    TRANSLATE_X = 3  # x of the image = x + argument, in pixels
    TRANSLATE_Y = 4
    ROTATE = 5  # degrees, counter-clockwise, about the centre
    INVERT = 6
    POSTERIZE = 7  # bits kept, 1 to 8
    SOLARIZE = 8  # threshold, 0 to 256
    SOLARIZE_ADD = 9  # added to values below 128
    BRIGHTNESS = 10  # this and the next: 0 is black (the mean grey), 1 the image
    CONTRAST = 11
    AUTOCONTRAST = 12
    EQUALIZE = 13
    COLOR = 14  # this and the next: 0 is the grey (the smoothed) image, 1 the image
    SHARPNESS = 15
    HUE = 16  # circles, -1/2 to 1/2


MOVES = range(Operation.SHEAR_X, Operation.ROTATE + 1)


class Layer(NamedTuple):
    """One operation for each sample of a batch."""

    operation: Tensor
    """int64 [B]"""
    argument: Tensor
    """float32 [B]"""
    possible: frozenset[Operation]


def around_moves(layers: Sequence[Layer]) -> tuple[list[Layer], list[Layer]]:
    """The layers before, and those after, the last move of each sample; the identity replaces the others. Moves may be
    in both.
    """
    before: list[Layer] = []
    after: list[Layer] = []
    moves_later: Tensor | None = None
    for layer in reversed(layers):
        operation = layer.operation
        if moves_later is None:
            after.insert(0, layer)
        else:
            before.insert(0, layer._replace(operation=operation.masked_fill(~moves_later, Operation.IDENTITY.value)))
            after.insert(0, layer._replace(operation=operation.masked_fill(moves_later, Operation.IDENTITY.value)))
        if not layer.possible.isdisjoint(MOVES):
            moves = (operation >= MOVES.start) & (operation < MOVES.stop)
            moves_later = moves if moves_later is None else moves_later | moves
    return before, after


class Policy(NamedTuple):
    """N equally likely entries followed by the identity: [N + 1] each, and moves [N + 1, 2, 3] (see `affine`)."""

    operations: Tensor
    arguments: Tensor
    moves: Tensor
    possible: frozenset[Operation]

    def to(self, device: torch.device) -> Policy:
        return Policy(self.operations.to(device), self.arguments.to(device), self.moves.to(device), self.possible)

    def draw(self, hashed: Tensor, probability: float) -> tuple[list[Layer], Tensor]:
        """L layers and their moves [L, B, 2, 3] from hashes [2 * L, B]: of each layer's entry, and of whether it is
        applied.
        """
        identity = len(self.operations) - 1
        cells = torch.where(uniform(hashed[1::2]) < probability, integers(hashed[::2], identity), identity)
        layers = [Layer(self.operations[cell], self.arguments[cell], self.possible) for cell in cells]
        return layers, self.moves[cells]


def rand_augment(spec: RandAugment, height: int, width: int) -> Policy:
    """One layer of RandAugment (Cubuk et al. 2020), as timm's `rand-m{magnitude}-mstd{magnitude_std}-inc1`.

    The 15 operations and their ranges are those of timm's "increasing" set. The magnitude is normal, clipped to
    0 .. 10, from 2**MAGNITUDE_BITS quantiles. Two differences: posterize keeps at least one bit (timm keeps none at
    magnitude 10, an error in Pillow 13), and resampling is bilinear (timm's default is randomly bilinear or bicubic).
    """
    normal = normal_table(MAGNITUDE_BITS).double().numpy()
    share = np.clip(spec.magnitude + spec.magnitude_std * normal, 0.0, 10.0) / 10.0
    signed, share = np.concatenate([share, -share]), np.concatenate([share, share])
    enhanced = np.maximum(0.1, 1.0 + 0.9 * signed)
    return _policy(
        {
            Operation.AUTOCONTRAST: None,
            Operation.EQUALIZE: None,
            Operation.INVERT: None,
            Operation.ROTATE: 30.0 * signed,
            Operation.POSTERIZE: np.maximum(1, 4 - np.floor(share * 4)),
            Operation.SOLARIZE: 256 - np.floor(share * 256),
            Operation.SOLARIZE_ADD: np.floor(share * 110),
            Operation.COLOR: enhanced,
            Operation.CONTRAST: enhanced,
            Operation.BRIGHTNESS: enhanced,
            Operation.SHARPNESS: enhanced,
            Operation.SHEAR_X: 0.3 * signed,
            Operation.SHEAR_Y: 0.3 * signed,
            Operation.TRANSLATE_X: 0.45 * signed * width,
            Operation.TRANSLATE_Y: 0.45 * signed * height,
        },
        height,
        width,
    )


def trivial_augment(height: int, width: int) -> Policy:
    """TrivialAugment (Müller and Hutter 2021), one layer, with the ranges of torchvision's TrivialAugmentWide."""
    share = torch.linspace(0.0, 1.0, 31, dtype=torch.float64).numpy()
    signed, share = np.concatenate([share, -share]), np.concatenate([share, share])
    pixels = np.trunc(32.0 * signed)
    return _policy(
        {
            Operation.IDENTITY: None,
            Operation.SHEAR_X: 0.99 * signed,
            Operation.SHEAR_Y: 0.99 * signed,
            Operation.TRANSLATE_X: pixels,
            Operation.TRANSLATE_Y: pixels,
            Operation.ROTATE: 135.0 * signed,
            Operation.BRIGHTNESS: 1.0 + 0.99 * signed,
            Operation.COLOR: 1.0 + 0.99 * signed,
            Operation.CONTRAST: 1.0 + 0.99 * signed,
            Operation.SHARPNESS: 1.0 + 0.99 * signed,
            Operation.POSTERIZE: np.rint(8.0 - 6.0 * share),
            Operation.SOLARIZE: np.ceil(255.0 * (1.0 - share) - 1e-9),
            Operation.AUTOCONTRAST: None,
            Operation.EQUALIZE: None,
        },
        height,
        width,
    )


# Index of the argument in the matrix.
_ENTRIES = {
    Operation.SHEAR_X: (0, 1),
    Operation.SHEAR_Y: (1, 0),
    Operation.TRANSLATE_X: (0, 2),
    Operation.TRANSLATE_Y: (1, 2),
}


def _policy(arguments: Mapping[Operation, np.ndarray | None], height: int, width: int) -> Policy:
    """Equally likely operations with their arguments; all arrays have one size."""
    (count,) = {len(values) for values in arguments.values() if values is not None}
    columns = [np.zeros(count) if values is None else values for values in arguments.values()]
    moves = [matrices(operation, column, height, width) for operation, column in zip(arguments, columns, strict=True)]
    identity = matrices(Operation.IDENTITY, np.zeros(1), height, width)
    return Policy(
        torch.tensor([*np.repeat(list(arguments), count), Operation.IDENTITY]),
        _rounded(np.concatenate([*columns, np.zeros(1)]), ARGUMENT_BITS),
        fixed(np.concatenate([*moves, identity])),
        frozenset(arguments),
    )


def _rounded(values: np.ndarray, bits: int) -> Tensor:
    """float64 -> float32, to the nearest multiples of 2**-bits."""
    return torch.from_numpy(np.ldexp(np.rint(np.ldexp(values, bits)), -bits)).float()


def matrices(operation: Operation, arguments: np.ndarray, height: int, width: int) -> np.ndarray:
    """float64 [N, 2, 3]: output -> input coordinates; the identity for colour operations."""
    result = np.tile(np.eye(2, 3), (len(arguments), 1, 1))
    if operation in _ENTRIES:
        result[(slice(None), *_ENTRIES[operation])] = arguments
    elif operation == Operation.ROTATE:
        angles = np.deg2rad(arguments)
        cosine, sine = np.cos(angles), np.sin(angles)
        turned = np.array([[cosine, -sine], [sine, cosine]]).transpose(2, 0, 1)
        centre = np.array([width / 2, height / 2])
        result = np.concatenate([turned, (centre - turned @ centre)[:, :, None]], 2)
    return result


JITTERED = {
    Operation.BRIGHTNESS: "brightness",
    Operation.CONTRAST: "contrast",
    Operation.COLOR: "saturation",
    Operation.HUE: "hue",
}


class Jitter(NamedTuple):
    """The K operations of a colour jitter, int64 [K], their orders [K!, K], factors float32 [K, 2**FACTOR_BITS]."""

    operations: Tensor
    orders: Tensor
    factors: Tensor
    possible: frozenset[Operation]

    def to(self, device: torch.device) -> Jitter:
        return Jitter(self.operations.to(device), self.orders.to(device), self.factors.to(device), self.possible)

    @property
    def draws(self) -> list[str]:
        """Names of the draws."""
        return [
            "color-jitter/order",
            *(f"color-jitter/{name}" for key, name in JITTERED.items() if key in self.possible),
        ]

    def draw(self, hashed: Tensor) -> list[Layer]:
        """K layers from hashes [1 + K, B]: of the order, and of each operation's factor."""
        orders = self.orders[integers(hashed[0], len(self.orders))].T
        factors = self.factors.gather(1, integers(hashed[1:], self.factors.shape[1]))
        return [Layer(self.operations[order], factors.gather(0, order[None])[0], self.possible) for order in orders]


def color_jitter(spec: ColorJitter) -> Jitter:
    """As torchvision's ColorJitter: factors uniform in [max(0, 1 - x), 1 + x], for hue in [-x, x], in random order per
    sample.
    """
    on = {operation: getattr(spec, name) for operation, name in JITTERED.items() if getattr(spec, name)}
    middles = (np.arange(1 << FACTOR_BITS) + 0.5) / (1 << FACTOR_BITS)
    factors = []
    for operation, extent in on.items():
        turns = operation == Operation.HUE
        low, high = (-extent, extent) if turns else (max(0.0, 1.0 - extent), 1.0 + extent)
        factors.append(_rounded(low + middles * (high - low), TURN_BITS if turns else ARGUMENT_BITS))
    return Jitter(
        torch.tensor(list(on)),
        torch.tensor(list(permutations(range(len(on))))),
        torch.stack(factors),
        frozenset(on),
    )


class Operations:
    """The random operations of a recipe's `augment` section; `draws`: names of their draws, or empty."""

    def __init__(self, spec: Augment, device: torch.device) -> None:
        self.spec, self.device = spec, device
        self._layers = 1 if spec.trivial_augment else 0 if spec.rand_augment is None else spec.rand_augment.num_ops
        jitter = spec.color_jitter
        self._jitter = None if jitter is None or not any(dict(jitter).values()) else color_jitter(jitter).to(device)
        self._size: tuple[int, int] | None = None
        self._policy: Policy | None = None
        self._identity = fixed(np.eye(2, 3)).to(device)
        self.draws = [f"policy/{layer}{draw}" for layer in range(self._layers) for draw in ("", "/whether")]
        if self._jitter is not None:
            self.draws += self._jitter.draws

    def prepare(self, height: int, width: int) -> None:
        """Compute the tables for images of this size; copies to the device."""
        if self._layers and self._size != (height, width):
            spec = self.spec.rand_augment
            policy = trivial_augment(height, width) if spec is None else rand_augment(spec, height, width)
            self._size, self._policy = (height, width), policy.to(self.device)

    def draw(self, hashed: Tensor) -> tuple[list[Layer], Tensor, Tensor | None]:
        """Draw from hashes [len(draws), B], for images of the prepared size.

        Returns:
            The layers in order; their composed moves [B, 2, 3]; which samples move, bool [B] (None: no policy).
        """
        layers: list[Layer] = []
        moves, moving = self._identity.expand(hashed.shape[1], -1, -1), None
        if self._layers:
            probability = 1.0 if self.spec.rand_augment is None else self.spec.rand_augment.probability
            assert self._policy is not None, "call prepare first"
            layers, each = self._policy.draw(hashed[: 2 * self._layers], probability)
            moves = compose(each)
            moving = (moves != self._identity).flatten(1).any(1)
        if self._jitter is not None:
            layers += self._jitter.draw(hashed[2 * self._layers :])
        return layers, moves, moving
