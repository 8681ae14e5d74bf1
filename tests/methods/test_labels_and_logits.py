"""The losses against their formulas in float64, timm's tasks and DeiT's arithmetic."""

from __future__ import annotations

import math

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.task import TokenDistillationTask
from torch import nn
from torch.nn import functional as F

from distill.features import Features
from distill.methods.base import Shapes
from distill.methods.hard import hard
from distill.methods.soft import soft
from distill.recipe import from_mapping
from tests.methods.helpers import build_methods, losses_of, task_of


def loss_of(heads, targets, teacher_logits, *sections, label_weight, label_smoothing):
    """The loss of these sections of a recipe, and its parts."""
    distill = from_mapping({"distill": list(sections), "teacher": {"model": "resnet18"}}).distill
    task = task_of(
        build_methods(distill, Shapes(num_classes=targets.shape[1])),
        heads,
        {},
        None if teacher_logits is None else Features({"cls": teacher_logits}, {}),
        label_smoothing=label_smoothing,
        weights={"label": label_weight} | {section.method: section.weight_at(0.5) for section in distill},
    )
    return losses_of(task, targets)


def logits(seed, batch=6, classes=10, scale=3.0):
    return torch.randn(batch, classes, generator=torch.Generator().manual_seed(seed)) * scale


def log_softmax(row):
    top = max(row)
    total = math.log(sum(math.exp(value - top) for value in row)) + top
    return [value - total for value in row]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0, 20.0])
def test_soft_is_its_formula(temperature):
    student, teacher = logits(0), logits(1)
    expected = 0.0
    for s, t in zip(student.double().tolist(), teacher.double().tolist(), strict=True):
        p = log_softmax([value / temperature for value in t])
        q = log_softmax([value / temperature for value in s])
        expected += sum(math.exp(a) * (a - b) for a, b in zip(p, q, strict=True))
    expected *= temperature**2 / len(student)
    assert soft(student, teacher, temperature).item() == pytest.approx(expected, rel=1e-5)


def test_hard_is_its_formula():
    student, teacher = logits(0), logits(1)
    rows = zip(student.double().tolist(), teacher.double().tolist(), strict=True)
    expected = sum(-log_softmax(s)[max(range(len(t)), key=t.__getitem__)] for s, t in rows) / len(student)
    assert hard(student, teacher).item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_teacher_without_an_answer_makes_the_step_one_to_skip(value: float) -> None:
    """argmax would take the first NaN for the teacher's decision."""
    teacher = logits(1)
    teacher[2, 3] = value
    assert math.isnan(hard(logits(0), teacher).item())
    assert math.isnan(soft(logits(0), teacher, 1.0).item())
    teacher[2, 3] = -math.inf  # an impossible class
    assert hard(logits(0), teacher).isfinite()


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_soft_is_deits_times_the_classes(temperature):
    """DeiT divides by the number of all elements where we divide by the number of samples."""
    student, teacher = logits(0), logits(1)
    s, t = F.log_softmax(student / temperature, 1), F.log_softmax(teacher / temperature, 1)
    deit = F.kl_div(s, t, reduction="sum", log_target=True) * temperature**2 / student.numel()
    torch.testing.assert_close(soft(student, teacher, temperature), deit * student.shape[1])


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.floats(0.5, 20.0), st.floats(0.1, 50.0))
def test_soft_is_never_negative_and_zero_when_identical(seed, temperature, scale):
    student, teacher = logits(seed, scale=scale), logits(seed + 1, scale=scale)
    assert soft(student, teacher, temperature).item() >= -1e-4
    assert soft(student, student + 5, temperature).item() == pytest.approx(0, abs=1e-3)


def test_half_precision_is_computed_in_float32():
    student, teacher = logits(0).bfloat16(), logits(1).bfloat16()
    assert hard(student, teacher).dtype == soft(student, teacher, 3.0).dtype == torch.float32
    torch.testing.assert_close(soft(student, teacher, 3.0), soft(student.float(), teacher.float(), 3.0), rtol=0, atol=0)
    assert torch.isfinite(soft(student * 100, teacher * 100, 1.0))


class Teacher(nn.Module):
    """Gives the same logits whatever the image, in timm's interface."""

    def __init__(self, answer):
        super().__init__()
        self.answer = nn.Parameter(answer)
        self.num_classes = answer.shape[1]
        self.pretrained_cfg = {"mean": (0.5,) * 3, "std": (0.5,) * 3, "num_classes": answer.shape[1]}
        self.num_features = 1

    def forward(self, x):
        return self.answer


