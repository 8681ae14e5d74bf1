"""The task: student, teacher and methods as one module, batch -> losses."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Literal, NamedTuple, cast

import torch
from torch import Tensor, nn

from distill import registry
from distill.data import Batch
from distill.errors import InputError
from distill.features import Features, by_size, split
from distill.methods.base import Method, Shapes, StepInputs
from distill.methods.labels import labels
from distill.options import MapsOptions, dotted
from distill.recipe import Recipe
from distill.students import Student
from distill.students.attention import AttentionKind
from distill.teaching.moving_average import MovingAverage
from distill.teaching.source import StepIndex, TeacherSource
from distill.training.joined import joined


class Losses(NamedTuple):
    """Scalars in float32."""

    total: Tensor
    """label_weight * label + sum of weight * method (Touvron et al. 2021, arXiv 2012.12877, eqs. 2 and 3)."""
    parts: dict[str, Tensor]
    """Unweighted, by name: each method, NaN for one that has ended, and 'label' if the student has heads."""


class Task(nn.Module):
    """Student and methods as one module, so that the methods' parameters are trained with the student's, also under
    DistributedDataParallel. Checkpoints hold both, exports only the student.

    The class head learns from the labels, the distillation head from the teacher's logits; with a single head it learns
    from both. Without a method on logits, the label loss is the mean over the heads.
    """

    def __init__(
        self,
        student: Student,
        methods: Mapping[str, Method],
        source: TeacherSource | None,
        *,
        label_smoothing: float,
        weights: Callable[[float], Mapping[str, float]],
        side: Callable[[float], int | None] = lambda progress: None,
        multi_crop: bool = False,
        average: MovingAverage | None = None,
        global_views: int = 0,
        epochs: float = 1,
    ) -> None:
        """
        Args:
            weights: weight of each part, a function of the progress of the run, 0 to 1.
            side: in pixels, that the student's images are resized to, likewise; None: its own.
            multi_crop: the student sees each view at the view's size, and those of one size in one forward pass.
            average: teacher of the methods that need it.
            global_views: number of views, the first ones, that it answers for.
            epochs: of the run.
        """
        super().__init__()
        self.student, self.methods, self._methods = student, nn.ModuleDict(dict(methods)), dict(methods)
        self.source, self.average, self.global_views, self.epochs = source, average, global_views, epochs
        if average is not None:
            average.follow(methods.values())
        self.weights, self.side, self.label_smoothing = weights, side, label_smoothing
        self.blocks = tuple(sorted({block for method in methods.values() for block in method.blocks}))
        self.embeds = not student.heads or any(method.options.needs.embedding for method in methods.values())
        self.multi_crop = multi_crop
        needed = [method.options.needs.views for method in methods.values()]
        self.compared = max([1, *(views for views in needed if views != "all")])
        """Number of views that the teacher answers for, and of those with feature maps of the student."""
        self.views: int | Literal["all"] = "all" if "all" in needed else self.compared
        self.labelled_images: float | None = None
        """See `Dataset.labelled_images`."""
        self.class_weights: Tensor | None = None
        """float32 [classes], on the device; None: all 1."""
        self._keeps_steps = any(type(method).after_step is not Method.after_step for method in methods.values())
        self._kinds = [module for module in student.modules() if isinstance(module, AttentionKind)]
        self.measurements: dict[str, Tensor] = {}
        """Of the last micro-batch, by metric key; NaN of a method that has ended."""
        self._passes = 0
        """Of the student, in the current step."""
        self._steps: list[tuple[StepInputs, list[Method]]] = []
        """Micro-batches of the current step and their methods, for `after_step`."""

    def forward(self, batch: Batch, index: StepIndex, progress: float) -> Losses:
        """Losses of a micro-batch; `progress` of the run is 0 to 1."""
        weights = self.weights(progress)
        teaching = {name: cast(Method, method) for name, method in self.methods.items() if name in weights}
        views = (batch.images, *batch.views)
        compared = self.compared if self.views == "all" else len(views)
        teacher: Sequence[Features] = ()
        average: Sequence[Features] = ()
        needs = [method.options.needs for method in teaching.values()]
        if self.source is not None and any(need.logits or need.maps or not need.average for need in needs):
            teacher = self.source.ask(views[:compared], index)
        if self.average is not None and any(need.average for need in needs):
            average = self.average.ask(views[: self.global_views], index)
        # Only the student's images are small: the teacher's answers and maps stay those that preflight measured and
        # that a cache holds, and they cost little beside the student's three passes.
        student = self._ask_student(views, compared, self.side(progress))
        epoch = round(progress * self.epochs, 9)  # whole at the first step of an epoch
        weights_of = self.class_weights
        step = StepInputs(
            student,
            teacher,
            batch.targets,
            batch.indices,
            progress,
            epoch,
            average,
            None if weights_of is None else (batch.targets * weights_of).sum(1).where(batch.labels >= 0, 1.0),
            torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind := batch.targets.device.type) else None,
        )
        with torch.autocast(batch.targets.device.type, enabled=False):
            parts = {}
            if self.student.heads:
                parts["label"] = labels(
                    student[0].logits,
                    batch.targets,
                    smoothing=self.label_smoothing,
                    all_heads=not any(need.logits for need in needs),  # of the methods that teach still
                    labelled=None if self.labelled_images is None else batch.labels >= 0,
                    number=self.labelled_images,
                    weights=weights_of,
                )
            parts |= {name: method(step) for name, method in teaching.items()}
            terms = [weights[name] * part for name, part in parts.items()]
            if (embedding := student[0].embedding) is not None and not self.student.heads:
                terms.append(0.0 * embedding.float().sum())  # methods on maps leave the final norm out
            total = torch.stack(terms).sum()
            for name, method in self.methods.items():
                if name not in teaching:  # DistributedDataParallel waits for the gradients of all parameters
                    if parameters := [*method.parameters()]:
                        total = total + 0.0 * joined(parameters).sum()
                    parts[name] = total.new_full((), math.nan)
            self.measurements = {
                f"{name}/{key}": method.measurements[key] if name in teaching else total.new_full((), math.nan)
                for name, method in self._methods.items()
                for key in method.measured
            }
        if self._keeps_steps:
            self._steps.append((_detached(step), [*teaching.values()]))
        return Losses(total, parts)

    def _ask_student(self, views: Sequence[Tensor], with_maps: int, side: int | None) -> list[Features]:
        """The student's outputs by view; maps for the first `with_maps` views."""
        groups = [[view] for view in range(len(views))]
        if self.multi_crop and len(views) > 1:
            groups = by_size(views)
        found: dict[int, Features] = {}
        for group in groups:
            images = torch.cat([views[view] for view in group]) if len(group) > 1 else views[group[0]]
            own = images.shape[-1] if self.multi_crop else side
            features = self.student(images, self.blocks if group[0] < with_maps else (), side=own, embed=self.embeds)
            found |= zip(group, split(features, len(group)), strict=True)
        self._passes += len(groups)
        return [found[view] for view in range(len(views))]

    @torch.no_grad()
    def after_step(self, step: int, skipped: Tensor) -> None:
        """Update attention kinds, methods and teacher after optimizer step `step` (from 0); `skipped`: bool [], on the
        device.
        """
        for kind in self._kinds:
            kind.after_step(self._passes)
        self._passes = 0
        for inputs, methods in self._steps:
            for method in methods:
                method.after_step(inputs, skipped)
        self._steps.clear()
        for method in self._methods.values():
            method.end_step(skipped)
        for teacher in (self.source, self.average):
            if teacher is not None:
                teacher.after_step(step, skipped)


