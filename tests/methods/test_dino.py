"""DINO and EsViT beside plain loops in float64."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from distill.features import Features
from distill.methods.base import Method, Shapes, StepInputs
from distill.methods.dino import DinoHead, dino_loss, update_center
from distill.methods.esvit import match, region_loss
from distill.registry import find
from tests.methods.helpers import assert_equals_oracle, assert_half_is_computed_in_float32, normal, softmax

IMAGES, PROTOTYPES = 3, 7


def cross_entropy(teacher: Tensor, student: Tensor, center: Tensor, sharp: float, soft: float) -> Tensor:
    """Of one row each."""
    target = softmax((teacher - center) / sharp)
    answer = softmax(student / soft)
    return -sum((p * q.log() for p, q in zip(target, answer, strict=True)), torch.zeros((), dtype=torch.float64))


def pairs_of(views: int, globals_: int = 2) -> list[tuple[int, int]]:
    return [(a, b) for a in range(globals_) for b in range(views) if a != b]


@pytest.mark.parametrize(("views", "globals_"), [(2, 2), (5, 2), (4, 3)])
def test_the_loss_is_the_mean_over_pairs_of_views(views: int, globals_: int) -> None:
    center = normal(1, 1, PROTOTYPES)
    student, teacher = normal(2, views * IMAGES, PROTOTYPES), normal(3, globals_ * IMAGES, PROTOTYPES)

    def oracle(student: Tensor, teacher: Tensor) -> Tensor:
        terms = [
            cross_entropy(teacher[a * IMAGES + image], student[b * IMAGES + image], center[0], 0.3, 0.5)
            for a, b in pairs_of(views, globals_)
            for image in range(IMAGES)
        ]
        return torch.stack(terms).mean()

    def loss(student: Tensor, teacher: Tensor) -> Tensor:
        where = center.to(student.dtype if student.dtype == torch.float64 else torch.float32)
        return dino_loss(student, teacher, where, views=views, student_temperature=0.5, teacher_temperature=0.3)

    assert_equals_oracle(loss, oracle, student, teacher)
    assert_half_is_computed_in_float32(loss, student, teacher)


def test_ten_views_have_eighteen_pairs() -> None:
    """And the published temperature of the student is the default."""
    student, teacher = normal(2, 10, PROTOTYPES), normal(3, 2, PROTOTYPES)
    terms = [cross_entropy(teacher[a], student[b], torch.zeros(PROTOTYPES), 0.04, 0.1) for a, b in pairs_of(10)]
    assert len(terms) == 18
    found = dino_loss(student, teacher, torch.zeros(1, PROTOTYPES).double(), views=10, teacher_temperature=0.04)
    torch.testing.assert_close(found, torch.stack(terms).mean())


def test_the_centre_follows_the_mean_of_the_raw_logits() -> None:
    center, teacher = normal(1, 1, PROTOTYPES), normal(3, 2 * IMAGES, PROTOTYPES)
    for momentum in (0.9, 0.0, 1.0):
        expected = [
            momentum * center[0, k].item() + (1 - momentum) * sum(teacher[:, k].tolist()) / len(teacher)
            for k in range(PROTOTYPES)
        ]
        found = update_center(center, teacher, momentum)
        assert found.shape == (1, PROTOTYPES)
        assert found[0].tolist() == pytest.approx(expected, abs=1e-12)
    assert torch.equal(update_center(center, teacher), update_center(center, teacher, 0.9))


# The head


@pytest.mark.parametrize(
    ("width", "prototypes", "hidden", "parameters"),
    [(192, 65536, 2048, 21_958_912), (192, 1024, 2048, 5_379_328), (192, 1024, 512, 755_968)],
)
def test_the_published_heads_have_so_many_parameters(width: int, prototypes: int, hidden: int, parameters: int) -> None:
    with torch.device("meta"):
        head = DinoHead(width, prototypes, hidden)
    assert sum(parameter.numel() for parameter in head.parameters()) == parameters


def gelu(value: float) -> float:
    return value * 0.5 * (1 + math.erf(value / math.sqrt(2)))


def linear(layer: nn.Module, values: Sequence[float]) -> list[float]:
    rows = zip(layer.weight.tolist(), layer.bias.tolist(), strict=True)  # type: ignore[operator, union-attr]
    return [sum(w * x for w, x in zip(row, values, strict=True)) + bias for row, bias in rows]


def test_the_head_is_an_mlp_and_prototypes_of_length_one() -> None:
    torch.manual_seed(0)
    head = DinoHead(4, PROTOTYPES, hidden=6, bottleneck=5).double()
    assert not head.fc1.bias.any()
    for layer in (head.fc1, head.fc2, head.fc3):
        assert layer.weight.std().item() < 0.03
        nn.init.normal_(layer.weight)
        nn.init.normal_(layer.bias)
    images = normal(1, 2, 3, 4)
    found = head(images)
    for image in range(2):
        for row in range(3):
            hidden = [gelu(value) for value in linear(head.fc1, images[image, row].tolist())]
            hidden = [gelu(value) for value in linear(head.fc2, hidden)]
            bottleneck = linear(head.fc3, hidden)
            length = math.sqrt(sum(value**2 for value in bottleneck))
            expected = []
            for direction in head.last.weight.tolist():
                norm = math.sqrt(sum(value**2 for value in direction))
                expected.append(sum(v * w for v, w in zip(bottleneck, direction, strict=True)) / (length * norm))
            assert found[image, row].tolist() == pytest.approx(expected, abs=1e-12)
    assert not head.last.gain.requires_grad
    assert not DinoHead(4, PROTOTYPES, 6, 5).last.gain.requires_grad
    assert DinoHead(4, PROTOTYPES, 6, 5, norm_last_layer=False).last.gain.requires_grad


@pytest.mark.parametrize("norm_last_layer", [True, False])
def test_a_frozen_last_layer_answers_the_same_and_has_no_gradient(norm_last_layer: bool) -> None:
    head = DinoHead(4, PROTOTYPES, 6, 5, norm_last_layer)
    with torch.no_grad():
        head.last.gain.uniform_(0.5, 2.0)
    images = normal(1, 2, 4).float()
    frozen, learning = head(images, freeze_last=True), head(images)
    assert torch.equal(frozen, learning)
    frozen.square().sum().backward()
    assert all(not parameter.grad.any() for parameter in head.last.parameters() if parameter.requires_grad)  # type: ignore[union-attr]
    assert head.fc1.weight.grad.any()  # type: ignore[union-attr]
    head.zero_grad()
    head(images).square().sum().backward()
    assert head.last.weight.grad.any()  # type: ignore[union-attr]
    assert (head.last.gain.grad is not None) == (not norm_last_layer)


# Regions


def nearest(student: Tensor, teacher: Tensor) -> int:
    """The first of the most similar rows."""
    similar = [
        sum(s * t for s, t in zip(student.tolist(), row.tolist(), strict=True))
        / math.sqrt(sum(value**2 for value in row.tolist()))
        for row in teacher
    ]
    return similar.index(max(similar))


@pytest.mark.parametrize(("views", "of_global", "of_local"), [(2, 4, 0), (4, 4, 2), (3, 1, 1)])
def test_the_region_loss_is_the_mean_over_matched_regions(views: int, of_global: int, of_local: int) -> None:
    numbers = [of_global] * 2 + [of_local] * (views - 2)
    rows, teachers = IMAGES * sum(numbers), IMAGES * 2 * of_global
    student, teacher, center = normal(1, rows, PROTOTYPES), normal(2, teachers, PROTOTYPES), normal(3, 1, PROTOTYPES)
    student_features, teacher_features = normal(4, rows, 5), normal(5, teachers, 5)

    def row(view: int, image: int, region: int) -> int:
        return IMAGES * sum(numbers[:view]) + image * numbers[view] + region

    def oracle(student: Tensor, teacher: Tensor) -> Tensor:
        of_pairs = []
        for a, b in pairs_of(views):
            terms = []
            for image in range(IMAGES):
                candidates = [row(a, image, region) for region in range(of_global)]
                for region in range(numbers[b]):
                    own = row(b, image, region)
                    matched = candidates[nearest(student_features[own], teacher_features[candidates])]
                    terms.append(cross_entropy(teacher[matched], student[own], center[0], 0.3, 0.1))
            of_pairs.append(torch.stack(terms).mean())
        return torch.stack(of_pairs).mean()

    def loss(student: Tensor, teacher: Tensor) -> Tensor:
        kind = student.dtype if student.dtype == torch.float64 else torch.float32
        features = student_features.to(kind).requires_grad_(), teacher_features.to(kind).requires_grad_()
        found = region_loss(
            student, teacher, *features, center.to(kind), views=views, images=IMAGES, teacher_temperature=0.3
        )
        assert torch.autograd.grad(found, features, allow_unused=True, retain_graph=True) == (None, None)
        return found

    assert_equals_oracle(loss, oracle, student, teacher)


@pytest.mark.parametrize("kind", [torch.float32, torch.float64])
def test_of_equally_similar_regions_the_first_is_matched(kind: torch.dtype) -> None:
    """Many regions, whose products are computed in blocks; lengths do not matter."""
    regions = normal(1, 2, 37, 65).to(kind)
    regions[1, 20] = 3.0 * regions[1, 11]
    regions[1, 36] = regions[1, 11]
    found = match(0.7 * regions, regions)
    expected = torch.arange(37).repeat(2, 1)
    expected[1, [20, 36]] = 11
    assert torch.equal(found, expected)


# As methods of a step


def method_of(name: str = "dino", regions: int | None = None, **options: object) -> Method:
    variant = find("methods", name)
    small = {"prototypes": PROTOTYPES, "hidden": 6, "bottleneck": 5} | options
    torch.manual_seed(0)
    shapes = Shapes(embedding_width=4, region_width=regions)
    method: Method = variant.implementation(variant.options.model_validate({"method": name, **small}), shapes)
    for parameter in method.parameters():
        if parameter.requires_grad and parameter.ndim == 2:
            nn.init.normal_(parameter)
    return method


def step_of(seed: int, views: int = 4, epoch: float = 0.0) -> StepInputs:
    def features(number: int, seed: int) -> list[Features]:
        return [
            Features(
                {},
                {},
                normal(seed + view, IMAGES, 4).float(),
                normal(seed + 9 + view, IMAGES, 4 - view // 2, 3).float(),
            )
            for view in range(number)
        ]

    nothing = torch.zeros(0)
    return StepInputs(features(views, seed), [], nothing, nothing, 0.0, epoch, features(2, seed + 50))


def test_the_temperature_rises_epoch_by_epoch() -> None:
    options = find("methods", "dino").options.model_validate(
        {"method": "dino", "teacher_temperature": 0.04, "teacher_temperature_end": 0.07, "temperature_warmup_epochs": 4}
    )
    found = [options.teacher_temperature_at(epoch) for epoch in (0.0, 0.99, 1.0, 2.5, 3.0, 4.0, 100.0)]
    assert found == pytest.approx([0.04, 0.04, 0.05, 0.06, 0.07, 0.07, 0.07])
    assert options.model_copy(update={"temperature_warmup_epochs": 0}).teacher_temperature_at(0.0) == 0.07
    assert options.model_copy(update={"temperature_warmup_epochs": 1}).teacher_temperature_at(0.0) == 0.04


@pytest.mark.parametrize("name", ["dino", "esvit"])
def test_a_step_is_the_loss_of_both_heads(name: str) -> None:
    method = method_of(name, 3, temperature_warmup_epochs=3, freeze_last_epochs=1)
    step = step_of(1, epoch=1.5)
    loss = method(step)
    views = method.views
    student = views.head(torch.cat([view.embedding for view in step.student]))
    teacher = views.average(torch.cat([view.embedding for view in step.average]))
    expected = dino_loss(student, teacher, views.center, views=4, teacher_temperature=0.055)
    if name == "esvit":
        regions = method.regions
        rows = [torch.cat([view.regions.flatten(0, 1) for view in of]) for of in (step.student, step.average)]
        found = region_loss(
            regions.head(rows[0]),
            regions.average(rows[1]),
            *rows,
            regions.center,
            views=4,
            images=IMAGES,
            teacher_temperature=0.055,
        )
        expected = 0.5 * expected + 0.5 * found
        measured = method.measurements
        torch.testing.assert_close(measured["region_teacher_entropy"] + measured["region_kl"], found.detach())
    torch.testing.assert_close(loss, expected)
    loss.backward()
    for parameter in method.parameters():
        assert (parameter.grad is not None) == parameter.requires_grad
    targets = torch.softmax((teacher - views.center) / 0.055, -1).double()
    entropy = -(targets * targets.clamp(min=1e-300).log()).sum(-1).mean()
    assert method.measurements["teacher_entropy"].item() == pytest.approx(entropy.item(), rel=1e-5)
    assert tuple(method.measurements) == method.measured


@pytest.mark.parametrize("name", ["dino", "esvit"])
def test_the_centre_is_that_of_all_micro_batches_and_not_of_skipped_steps(name: str) -> None:
    method = method_of(name, 3)
    steps = [step_of(1), step_of(200)]
    heads = method.heads
    logits = [
        torch.cat([head.average(torch.cat([getattr(view, kind) for view in step.average])) for step in steps])
        for head, kind in zip(heads, ("embedding", "regions"), strict=False)
    ]
    for step in steps:
        method(step)
    assert not any(head.center.any() for head in heads)
    method.end_step(torch.tensor(False))
    for head, of_head in zip(heads, logits, strict=True):
        torch.testing.assert_close(head.center, 0.1 * of_head.reshape(-1, PROTOTYPES).mean(0, keepdim=True))
    before = [head.center.clone() for head in heads]
    broken = [view._replace(embedding=view.embedding * math.nan) for view in steps[0].average]
    method(steps[0]._replace(average=broken))
    method.end_step(torch.tensor(True))
    method.end_step(torch.tensor(False))  # of a step in which the method did not take part
    assert all(torch.equal(head.center, old) for head, old in zip(heads, before, strict=True))


def test_a_student_without_regions_has_no_region_loss() -> None:
    with pytest.raises(ValueError, match="no features of regions; use dino"):
        method_of("esvit", None)


def test_an_answer_that_is_always_the_same_is_seen_in_the_measurements() -> None:
    """Uniform answers: the largest entropy there is. Certain ones: none. In both the divergence is 0."""
    method = method_of("dino", student_temperature=0.04, teacher_temperature=0.04, teacher_temperature_end=0.04)
    step = step_of(1, views=2)
    healthy = method(step) and dict(method.measurements)
    assert 0.05 < healthy["teacher_entropy"] < math.log(PROTOTYPES) - 0.05
    assert healthy["kl"] > 0.1
    with torch.no_grad():
        for head in (method.views.head, method.views.average):
            for layer in (head.fc1, head.fc2, head.fc3):
                layer.weight.zero_()
                layer.bias.fill_(0.1)
            head.last.weight.fill_(1.0)
    method(step)
    assert method.measurements["teacher_entropy"].item() == pytest.approx(math.log(PROTOTYPES), abs=1e-5)
    assert method.measurements["kl"].item() == pytest.approx(0.0, abs=1e-5)
    with torch.no_grad():
        for head in (method.views.head, method.views.average):
            head.last.weight[1:] = -1.0
    method(step)
    assert method.measurements["teacher_entropy"].item() == pytest.approx(0.0, abs=1e-5)
    assert method.measurements["kl"].item() == pytest.approx(0.0, abs=1e-5)
