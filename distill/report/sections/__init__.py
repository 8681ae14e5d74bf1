"""The sections of a report, one a file: each a function from a comparison to a `Section`, or None where there is
nothing to show."""

from distill.report.comparison import Comparison
from distill.report.page import Section
from distill.report.sections import (
    calibration,
    classes,
    cost,
    features,
    fidelity,
    int8,
    learning,
    made,
    pairs,
    pictures,
    robustness,
    seeds,
    tokens,
)

ORDER = (
    pairs,
    seeds,
    features,
    learning,
    fidelity,
    calibration,
    classes,
    robustness,
    pictures,
    tokens,
    cost,
    int8,
    made,
)


def sections(comparison: Comparison) -> list[Section]:
    return [section for module in ORDER if (section := module.build(comparison)) is not None]
