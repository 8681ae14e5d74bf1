"""`data.views`: crops of each image in batches, against torchvision image by image, in memory and in streams."""

from __future__ import annotations

from functools import partial
from itertools import islice, pairwise, permutations
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as tv

import distill.data.stream
from distill.data import Batch, BatchPlan, Dataset, filters, open_dataset, rows
from distill.data import randomness as rnd
from distill.data.geometry import RESIZED_CROP_DRAWS, crop_boxes
from distill.data.stream import Draw, crop_box
from distill.data.views import MultiCrop
from distill.recipe import Data
from distill.recipe.augment import RandomResizedCrop
from distill.recipe.views import View
from tests.data.test_dataset import assert_same, joined
from tests.data.test_device import Operators

CPU = torch.device("cpu")
SEED, EPOCH = 11, 4
WHOLE = {"scale": [1.0, 1.0], "ratio": [1.0, 1.0]}
"""A crop of a square image that changes nothing."""
PLAIN: dict[str, Any] = {"hflip": False, "color_jitter": None, "grey": 0.0, "blur": 0.0}
NO_HUE = {"brightness": 0.4, "contrast": 0.4, "saturation": 0.2}
DINO = [
    {"kind": "global", "size": 16},
    {"kind": "global", "size": 16, "blur": 0.1, "solarize": 0.2},
    {"kind": "local", "count": 3, "size": 8},
]


def groups(*specs: dict[str, Any]) -> list[View]:
    return [View(**spec) for spec in specs]


def photographs(count: int, channels: int = 3, side: int = 24) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    coarse = torch.rand(count, channels, 5, 5, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, (side, side), mode="bicubic")
    noisy = 255 * smooth + 12 * torch.randn(smooth.shape, generator=generator)
    return noisy.clamp(0, 255).to(torch.uint8)


def made(specs: list[View], images: Tensor, indices: Tensor) -> list[Tensor]:
    """The views as levels, uint8 [B, C, size, size] each."""
    number = sum(spec.count for spec in specs)
    views = MultiCrop(specs, CPU)([images], indices, seed=SEED, epoch=EPOCH, views=number)
    assert all(view.dtype == torch.float32 and view.min() >= 0 and view.max() <= 1 for view in views)
    return [view.mul(255).round().to(torch.uint8) for view in views]


def draw(name: str, index: int, view: int) -> int:
    """The hash; draws of the first view have plain names."""
    name += f"/view{view}" if view else ""
    return int(rnd.hashes(rnd.keys(SEED, EPOCH, [name]), torch.tensor([index]))[0, 0])


def share(name: str, index: int, view: int) -> float:
    return (draw(name, index, view) >> 8) / 2**24


def one_by_one(spec: View, view: int, image: Tensor, index: int) -> Tensor:
    """By torchvision, one image and one operation after the other, uint8 [C, size, size]."""
    names = [name + (f"/view{view}" if view else "") for name in RESIZED_CROP_DRAWS]
    hashed = rnd.hashes(rnd.keys(SEED, EPOCH, names), torch.tensor([index]))
    box = [int(side) for side in crop_boxes(hashed, *image.shape[1:], spec.scale, spec.ratio)]
    size = [spec.size, spec.size]
    image = tv.resized_crop(image.float(), *box, size, InterpolationMode.BICUBIC, antialias=True)
    image = image.clamp(0, 255).round().to(torch.uint8)
    if spec.hflip and share("flip", index, view) < 0.5:
        image = tv.horizontal_flip(image)
    if spec.color_jitter is not None and share("color-jitter/whether", index, view) < spec.jitter_probability:
        on = {name: extent for name, extent in dict(spec.color_jitter).items() if extent}
        orders = list(permutations(on))
        for name in orders[draw("color-jitter/order", index, view) * len(orders) >> 32]:
            middle = ((draw(f"color-jitter/{name}", index, view) >> 20) + 0.5) / 4096
            factor = (2 * middle - 1) * on[name] + (name != "hue")
            image = adjusted(image, name, factor)
    if share("grey", index, view) < spec.grey:
        image = tv.pil_to_tensor(tv.rgb_to_grayscale(tv.to_pil_image(image), 3))
    if share("blur/whether", index, view) < spec.blur:
        low, high = spec.blur_sigma
        sigma = low + (high - low) * share("blur/sigma", index, view)
        side = 2 * min(8, spec.size - 1) + 1
        image = tv.gaussian_blur(image, [side, side], [sigma, sigma])
    return tv.solarize(image, 128) if share("solarize", index, view) < spec.solarize else image


