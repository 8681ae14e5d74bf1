"""What a run is about to learn from, in words: said at its start and by --dry-run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from distill.data.dataset import DatasetInfo
from distill.data.imbalance import class_weights
from distill.recipe import FROM_PYTHON, Data
from distill.recipe.imbalance import is_unbalanced

MOST_NAMES = 12


def facts(info: DatasetInfo, spec: Data, *, methods: bool = True) -> Iterator[tuple[str, str]]:
    """Keys and values, one a line; `methods`: whether the run has any, which could learn from unlabelled images."""
    splits = ", ".join(f"{name} {size:,}" for name, size in info.sizes.items() if size)
    held_out = f" ({len(info.held_out):,} held out for the test by data.test)" if info.held_out else ""
    where = "" if spec.name in (FROM_PYTHON, "digits") else f" in {spec.root}"
    yield "data", f"{info.name}{where}, {sum(info.sizes.values()):,} images: {splits}{held_out}"
    if info.unlabelled:
        yield "labels", f"{info.sizes['train']:,} of {info.sizes['train'] + info.unlabelled:,} training images"
        origin = (
            f"in {spec.unlabelled}" if spec.unlabelled else f"of the training split (data.labelled={spec.labelled:g})"
        )
        yield "unlabelled", f"{info.unlabelled:,} images {origin}, {_use(info, spec, methods)}"
    names = ", ".join(info.class_names[:MOST_NAMES])
    more = info.num_classes - MOST_NAMES
    yield "classes", f"{info.num_classes}: {names}" + (f" and {more:,} more" if more > 0 else "")
    yield from _balance(info, spec)
    colour = {1: "greyscale, 1 channel", 3: "colour, 3 channels"}.get(info.channels, f"{info.channels} channels")
    yield "images", f"{info.pixels or 'of unknown sizes'}; {colour}; {_fitted(info, spec)}"
    if (growth := spec.growth) is not None:
        sides = f"{growth.start} x {growth.start} pixels, from {100 * growth.until:g} % of the run on at full size"
        yield "growth", f"the student trains on images of {sides}"
    if spec.views is not None:
        crops = (f"{group.count} of {group.size} x {group.size} pixels ({group.kind})" for group in spec.views)
        yield "views", ", ".join(crops)
    if info.pack is not None:
        yield "pack", f"{info.pack}, {Path(info.pack).stat().st_size / 1e6:,.1f} MB"


def _balance(info: DatasetInfo, spec: Data) -> Iterator[tuple[str, str]]:
    """How many images the classes have, where that differs much, and what the recipe does about it."""
    if is_unbalanced(info.class_images):
        why = f" (data.long_tail={spec.long_tail:g})" if spec.long_tail is not None else ""
        yield "balance", f"{_range(info.class_names, info.class_images, ',d')} labelled training images a class{why}"
    if (weights := class_weights(spec, info.class_names, info.class_images)) is not None:
        yield "weights", f"{_range(info.class_names, weights, '.3g')}, in the label loss and in methods on logits"
    if spec.sampler is not None:
        yield "sampler", f"each class equally often (data.sampler={spec.sampler})"


def _range(names: Sequence[str], values: Sequence[float], form: str) -> str:
    """The smallest and the largest value, with their classes."""
    ends = (of(zip(values, names, strict=True)) for of in (min, max))
    return " to ".join(f"{value:{form}} ({name})" for value, name in ends)


def _use(info: DatasetInfo, spec: Data, methods: bool) -> str:
    """What a run does with its unlabelled images."""
    if not methods:
        return "left out: no method learns from them"
    if spec.unlabelled_share == 0:
        return "left out (data.unlabelled_share=0)"
    share = spec.unlabelled_share or info.unlabelled / (info.sizes["train"] + info.unlabelled)
    return f"{100 * share:.3g} % of a batch, for methods alone"


def _fitted(info: DatasetInfo, spec: Data) -> str:
    if not info.fitted:
        return "each model resizes them to its own size"
    side = spec.resolution
    how = {
        "crop": f"the shorter side resized to {side} pixels, the centre {side} x {side} cropped",
        "squash": f"resized to {side} x {side} pixels, whatever their shape",
        "pad": f"the longer side resized to {side} pixels, padded to {side} x {side} with data.background",
    }[spec.fit]
    return f"{how} (data.fit={spec.fit})"


def range_of(sizes: set[tuple[int, int]]) -> str:
    """The sizes (width, height) of images in words."""
    if len(sizes) == 1:
        ((width, height),) = sizes
        return f"{width} x {height} pixels"
    if not sizes:
        return ""
    wide, high = (
        f"{min(sides):,} to {max(sides):,}" if len(set(sides)) > 1 else f"{sides[0]:,}"
        for sides in zip(*sizes, strict=True)
    )
    return f"{wide} pixels wide, {high} high"
