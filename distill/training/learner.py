"""What is trained: the student, and with it whatever the distillation losses own."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from distill.errors import InputError
from distill.objectives import Objectives, Seen
from distill.recipe import Recipe
from distill.recipe.objectives import OnLogits, OnMaps
from distill.students import Student
from teachers import Teacher


class Learner(nn.Module):
    """A batch -> its losses. One module, so that what the losses own is trained like the student, under
    DistributedDataParallel too; checkpoints keep both, exports the student alone.
    """

    def __init__(self, student: Student, objectives: Objectives) -> None:
        super().__init__()
        self.student, self.objectives = student, objectives

    def forward(self, images: Tensor, targets: Tensor, seen: Seen | None) -> dict[str, Tensor]:
        """The losses by name, unweighted; see `Objectives`.

        Args:
            images: [B, C, H, W] in [0, 1].
            targets: [B, classes], rows summing to 1.
            seen: what the teacher says to them; None without one.
        """
        return self.objectives(self.student(images, self.objectives.blocks), targets, seen)


def build_objectives(recipe: Recipe, student: Student, teacher: Teacher | None) -> Objectives:
    """The recipe's losses between this student and this teacher, with weights that depend on the seed only.

    Raises:
        InputError: they leave a head untaught, or are to compare maps that one of the two has not.
    """
    _check_heads(recipe, student)
    smoothing = recipe.train.label_smoothing
    on_logits = [section for section in recipe.distill if isinstance(section, OnLogits)]
    on_maps = [section for section in recipe.distill if isinstance(section, OnMaps)]
    if teacher is None or not on_maps:
        return Objectives(on_logits if teacher else [], label_smoothing=smoothing)
    student_channels = student.map_channels()
    named = {pair.map for section in on_maps for pair in section.pairs or ()}
    stages = teacher.map_shapes(recipe.data.resolution)
    others = sorted(name for name in named if name is not None and name not in stages)
    shapes = stages | (teacher.map_shapes(recipe.data.resolution, others) if others else {})
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(recipe.seed)
        try:
            return Objectives(
                on_logits,
                on_maps,
                label_smoothing=smoothing,
                student_channels=student_channels,
                teacher_channels={name: shape[0] for name, shape in shapes.items()},
                stages=list(stages),
            )
        except ValueError as error:
            raise InputError(f"distill: {error}.") from None


def _check_heads(recipe: Recipe, student: Student) -> None:
    """InputError where the labels teach the first of two heads and no method with any weight the other."""
    on_logits = {index: section for index, section in enumerate(recipe.distill) if isinstance(section, OnLogits)}
    untaught = on_logits and not any(section.mean_weight for section in on_logits.values())
    if recipe.label_weight != 0 and untaught and len(student.heads) > 1:
        raise InputError(
            f"distill.{min(on_logits)}.weight: 0 all the time: the distillation head, half of the answer, would learn "
            "nothing; leave the method out"
        )