def adjusted(image: Tensor, name: str, factor: float) -> Tensor:
    """Of a PIL image, as in DINO's code; its hues have 8 bits only, so hues as of a tensor."""
    if name == "hue":
        return tv.adjust_hue(image, round(factor * 2**12) / 2**12)
    adjust = getattr(tv, f"adjust_{name}")
    return tv.pil_to_tensor(adjust(tv.to_pil_image(image), round(factor * 2**15) / 2**15))


@pytest.mark.parametrize(
    "spec",
    [
        {"kind": "global", "size": 24, **PLAIN, "hflip": True},
        {"kind": "global", "size": 32, "count": 2, **PLAIN, "ratio": [0.5, 2.0]},
        {"kind": "local", "size": 9, "count": 2, **PLAIN},
        {"kind": "global", "size": 24, "count": 2, **WHOLE, "color_jitter": NO_HUE, "grey": 0.3, "blur": 0.0},
        {"kind": "global", "size": 24, **WHOLE, "color_jitter": {"hue": 0.3}, "grey": 0.0, "blur": 0.0},
        {"kind": "local", "size": 24, **WHOLE, **PLAIN, "blur": 0.6, "solarize": 0.5},
        {"kind": "local", "size": 24, **WHOLE, "color_jitter": NO_HUE, "blur": 1.0, "blur_sigma": [0.5, 1.9]},
    ],
    ids=["crop and flip", "larger", "smaller", "jitter and grey", "hue", "blur and solarise", "all but hue"],
)
def test_each_view_is_torchvisions_within_one_level(spec: dict[str, Any]) -> None:
    images, indices = photographs(60), torch.arange(100, 160)
    (group,) = groups(spec)
    seen = []
    for view, found in enumerate(made([group], images, indices)):
        expected = [one_by_one(group, view, *pair) for pair in zip(images, indices.tolist(), strict=True)]
        difference = (found.int() - torch.stack(expected).int()).abs()
        assert difference.max() <= 1
        assert (difference == 0).float().mean() > (0.9 if "hue" in str(spec) else 0.999)
        seen.append(found)
    assert all(not torch.equal(one, other) for one, other in pairwise(seen))


def test_dinos_views_are_torchvisions() -> None:
    """Where a hue differs by one level, later operations make more of it."""
    images, indices = photographs(60), torch.arange(60)
    specs = groups(*DINO)
    of_view = [spec for spec in specs for _ in range(spec.count)]
    views = made(specs, images, indices)
    assert [view.shape[-1] for view in views] == [16, 16, 8, 8, 8]
    for view, (spec, found) in enumerate(zip(of_view, views, strict=True)):
        expected = torch.stack([one_by_one(spec, view, *pair) for pair in zip(images, indices.tolist(), strict=True)])
        difference = (found.int() - expected.int()).abs()
        assert difference.max() <= 6
        assert (difference <= 1).float().mean() > 0.99


def test_operations_are_as_frequent_as_the_recipe_says() -> None:
    images = photographs(1, side=8).expand(4000, -1, -1, -1)
    plain = PLAIN | WHOLE | {"kind": "global", "size": 8}
    for key, probability, change in (
        ("hflip", 0.5, {"hflip": True}),
        ("grey", 0.2, {"grey": 0.2}),
        ("blur", 0.1, {"blur": 0.1}),
        ("solarize", 0.3, {"solarize": 0.3}),
        ("jitter", 0.8, {"color_jitter": {"brightness": 0.4}, "jitter_probability": 0.8}),
    ):
        (view,) = made(groups(plain | change), images, torch.arange(4000))
        changed = (view != images).flatten(1).any(1).float().mean().item()
        assert changed == pytest.approx(probability, abs=0.03), key


def test_grey_images_and_images_that_are_no_squares() -> None:
    images, indices = photographs(20, 1, 30)[..., :18], torch.arange(20)
    for size, view in zip((16, 16, 8, 8, 8), made(groups(*DINO), images, indices), strict=True):
        assert view.shape == (20, 1, size, size)
    (view,) = made(groups({"kind": "global", "size": 12, **PLAIN}), images, indices)
    spec = View(kind="global", size=12, **PLAIN)
    expected = torch.stack([one_by_one(spec, 0, *pair) for pair in zip(images, indices.tolist(), strict=True)])
    assert (view.int() - expected.int()).abs().max() <= 1


