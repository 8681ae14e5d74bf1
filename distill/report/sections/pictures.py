"""Pictures on which student and teacher disagree, and what class and distillation token look at."""

from __future__ import annotations

import base64
import io
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from distill.report.comparison import Comparison, Row
from distill.report.metrics import Floats
from distill.report.page import Answer, Picture, Section, Wall

GROUPS = ("only the teacher is right", "only the student is right", "neither is right")


def build(comparison: Comparison) -> Section | None:
    walls: list[Wall] = []
    data: list[dict[str, Any]] = []
    says: list[str] = []
    for name, run in comparison.runs.items():
        student, teacher = comparison.row(name, "student"), comparison.teacher_of(name)
        if run.analysis is None or teacher is None or student is None or "pictures.images" not in run.analysis.tensors:
            continue
        models = [student, teacher]
        if (control := comparison.row(name, "control")) is not None:
            models.append(control)
        places = run.analysis.tensors["pictures.indices"].tolist()
        images = run.analysis.tensors["pictures.images"]
        probabilities = [_probabilities(row.logits[places]) for row in models]
        pictures = [
            _picture(comparison, models, image, place, [values[index] for values in probabilities])
            for index, (place, image) in enumerate(zip(places, images, strict=True))
        ]
        classes = run.class_names
        walls.append(Wall(f"wall-{len(walls)}", GROUPS, sorted({picture.label for picture in pictures}), pictures))
        differ = int((student.logits.argmax(1) != teacher.logits.argmax(1)).sum())
        counts = [sum(picture.group == group for picture in pictures) for group in GROUPS]
        data.append({"run": name, "disagreements": differ, "shown": len(pictures), "classes": len(classes)})
        data[-1] |= dict(zip(GROUPS, counts, strict=True))
        says.append(
            f"{f'{name}: ' if comparison.several else ''}{len(pictures):,} of the {differ:,} test images on which "
            "student and teacher disagree, the surest answers first"
        )
    if not walls:
        return None
    return Section("pictures", "Pictures", "; ".join(says) + ".", walls, data)


def _picture(
    comparison: Comparison, models: list[Row], image: NDArray[Any], place: int, probabilities: list[Floats]
) -> Picture:
    names = models[0].source.class_names
    label = int(comparison.labels[place])
    answers = [
        Answer(row.model, names[int(values.argmax())], 100 * float(values.max()), int(values.argmax()) == label)
        for row, values in zip(models, probabilities, strict=True)
    ]
    group = GROUPS[0] if answers[1].right else GROUPS[1] if answers[0].right else GROUPS[2]
    return Picture(to_png(image), names[label], answers, group, place)


def to_png(image: NDArray[Any]) -> str:
    """A data: address of uint8 pixels [C, H, W]; of other than one or three channels the first is shown."""
    pixels = image.transpose(1, 2, 0) if len(image) == 3 else image[0]
    file = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(file, "PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def _probabilities(logits: Floats) -> Floats:
    exact = logits.astype(np.float64)
    powers = np.exp(exact - exact.max(1, keepdims=True))
    return powers / powers.sum(1, keepdims=True)