@pytest.mark.parametrize("kind", ["soft", "hard"])
def test_the_whole_loss_equals_timms_token_distillation_task(kind):
    model = timm.create_model(
        "deit_tiny_distilled_patch16_224", img_size=32, embed_dim=24, depth=1, num_heads=2, num_classes=10
    )
    teacher = logits(5, batch=4)
    images, labels = torch.randn(4, 3, 32, 32), torch.tensor([1, 5, 0, 9])
    task = TokenDistillationTask(
        model, Teacher(teacher), criterion=nn.CrossEntropyLoss(label_smoothing=0.1),
        distill_type=kind, distill_loss_weight=0.7, task_loss_weight=0.3, temperature=2.0, verbose=False,
    ).train()  # fmt: skip
    expected = task(images, labels)["loss"]
    heads = dict(zip(("cls", "dist"), model.train()(images), strict=True))
    section = {"method": kind, "weight": 0.7} | ({"temperature": 2.0} if kind == "soft" else {})
    loss, parts = loss_of(heads, F.one_hot(labels, 10).float(), teacher, section, label_weight=0.3, label_smoothing=0.1)
    torch.testing.assert_close(loss, expected)
    assert set(parts) == {"label", kind}


def mixed_targets():
    targets = F.one_hot(torch.tensor([1, 5, 0, 9, 3, 3]), 10).float()
    return 0.7 * targets + 0.3 * targets.flip(0)


def label_loss(student, targets, smoothing):
    targets = targets.double() * (1 - smoothing) + smoothing / targets.shape[1]
    return -(targets * F.log_softmax(student.double(), -1)).sum(-1).mean()


@pytest.mark.parametrize("two_heads", [True, False])
def test_the_parts_recombine_and_fall_on_their_heads(two_heads):
    heads = {"cls": logits(0).requires_grad_()}
    if two_heads:
        heads["dist"] = logits(1).requires_grad_()
    teacher, targets = logits(2), mixed_targets()
    sections = {"method": "hard", "weight": 0.3}, {"method": "soft", "weight": 0.9, "temperature": 4.0}
    loss, parts = loss_of(heads, targets, teacher, *sections, label_weight=0.25, label_smoothing=0.1)
    learner = heads["dist" if two_heads else "cls"]
    expected = {
        "label": label_loss(heads["cls"], targets, 0.1),
        "hard": hard(learner, teacher),
        "soft": soft(learner, teacher, 4.0),
    }
    weights = {"label": 0.25, "hard": 0.3, "soft": 0.9}
    assert all(part.requires_grad for part in parts.values()), "gradient shares are measured on them"
    for name, value in expected.items():
        assert parts[name].item() == pytest.approx(value.item(), rel=1e-6)
    assert loss.item() == pytest.approx(sum(weights[name] * part.item() for name, part in parts.items()), rel=1e-6)
    loss.backward()
    if two_heads:
        by_label = torch.autograd.grad(0.25 * label_loss(heads["cls"], targets, 0.1), heads["cls"])[0]
        torch.testing.assert_close(heads["cls"].grad, by_label)
        assert heads["dist"].grad.abs().sum() > 0


def test_without_methods_both_heads_learn_the_labels():
    heads, targets = {"cls": logits(0), "dist": logits(1)}, mixed_targets()
    loss, parts = loss_of(heads, targets, None, label_weight=2.0, label_smoothing=0.0)
    expected = (label_loss(heads["cls"], targets, 0.0) + label_loss(heads["dist"], targets, 0.0)) / 2
    assert parts["label"].item() == pytest.approx(expected.item(), rel=1e-6)
    assert loss.item() == pytest.approx(2 * expected.item(), rel=1e-6)
    assert set(parts) == {"label"}
    single, _ = loss_of({"cls": heads["cls"]}, targets, None, label_weight=1.0, label_smoothing=0.0)
    assert single.item() == pytest.approx(label_loss(heads["cls"], targets, 0.0).item(), rel=1e-6)


def test_both_heads_learn_the_labels_once_the_teacher_has_ended():
    heads = {name: logits(seed).requires_grad_() for seed, name in enumerate(("cls", "dist"))}
    targets = F.one_hot(torch.arange(6) % 10, 10).float()
    (section,) = from_mapping({"distill": [{"method": "soft"}], "teacher": {"model": "resnet18"}}).distill
    methods = build_methods([section], Shapes(num_classes=10))
    ended = task_of(methods, heads, {}, Features({"cls": logits(3)}, {}), weights={"label": 0.7})
    alone = task_of({}, heads, {}, None, weights={"label": 0.7})
    total = losses_of(ended, targets).total
    assert total.item() == pytest.approx(losses_of(alone, targets).total.item())
    assert all(gradient.abs().sum() > 0 for gradient in torch.autograd.grad(total, [*heads.values()]))