def test_a_blur_is_torchvisions_at_any_size_and_keeps_one_colour() -> None:
    generator = torch.Generator().manual_seed(0)
    for side, radius in ((5, 4), (8, 7), (30, 8)):
        images = torch.randint(256, (20, 3, side, side), dtype=torch.uint8, generator=generator)
        images[:3] = torch.tensor([0, 101, 255])[:, None, None, None]
        sigma = torch.linspace(0.1, 3.0, 20, dtype=torch.float64)
        found = filters.gaussian_blur(images, sigma, radius=radius)
        assert torch.equal(found[:3], images[:3])
        kernel = [2 * radius + 1] * 2
        expected = [
            tv.gaussian_blur(image, kernel, [own, own]) for image, own in zip(images, sigma.tolist(), strict=True)
        ]
        assert (found.int() - torch.stack(expected).int()).abs().max() <= 1


def test_views_depend_on_nothing_but_their_sample_and_number() -> None:
    images, indices = photographs(12), torch.randperm(1000)[:12]
    whole = made(groups(*DINO), images, indices)
    crops = MultiCrop(groups(*DINO), CPU)
    for part in (slice(0, 1), slice(3, 8)):
        few = crops([images[part]], indices[part], seed=SEED, epoch=EPOCH, views=5)
        assert all(torch.equal(one * 255, other[part]) for one, other in zip(few, whole, strict=True))
    first = crops([images], indices, seed=SEED, epoch=EPOCH, views=3)
    assert len(first) == 3
    assert all(torch.equal(one * 255, other) for one, other in zip(first, whole, strict=False))
    for changed in ({"seed": SEED + 1, "epoch": EPOCH}, {"seed": SEED, "epoch": EPOCH + 1}):
        others = crops([images], indices, **changed, views=5)
        assert all(not torch.equal(one * 255, other) for one, other in zip(others, whole, strict=True))


# Batches


VIEWS = [
    {"kind": "global", "size": 12},
    {"kind": "global", "size": 12, "blur": 0.1, "solarize": 0.2},
    {"kind": "local", "count": 2, "size": 6},
]


def in_memory() -> Data:
    return Data(name="digits", resolution=12, views=VIEWS)


def streamed(root: Path, workers: int = 0, **changes: Any) -> Data:
    data: dict[str, Any] = {"name": "folder", "root": str(root), "resolution": 12, "validation": 6, "stream": True}
    return Data(**(data | {"views": VIEWS, "workers": workers} | changes))


@pytest.fixture(params=["memory", "packed folder", "stream", "stream in one process"])
def spec(request: pytest.FixtureRequest, make_folder: Any) -> Data:
    if request.param == "memory":
        return in_memory()
    stream = request.param != "packed folder"
    return streamed(make_folder(), workers=2 * (request.param == "stream"), stream=stream)


def opened(spec: Data, **arguments: Any) -> Dataset:
    dataset = open_dataset(spec, seed=5, device=CPU, **arguments)
    dataset.set_views("all")
    return dataset


def steps(dataset: Dataset, plan: BatchPlan, epoch: int = 1, first: int = 0) -> list[Batch]:
    """At most four."""
    return [joined(step) for step in islice(dataset.training_batches(plan, epoch, first), 4)]


def test_batches_have_all_views_at_their_sizes(spec: Data) -> None:
    dataset = opened(spec)
    (batch, *_) = steps(dataset, BatchPlan(0, 8, accumulation=2))
    channels = dataset.info.channels
    assert batch.images.shape == (8, channels, 12, 12)
    assert [view.shape for view in batch.views] == [(8, channels, side, side) for side in (12, 6, 6)]
    assert torch.equal(batch.targets, torch.eye(dataset.info.num_classes)[batch.labels])


def test_processes_micro_batches_and_the_place_of_a_start_change_nothing(spec: Data) -> None:
    whole = steps(opened(spec), BatchPlan(0, 8))
    ranks = [opened(spec, num_processes=2, process_index=rank) for rank in range(2)]
    shares = [steps(dataset, BatchPlan(0, 8, 2, 2, rank)) for rank, dataset in enumerate(ranks)]
    assert len(whole) == len(shares[0]) == len(shares[1]) >= 3
    for step, *parts in zip(whole, *shares, strict=True):
        assert_same(step, joined(parts))
    for step, later in zip(whole[2:], steps(opened(spec), BatchPlan(0, 8), first=2), strict=False):
        assert_same(step, later)