def _detached(step: StepInputs) -> StepInputs:
    student = [
        Features(
            {name: tensor.detach() for name, tensor in view.logits.items()},
            {name: tensor.detach() for name, tensor in view.maps.items()},
            *(None if tensor is None else tensor.detach() for tensor in (view.embedding, view.regions)),
        )
        for view in step.student
    ]
    return step._replace(student=student)


def build_task(
    recipe: Recipe,
    student: Student,
    source: TeacherSource | None,
    average: MovingAverage | None = None,
    *,
    num_classes: int,
) -> Task:
    """The recipe's task; the methods' initial weights depend on the seed only.

    Raises:
        InputError: a head has no loss, or a method needs logits or maps that student or teacher lack.
    """
    if (untaught := recipe.untaught_heads(len(student.heads))) is not None:
        raise InputError(f"{dotted(untaught.keys[0])}: {untaught.message}")
    _check_logits(recipe, source)
    # Without a teacher, which may have to be trained first, only methods that need none are built.
    sections = [section for section in recipe.distill if source or not (section.needs.logits or section.needs.maps)]
    # Methods on logits first: a fixed order of summation.
    sections.sort(key=lambda section: not section.needs.logits)
    shapes = Shapes(num_classes=num_classes)
    if source is not None and any(section.needs.maps for section in sections):
        named = {name for section in sections if isinstance(section, MapsOptions) for name in section.named_maps()}
        stages = source.map_shapes()
        others = sorted(name for name in named if name not in stages)
        known = stages | (source.map_shapes(others) if others else {})
        channels = {name: shape[0] for name, shape in known.items()}
        shapes = Shapes([stage.channels for stage in student.stages], channels, list(stages), num_classes)
    if any(section.needs.embedding for section in sections):
        student.check_embedding()
        shapes = replace(shapes, embedding_width=student.embedding_width, region_width=student.region_width)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(recipe.seed)
        try:
            methods = {
                section.method: registry.find("methods", section.method).implementation(section, shapes)
                for section in sections
            }
        except ValueError as error:
            raise InputError(f"distill: {error}.") from None
    if source is not None:
        source.want(tuple(dict.fromkeys(name for method in methods.values() for name in method.maps)))
    task = Task(
        student,
        methods,
        source,
        label_smoothing=recipe.train.label_smoothing,
        weights=recipe.loss_weights,
        side=recipe.training_side,
        multi_crop=recipe.data.views is not None,
        average=average,
        global_views=recipe.data.global_views,
        epochs=recipe.train.epochs,
    )
    student.check_maps(task.blocks)
    for side, key in recipe.other_sides.items():
        if recipe.data.views is None or side in recipe.data.view_sizes[: task.compared]:
            student.check_maps(task.blocks, side, key)
        resamples = getattr(student.model, "dynamic_img_size", False)  # its position embeddings, as timm does
        if resamples and recipe.train.deterministic and next(student.parameters()).is_cuda:
            raise InputError(
                "train.deterministic: on a GPU torch has no deterministic gradient of position embeddings that are "
                f"resampled for {dotted(key[:2])}. Set one of the two to its default."
            )
    return task


def _check_logits(recipe: Recipe, source: TeacherSource | None) -> None:
    """Raise InputError if a method needs logits and the teacher has no classifier."""
    methods = [section.method for section in recipe.distill if section.needs.logits]
    if methods and source is not None and not source.has_logits:
        raise InputError(
            f"distill: no logits to learn from for {', '.join(methods)}: teacher {source.name} has no classifier. Use "
            "methods on feature maps, such as guide, or a teacher with a classifier."
        )
