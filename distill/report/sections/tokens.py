"""Class and distillation token: what each looks at, block by block, and how alike they are."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from distill.report.charts import Chart
from distill.report.comparison import Comparison
from distill.report.page import Attention, Box, Part, Plot, Section, View
from distill.report.runs import RunFiles
from distill.report.sections.learning import colour
from distill.report.sections.pictures import to_png

TOKENS = ("class token", "distillation token")
PIXELS = 64
"""Of a view's side, about."""
GLOW = np.array([255, 176, 0])
"""Where a token looks."""


def build(comparison: Comparison) -> Section | None:
    cosines = []
    for name, run in comparison.runs.items():
        for model, part in (("student", run), ("control", run.control)):
            values = {} if part is None or part.analysis is None else part.analysis.values.get("tokens", {})
            if values.get("token_cosines"):
                cosines.append((name, model, values["token_cosines"], values["head_cosines"]))
    parts: list[Part] = []
    if cosines:
        caption = (
            "Cosine between class and distillation token as they enter the first block (0) and after each block, and "
            "between what the two heads would say of them there; means over test images. DeiT reports 0.06 at first "
            "and 0.93 after the last block for its tokens."
        )
        parts.append(Plot("cosines", "Likeness of the tokens", caption, _chart(comparison, cosines)))
    parts += [
        _attention(f"Attention of {name}" if comparison.several else "Attention", run, len(parts) + number)
        for number, (name, run) in enumerate(comparison.runs.items())
        if run.analysis is not None and "attention.patches" in run.analysis.tensors
    ]
    if not parts:
        return None
    data = [
        {"run": name, "model": model, "token_cosines": tokens, "head_cosines": heads}
        for name, model, tokens, heads in cosines
    ]
    return Section("tokens", "Tokens and attention", _says(comparison, cosines), parts, data)


def _says(comparison: Comparison, cosines: list[tuple[str, str, list[float], list[float]]]) -> str:
    if not cosines:
        return "Where the class token looks, block by block."
    said = [
        f"{f'{name}: ' if comparison.several else ''}{model} {tokens[0]:.2f} before the first block and "
        f"{tokens[-1]:.2f} after the last, {heads[-1]:.2f} between what its heads say"
        for name, model, tokens, heads in cosines
    ]
    return f"Cosine between class and distillation token: {'; '.join(said)}."


def _chart(comparison: Comparison, cosines: list[tuple[str, str, list[float], list[float]]]) -> Chart:
    chart = Chart()
    for name, model, tokens, heads in cosines:
        label = f"{name}: {model}" if comparison.several else model
        for what, values, style in (("tokens", tokens, "-"), ("heads", heads, "--")):
            chart.line(
                range(len(values)),
                values,
                [f"{label}, {what}, after block {block}: {value:.2f}" for block, value in enumerate(values)],
                color=colour(comparison, name, model),
                linestyle=style,
                label=f"{label}, {what}",
            )
    chart.label("after block", "cosine")
    chart.axes[0].xaxis.set_major_locator(MaxNLocator(integer=True))
    chart.legend()
    return chart


def _attention(title: str, run: RunFiles, number: int) -> Attention:
    assert run.analysis is not None
    tensors = run.analysis.tensors
    patches = tensors["attention.patches"].astype(np.float64)  # [depth, images, tokens, H, W]
    depth, _, count, height, width = patches.shape
    pictures = []
    for index, (place, image) in enumerate(
        zip(tensors["attention.indices"].tolist(), tensors["attention.images"], strict=True)
    ):
        rows = []
        for token in range(count):
            views = [
                View(
                    f"block {block + 1}",
                    to_png(_glowing(image, patches[block, index, token])),
                    _boxes(tensors, block, index, token),
                )
                for block in range(depth)
            ]
            rows.append((TOKENS[token] if token < len(TOKENS) else f"token {token}", views))
        label = run.class_names[int(run.predictions.labels[place])]
        pictures.append((to_png(image), f"{label} (test image {place})", rows))
    return Attention(f"attention-{number}", title, (height, width), pictures)


def _glowing(image: NDArray[Any], weights: NDArray[Any]) -> NDArray[Any]:
    """The picture in grey, uint8 [3, S, S], glowing in proportion to the patches' weights [H, W] over the largest."""
    times = max(1, round(PIXELS / max(image.shape[1:])))
    grey = image[:3].mean(0).repeat(times, 0).repeat(times, 1)
    rows = np.arange(grey.shape[0]) * weights.shape[0] // grey.shape[0]
    columns = np.arange(grey.shape[1]) * weights.shape[1] // grey.shape[1]
    share = (weights / max(weights.max(), 1e-12))[rows][:, columns]
    mixed = 0.75 * grey[..., None] * (1 - 0.75 * share[..., None]) + 0.75 * share[..., None] * GLOW
    return mixed.clip(0, 255).astype(np.uint8).transpose(2, 0, 1)


def _boxes(tensors: Any, block: int, index: int, token: int) -> list[Box]:
    """The strongest areas as boxes: one each, or one for each row that a run of tokens goes through."""
    if f"attention.areas.{block}" not in tensors:
        return []
    masks = tensors[f"attention.areas.{block}"][index, token]
    weights = tensors[f"attention.area_weights.{block}"][index, token].tolist()
    return [box for mask, weight in zip(masks, weights, strict=True) for box in _boxes_of(mask, weight)]


def _boxes_of(mask: NDArray[Any], weight: float) -> list[Box]:
    rows, columns = np.nonzero(mask)
    if not len(rows):
        return []
    top, left = int(rows.min()), int(columns.min())
    height, width = int(rows.max()) - top + 1, int(columns.max()) - left + 1
    if height * width == len(rows):
        return [Box(left, top, width, height, weight)]
    return [
        Box(int(columns[rows == row].min()), int(row), int((rows == row).sum()), 1, weight) for row in np.unique(rows)
    ]
