"""The colours of runs and models: told apart by colour-blind readers, and seen on the page, by its style sheet."""

from __future__ import annotations

import re
from itertools import combinations

import numpy as np
import pytest

from distill.report.charts import COLOURS, MARKERS, TEACHER_COLOUR
from distill.report.document import TEMPLATES

# Machado et al. 2009, "A physiologically-based model for simulation of color vision deficiency", severity 1.
SEEN_BY = {
    "all": np.eye(3),
    "protanopes": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopes": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritanopes": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}
TO_XYZ = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
FIRST = 4
"""Colours that most comparisons have, beside the teacher's; later ones are told apart by their marks."""
LEAST = 10.0
"""Of the distance in CIELAB; 2.3 can just be seen."""


def linear(colour: str) -> np.ndarray:
    values = np.array([int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)])
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


def lab(rgb: np.ndarray) -> np.ndarray:
    xyz = TO_XYZ @ np.clip(rgb, 0, 1) / (TO_XYZ @ np.ones(3))
    f = np.where(xyz > (6 / 29) ** 3, np.cbrt(xyz), xyz * (29 / 6) ** 2 / 3 + 4 / 29)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


def shades(scheme: str) -> tuple[str, dict[str, str]]:
    """The paper, and each colour as the page shows it."""
    sheets = (TEMPLATES / "report.css").read_text(encoding="utf-8").split("@media")
    variables = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6});", sheets[0 if scheme == "light" else 1]))
    return variables["paper"], {
        colour: variables.get(f"c{colour[1:]}", colour) for colour in (*COLOURS, TEACHER_COLOUR)
    }


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_colours_are_told_apart_and_seen(scheme: str) -> None:
    paper, found = shades(scheme)
    for eyes, matrix in SEEN_BY.items():
        known = {name: lab(np.asarray(matrix) @ linear(found[name])) for name in (*COLOURS[:FIRST], TEACHER_COLOUR)}
        for one, other in combinations(known, 2):
            assert np.linalg.norm(known[one] - known[other]) > LEAST, (eyes, one, other)
    luminance = {name: float(TO_XYZ[1] @ linear(shade)) for name, shade in {**found, "paper": paper}.items()}
    for name in found:
        low, high = sorted((luminance[name], luminance["paper"]))
        assert (high + 0.05) / (low + 0.05) >= 3, name  # WCAG 2.1, 1.4.11


def test_marks_and_colours_come_again_together_late() -> None:
    pairs = {(COLOURS[index % len(COLOURS)], MARKERS[index % len(MARKERS)]) for index in range(40)}
    assert len(pairs) == 40
