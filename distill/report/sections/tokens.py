"""Class and distillation token: what each looks at, block by block, and how alike they are."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray
from PIL import Image
from scipy.ndimage import binary_erosion

from distill.report.charts import Chart
from distill.report.comparison import Comparison
from distill.report.page import Attention, Part, Plot, Section
from distill.report.runs import TOKENS, Analysis, RunFiles
from distill.report.sections.pictures import to_address

PIXELS = 64
"""Of a view's side, about."""
GLOW = np.array([255, 176, 0])
"""Where a token looks."""
OUTLINE = np.array([86, 180, 233])
"""Of an area."""


def build(comparison: Comparison) -> Section | None:
    cosines = [
        {"run": name, "model": model, "token_cosines": values}
        for name, run in comparison.runs.items()
        for model, files in run.models
        if files.analysis is not None and (values := files.analysis.values.get("tokens", {}).get("token_cosines"))
    ]
    parts: list[Part] = []
    if cosines:
        caption = (
            "Cosine between class and distillation token as they enter the first block (0) and after each block, means "
            "over test images. DeiT reports 0.06 at first and 0.93 after the last block."
        )
        parts.append(Plot("cosines", "Likeness of the tokens", caption, _chart(comparison, cosines)))
    looking = {
        name: (run, run.analysis)
        for name, run in comparison.runs.items()
        if run.analysis is not None and "attention.patches" in run.analysis.tensors
    }
    numbers = {name: set(analysis.tensors["attention.indices"].tolist()) for name, (_, analysis) in looking.items()}
    same = set.intersection(*numbers.values()) if numbers else set()
    for name, (run, analysis) in looking.items():
        title = comparison.called(name, "attention") if comparison.several else "Attention"
        if not same:
            title += " (analysed by versions that chose other images for each run)"
        parts.append(_attention(f"attention-{len(parts)}", title, run, analysis, same or numbers[name]))
    if not parts:
        return None
    said = [
        f"{comparison.called(line['run'], line['model'])} {line['token_cosines'][0]:.2f} before the first block and "
        f"{line['token_cosines'][-1]:.2f} after the last"
        for line in cosines
    ]
    says = f"Cosine between class and distillation token: {'; '.join(said)}." if said else "Where its tokens look."
    return Section("tokens", "Tokens and attention", says, parts, cosines)


def _chart(comparison: Comparison, cosines: list[dict[str, Any]]) -> Chart:
    chart = Chart("after block", "cosine")
    for line in cosines:
        name, values = comparison.called(line["run"], line["model"]), line["token_cosines"]
        chart.line(
            range(len(values)),
            values,
            [f"{name}, after block {block}: {value:.2f}" for block, value in enumerate(values)],
            color=comparison.colour(line["run"], line["model"]),
            marker=comparison.marker(line["run"], line["model"]),
            label=name,
        )
    chart.axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    chart.legend()
    return chart


def _attention(name: str, title: str, run: RunFiles, analysis: Analysis, shown: set[int]) -> Attention:
    """`shown`: numbers of the test images, the same for all runs that are compared."""
    tensors, tokens = analysis.tensors, analysis.values["tokens"].get("names", TOKENS)
    patches = tensors["attention.patches"].astype(np.float64)  # [depth, images, tokens, H, W]
    pictures = []
    numbers, images = tensors["attention.indices"].tolist(), tensors["attention.images"]
    for index, (number, image) in enumerate(zip(numbers, images, strict=True)):
        if number not in shown:
            continue
        rows = []
        for token in range(patches.shape[2]):
            views = []
            for block, weights in enumerate(patches[:, index, token]):
                areas = tensors.get(f"attention.areas.{block}")
                masks = [] if areas is None else areas[index, token]
                views.append((f"block {block + 1}", to_address(_view(image, weights, masks))))
            rows.append((tokens[token], views))
        label = run.class_names[int(run.predictions.labels[number])]
        pictures.append((to_address(image), f"{label} (test image {number})", rows))
    return Attention(name, title, pictures)


def _view(image: NDArray[Any], weights: NDArray[Any], areas: Iterable[NDArray[Any]]) -> NDArray[Any]:
    """The picture in grey, uint8 [3, S, S], glowing in proportion to the patches' weights [H, W] over the largest, with
    the outlines of areas, bool [H, W] each.
    """
    times = max(1, round(PIXELS / max(image.shape[1:])))
    grey = image[:3].mean(0).repeat(times, 0).repeat(times, 1)

    def enlarged(values: NDArray[Any]) -> NDArray[Any]:
        found = Image.fromarray(values.astype(np.float32)).resize(grey.shape[::-1], Image.Resampling.NEAREST)
        return np.asarray(found)

    share = 0.75 * enlarged(weights / max(weights.max(), 1e-12))
    mixed = 0.75 * (grey * (1 - share))[..., None] + share[..., None] * GLOW
    for area in areas:
        inside = enlarged(area) > 0
        mixed[inside & ~binary_erosion(inside)] = OUTLINE
    return mixed.clip(0, 255).astype(np.uint8).transpose(2, 0, 1)
