"""Pictures on which student and teacher disagree."""

from __future__ import annotations

import base64
import io
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy.special import softmax

from distill.report.comparison import Comparison
from distill.report.metrics import NO_ANSWER, agree, as_numbers, decisions
from distill.report.page import Picture, Section, Wall

QUALITY = 90
"""Of the pictures in a page, a third of the size that they have without loss."""
GROUPS = ("only the teacher is right", "only the student is right", "neither is right")


def build(comparison: Comparison) -> Section | None:
    walls: list[Wall] = []
    data: list[dict[str, Any]] = []
    says: list[str] = []
    for name, run in comparison.runs.items():
        student, teacher = comparison.row(name, "student"), comparison.teacher_of(name)
        if run.analysis is None or teacher is None or student is None or "pictures.images" not in run.analysis.tensors:
            continue
        control = comparison.control_of(name)
        models = [student, teacher] if control is None else [student, teacher, control]
        numbers = run.analysis.tensors["pictures.indices"].tolist()
        answered = [
            (row.role, softmax(as_numbers(row.logits[numbers]), axis=1), decisions(row.logits[numbers]))
            for row in models
        ]
        pictures = []
        for index, (number, image) in enumerate(zip(numbers, run.analysis.tensors["pictures.images"], strict=True)):
            label = int(comparison.labels[number])
            answers = [
                (model, "no answer", 0.0, False)
                if decided[index] == NO_ANSWER
                else (model, run.class_names[decided[index]], 100 * float(values[index].max()), decided[index] == label)
                for model, values, decided in answered
            ]
            group = GROUPS[0] if answers[1][3] else GROUPS[1] if answers[0][3] else GROUPS[2]
            pictures.append(Picture(to_address(image), run.class_names[label], answers, group, number))
        title = comparison.called(name, f"student and {teacher.title} disagree")
        walls.append(Wall(f"wall-{len(walls)}", title, GROUPS, pictures))
        differ = int((~agree(decisions(student.logits), decisions(teacher.logits))).sum())
        counts = {group: sum(picture.group == group for picture in pictures) for group in GROUPS}
        shown = {"disagreements": differ, "shown": len(pictures), "classes": len(run.class_names)}
        data.append({"run": name, **shown, **counts})
        says.append(
            f"{comparison.called(name, f'{len(pictures):,}')} of the {differ:,} test images on which student and "
            f"{teacher.title} disagree, the surest answers first"
        )
    if not walls:
        return None
    return Section("pictures", "Pictures", f"{'; '.join(says)}.", walls, data)


def to_address(image: NDArray[Any]) -> str:
    """A data: address of uint8 pixels [C, H, W]; of other than one or three channels the first is shown."""
    pixels = image.transpose(1, 2, 0) if len(image) == 3 else image[0]
    file = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(file, "WEBP", quality=QUALITY, method=6)
    return f"data:image/webp;base64,{base64.b64encode(file.getvalue()).decode()}"