def test_a_run_that_needs_one_view_gets_the_first(spec: Data) -> None:
    dataset, one = opened(spec), opened(spec)
    one.set_views(1)
    for several, alone in zip(steps(dataset, BatchPlan(0, 8)), steps(one, BatchPlan(0, 8)), strict=True):
        assert_same(several._replace(views=()), alone)


def test_a_stream_decodes_an_image_once_and_cuts_all_views_of_its_own_pixels(
    make_folder: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, decoded = make_folder(), []
    decode = distill.data.stream.decode
    monkeypatch.setattr(distill.data.stream, "decode", lambda *arguments: decoded.append(0) or decode(*arguments))
    plain = [view | PLAIN | {"solarize": 0.0} for view in VIEWS]
    dataset = opened(streamed(root, views=plain, validation=0))
    (batch,) = steps(dataset, BatchPlan(3, 36), epoch=2)
    assert len(decoded) == 36
    paths = sorted((root / "train").rglob("*.png"))
    sizes = (12, 12, 6, 6)
    for row, index in enumerate(batch.indices.tolist()):
        original = Image.open(paths[index])
        boxes = set()
        for view, (images, size) in enumerate(zip((batch.images, *batch.views), sizes, strict=True)):
            crop = RandomResizedCrop(scale=[0.05, 0.4] if size == 6 else [0.4, 1.0])
            box = crop_box(original, index, Draw(3, 2), crop, view=view)
            boxes.add(box)
            expected = tv.resized_crop(original, *box, [size, size], InterpolationMode.BICUBIC)
            assert torch.equal(images[row].mul(255).round().to(torch.uint8), tv.pil_to_tensor(expected))
        assert len(boxes) > 2


def test_a_stream_gives_several_random_crops_of_data_augment(make_folder: Any) -> None:
    spec = streamed(make_folder(), views=None, augment={"random_resized_crop": {"scale": [0.1, 0.8]}, "hflip": True})
    alone, several = (open_dataset(spec, seed=5, device=CPU) for _ in range(2))
    several.set_views(3)
    for one, three in zip(steps(alone, BatchPlan(0, 10)), steps(several, BatchPlan(0, 10)), strict=True):
        assert_same(one, three._replace(views=()))
        views = (three.images, *three.views)
        assert {view.shape for view in views} == {(10, 3, 12, 12)}
        assert all(not torch.equal(views[a], views[b]) for a, b in ((0, 1), (0, 2), (1, 2)))


def test_grey_files_give_grey_views(make_folder: Any) -> None:
    (batch, *_) = steps(opened(streamed(make_folder("L"))), BatchPlan(0, 12))
    assert [view.shape for view in (batch.images, *batch.views)] == [(12, 1, side, side) for side in (12, 12, 6, 6)]


# On a GPU


def test_views_need_nothing_on_the_host_and_compile_to_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    images, indices = photographs(4, side=16), torch.arange(4)
    specs = groups({"kind": "global", "count": 2, "size": 8, "color_jitter": NO_HUE, "blur": 0.5, "solarize": 0.5})
    expected = made(specs, images, indices)
    monkeypatch.setattr(rows, "picks_rows", lambda device: False)  # as on a GPU
    crops = MultiCrop(specs, CPU)
    crops([images], indices, seed=SEED, epoch=EPOCH, views=2)  # keys are made once an epoch
    with Operators() as operators:
        eager = crops([images], indices, seed=SEED, epoch=EPOCH, views=2)
    waiting = {"_local_scalar_dense", "item", "nonzero", "masked_select", "unique", "_unique2", "is_nonzero"}
    assert not operators.seen & waiting
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager", fullgraph=True))
    torch.compiler.reset()
    crops.compile()
    compiled = crops([images], indices, seed=SEED, epoch=EPOCH, views=2)
    for one, other, levels in zip(eager, compiled, expected, strict=True):
        assert torch.equal(one, other)
        assert torch.equal(one, levels.float() / 255)


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True])
def test_views_on_a_gpu_are_those_of_the_cpu_and_never_wait(compiled: bool) -> None:
    images, indices = photographs(32), torch.arange(32)
    expected = MultiCrop(groups(*DINO), CPU)([images], indices, seed=SEED, epoch=EPOCH, views=5)
    crops = MultiCrop(groups(*DINO), torch.device("cuda"))
    if compiled:
        torch.compiler.reset()
        crops.compile()
    images, indices = images.cuda(), indices.cuda()
    crops([images], indices, seed=SEED, epoch=EPOCH, views=5)
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = crops([images], indices, seed=SEED, epoch=EPOCH, views=5)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(one.cpu(), other) for one, other in zip(found, expected, strict=True))
