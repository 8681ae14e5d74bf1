"""Moves and their one resampling against PIL's own transforms and a plain float64 oracle."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as tv

from distill.data import rows
from distill.data.affine import compose, fixed, mirror, resample
from distill.data.geometry import Boxes, resized_crop, shift_and_flip
from distill.data.policies import Operation, matrices
from results.augmentation.one_by_one import operate

Photos = Callable[..., Tensor]
FILL = (120, 60, 200)
MOVES = {
    Operation.SHEAR_X: (0.3, -0.27, 0.99),
    Operation.SHEAR_Y: (0.3, -0.27, -0.99),
    Operation.TRANSLATE_X: (3.0, -4.4, 40.0),
    Operation.TRANSLATE_Y: (3.0, -4.4, -40.0),
    Operation.ROTATE: (30.0, -27.0, 90.0, -135.0, 0.0),
}


def fill(channels: int) -> Tensor:
    return torch.tensor([*FILL, 5][:channels], dtype=torch.uint8)


def whole(images: Tensor) -> Boxes:
    sides = (0, 0, *images.shape[2:])
    return Boxes(*(torch.full((len(images),), side) for side in sides))


def moved(images: Tensor, operation: Operation, argument: float) -> Tensor:
    matrix = matrices(operation, np.full(len(images), argument), *images.shape[2:])
    return resample(images, fixed(matrix), *whole(images), fill=fill(images.shape[1]))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("operation", MOVES)
def test_moves_are_pils_which_cuts_digits_off_where_we_round(
    photos: Photos, operation: Operation, channels: int
) -> None:
    images = photos(12, channels)
    for argument in MOVES[operation]:
        pil = [tv.to_pil_image(image) for image in images]
        expected = torch.stack(
            [tv.pil_to_tensor(operate(image, operation, argument, FILL[:channels])) for image in pil]
        )
        difference = moved(images, operation, argument).int() - expected.int()
        # One level up by rounding, and one either way where the place is rounded to 1/256 pixel across a hard edge.
        assert difference.min() >= -1
        assert difference.max() <= 2
        assert ((difference == 0) | (difference == 1)).float().mean() > 0.99
        if argument in (90.0, 3.0, 0.0, 40.0):
            assert not difference.any()


@pytest.mark.parametrize("operation", MOVES)
def test_moves_are_torchvisions_on_tensors_away_from_the_edge(photos: Photos, operation: Operation) -> None:
    images = photos(12)
    for argument in MOVES[operation]:
        expected = operate(images, operation, argument, FILL)
        known = torch.full_like(images[:, :1], 255)
        inner = operate(known, operation, argument, [0]) == 255  # elsewhere they mix pixels with the fill colour
        difference = (moved(images, operation, argument).int() - expected.int()).abs() * inner
        assert difference.max() <= 2
        assert (difference <= 1).float().mean() > 0.99


def plain(
    image: np.ndarray, maps: list[np.ndarray], box: tuple[int, int, int, int], flip: bool, pad: int
) -> tuple[np.ndarray, np.ndarray]:
    """float64 [C, H, W], NaN where the fill colour belongs, and which pixels [H, W] come from the very edge of the
    frame; maps in the order in which the image goes through them.
    """
    channels, height, width = image.shape
    top, left, box_height, box_width = box
    cut = np.pad(image, ((0, 0), (pad, pad), (pad, pad)))
    cut = cut[:, top + pad : top + pad + box_height, left + pad : left + pad + box_width]
    result, edge = np.full((channels, height, width), np.nan), np.zeros((height, width), dtype=bool)
    for row in range(height):
        for column in range(width):
            place = np.array([column + 0.5, row + 0.5])
            for matrix in reversed(maps):
                place = matrix[:, :2] @ place + matrix[:, 2]
            if flip:
                place[0] = width - place[0]
            x, y = place[0] * box_width / width, place[1] * box_height / height
            edge[row, column] = min(abs(x), abs(y), abs(x - box_width), abs(y - box_height)) < 1 / 256
            if not (0 <= x < box_width and 0 <= y < box_height):
                continue
            x, y = x - 0.5, y - 0.5
            x0, y0 = int(np.floor(x)), int(np.floor(y))
            fx, fy = x - x0, y - y0
            columns = np.clip([x0, x0 + 1], 0, box_width - 1)
            rows = np.clip([y0, y0 + 1], 0, box_height - 1)
            corners = cut[:, rows][:, :, columns]
            result[:, row, column] = np.einsum("crk,r,k->c", corners, [1 - fy, fy], [1 - fx, fx])
    return result, edge


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("resized", "pad"), [(True, 0), (False, 3), (False, 0)])
def test_crop_flip_and_moves_are_one_map(photos: Photos, channels: int, resized: bool, pad: int) -> None:
    count, height, width = 12, 16, 20
    images = photos(count, channels, height, width)
    rng = np.random.default_rng(0)
    flips = rng.random(count) < 0.5
    boxes, maps = [], []
    for _ in range(count):
        if resized:
            size = rng.integers(3, height + 1), rng.integers(3, width + 1)
            boxes.append((rng.integers(0, height - size[0] + 1), rng.integers(0, width - size[1] + 1), *size))
        else:
            boxes.append((*rng.integers(-pad, pad + 1, 2), height, width))
        chosen = [list(MOVES)[number] for number in rng.integers(0, len(MOVES), 3)]
        limits = {Operation.ROTATE: 30.0, Operation.TRANSLATE_X: 5.0, Operation.TRANSLATE_Y: 5.0}
        arguments = [rng.uniform(-1, 1) * limits.get(operation, 0.3) for operation in chosen]
        maps.append(
            [matrices(*pair, height, width)[0] for pair in zip(chosen, np.array(arguments)[:, None], strict=True)]
        )
    moves = mirror(compose(fixed(np.stack(maps, 1))), torch.from_numpy(flips), width)
    sides = Boxes(*torch.tensor(np.array(boxes)).T)
    result = resample(images, moves, *sides, fill=fill(channels)).double().numpy()
    outside, edges = 0, 0
    for row in range(count):
        expected, edge = plain(images[row].double().numpy(), maps[row], boxes[row], flips[row], pad)
        outside += np.isnan(expected).sum()
        edges += edge.sum()
        filled = np.array(FILL[:channels])[:, None, None]
        error = np.abs(result[row] - np.where(np.isnan(expected), filled, expected))[:, ~edge]
        # Half a level by rounding, half of 1/256 pixel times the steepest edge of 255 levels in each direction.
        assert error.max() <= 0.5 + 255 / 256
        assert error.mean() < 0.3
    assert 0.05 < outside / result.size < 0.6
    assert edges < 20


def test_whole_pixels_are_exact(photos: Photos) -> None:
    images = photos(16, 3, 14, 20)
    generator = torch.Generator().manual_seed(0)
    top, left = torch.randint(-4, 5, (2, 16), generator=generator)
    flip = torch.rand(16, generator=generator) < 0.5
    boxes = whole(images)._replace(top=top, left=left)
    still = fixed(np.tile(np.eye(2, 3), (16, 1, 1)))
    result = resample(images, mirror(still, flip, 20), *boxes, fill=fill(3))
    assert torch.equal(result, shift_and_flip(images, boxes, 4, flip))


def test_a_resized_crop_is_that_of_floats_rounded(photos: Photos) -> None:
    images = photos(16, 3, 32, 32)
    generator = torch.Generator().manual_seed(0)
    sides = torch.randint(8, 33, (2, 16), generator=generator)
    starts = (torch.rand((2, 16), generator=generator) * (33 - sides)).long()
    boxes = Boxes(*starts, *sides)
    flip = torch.rand(16, generator=generator) < 0.5
    still = fixed(np.tile(np.eye(2, 3), (16, 1, 1)))
    result = resample(images, mirror(still, flip, 32), *boxes, fill=fill(3))
    assert (result - resized_crop(images.float(), boxes, flip)).abs().max() <= 0.5 + 255 / 256


@pytest.mark.parametrize("size", [(7, 33), (64, 64), (65, 30)])
def test_every_arithmetic_gives_the_same_bytes(photos: Photos, size: tuple[int, int]) -> None:
    """Sums and products are exact in float32, so more digits change nothing, and no order of them can."""
    images = photos(4, 3, *size)
    matrix = matrices(Operation.ROTATE, np.array([17.0, -33.3, 101.1, 5.5]), *size)
    matrix = matrix + matrices(Operation.SHEAR_X, np.array([0.11, 0.07, -0.2, 0.3]), *size) * [
        [0.37, 0.37, 1],
        [0, 0, 0],
    ]
    moves, boxes = fixed(matrix), whole(images)
    result = resample(images, moves, *boxes, fill=fill(3))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tensor, "float", Tensor.double)
        assert torch.equal(resample(images, moves, *boxes, fill=fill(3)), result)


def test_an_update_of_rows_is_the_same_in_parts_and_by_masks(monkeypatch: pytest.MonkeyPatch) -> None:
    values, other = torch.arange(40.0).view(10, 4), torch.arange(10.0)
    wanted = torch.tensor([1, 0, 0, 1, 1, 0, 1, 0, 0, 1], dtype=torch.bool)
    expected = torch.where(wanted[:, None], values * 2 + other[:, None], values)

    def function(rows: Tensor, others: Tensor) -> Tensor:
        return rows * 2 + others[:, None]

    for picks in (True, False):
        for size in (1, 12, 1000):
            monkeypatch.setattr(rows, "picks_rows", lambda device, picks=picks: picks)
            monkeypatch.setattr(rows, "HOST_PART" if picks else "DEVICE_PART", size)
            result = values.clone()
            rows.update(result, wanted, function, result, other)
            assert torch.equal(result, expected)
            rows.update(result, None, function, values, other)
            assert torch.equal(result, values * 2 + other[:, None])
            rows.update(result, torch.zeros(10, dtype=torch.bool), function, result, other)
            assert torch.equal(result, values * 2 + other[:, None])
