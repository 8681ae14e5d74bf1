"""Fidelity, calibration and classes against brute force in float64, image by image."""

from __future__ import annotations

import math

import numpy as np
import pytest

from distill.report.sections.calibration import BINS, calibration, fit_temperature, reliability
from distill.report.sections.classes import accuracy_by_class, confusion, most_confused
from distill.report.sections.fidelity import fidelity, inheritance

N, K = 300, 7


def drawn(seed: int, scale: float = 2.0) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, K, N)
    logits = scale * generator.normal(size=(N, K))
    logits[np.arange(N), labels] += scale
    return logits.astype(np.float32), labels


def softmax(row: np.ndarray) -> list[float]:
    powers = [math.exp(float(value)) for value in row]
    return [power / math.fsum(powers) for power in powers]


def test_fidelity_counts_every_image_once() -> None:
    (teacher, labels), (student, _) = drawn(0), drawn(1)
    found = fidelity(student, teacher, labels)
    says, right = student.argmax(1), teacher.argmax(1)
    pairs = list(zip(says, right, labels, strict=True))
    assert found.same_mistakes == sum(s == t != y for s, t, y in pairs)
    assert found.corrected == sum(s == y != t for s, t, y in pairs)
    assert found.other_mistakes == sum(s != t and t != y and s != y for s, t, y in pairs)
    assert found.spoiled == sum(t == y != s for s, t, y in pairs)
    assert found.agreement == pytest.approx(100 * np.mean(says == right))
    kl = [
        math.fsum(p * math.log(p / q) for p, q in zip(softmax(a), softmax(b), strict=True))
        for a, b in zip(teacher, student, strict=True)
    ]
    assert found.kl == pytest.approx(math.fsum(kl) / N, rel=1e-9)
    same = fidelity(teacher, teacher, labels)
    assert (same.agreement, same.kl, same.corrected, same.spoiled) == (100.0, 0.0, 0, 0)


def test_impossible_classes_do_not_break_the_divergence() -> None:
    teacher, labels = drawn(0)
    teacher[:, 3] = -np.inf
    student = teacher.copy()
    assert fidelity(student, teacher, labels).kl == 0
    student[0, :] = -np.inf
    student[0, 3] = 0.0
    assert fidelity(student, teacher, labels).kl == math.inf


def test_the_divergence_of_logits_far_apart_is_finite() -> None:
    far, labels = np.array([[0.0, 1000.0]], np.float32), np.array([1])
    assert fidelity(far, far[:, ::-1], labels).kl == pytest.approx(1000.0)


def test_the_two_by_two_holds_the_mistakes_of_the_teacher() -> None:
    (teacher, labels), (student, _), (control, _) = drawn(0), drawn(1), drawn(2)
    for table in inheritance(student, control, teacher, labels):
        wrong = int((teacher.argmax(1) != labels).sum())
        assert table.both + table.student_only + table.control_only + table.neither == wrong
    made, corrected = inheritance(student, control, teacher, labels)
    assert made.both + made.student_only == fidelity(student, teacher, labels).same_mistakes
    assert made.both + made.control_only == fidelity(control, teacher, labels).same_mistakes
    assert corrected.both + corrected.control_only == fidelity(control, teacher, labels).corrected
    assert inheritance(student, control, 99.0 * np.eye(K)[labels], labels) == []


def test_the_calibration_error_is_that_of_the_definition() -> None:
    logits, labels = drawn(3)
    bins: dict[int, list[tuple[float, bool]]] = {}
    for row, label in zip(logits, labels, strict=True):
        probabilities = softmax(row)
        confidence = max(probabilities)
        place = next(k for k in range(BINS) if confidence <= (k + 1) / BINS or k == BINS - 1)
        bins.setdefault(place, []).append((confidence, probabilities.index(confidence) == label))
    error = sum(abs(math.fsum(c for c, _ in each) - sum(r for _, r in each)) for each in bins.values())
    found, ece = reliability(logits, labels)
    assert ece == pytest.approx(100 * error / N, rel=1e-9)
    assert [each.samples for each in found] == [len(bins[place]) for place in sorted(bins)]
    assert sum(each.samples * each.accuracy for each in found) == pytest.approx((logits.argmax(1) == labels).sum())


@pytest.mark.parametrize("temperature", [0.3, 1.0, 4.0])
def test_the_temperature_is_found(temperature: float) -> None:
    """Labels drawn from a model's own probabilities: at its temperature it is calibrated."""
    generator = np.random.default_rng(5)
    logits = 2 * generator.normal(size=(20_000, K))
    noise = generator.gumbel(size=logits.shape)
    labels = (logits + noise).argmax(1)
    assert fit_temperature(logits * temperature, labels) == pytest.approx(temperature, rel=0.05)
    found = calibration(logits * temperature, labels, (logits * temperature, labels))
    assert found.ece_fitted is not None
    assert found.ece_fitted < 1.5
    assert calibration(logits, labels).temperature is None


def test_confusion_counts_labels_by_answers() -> None:
    logits, labels = drawn(4)
    labels[labels == 6] = 5  # a class without images
    matrix = confusion(logits, labels)
    assert matrix.shape == (K, K)
    for label, answer in np.ndindex(K, K):
        assert matrix[label, answer] == ((labels == label) & (logits.argmax(1) == answer)).sum()
    accuracy = accuracy_by_class(matrix, labels)
    assert accuracy[6] is None
    assert accuracy[0] == pytest.approx(100 * (logits.argmax(1) == labels)[labels == 0].mean())
    pairs = most_confused(matrix, 5)
    counts = sorted((int(matrix[i, j]) for i, j in np.ndindex(K, K) if i != j), reverse=True)
    assert [pair.images for pair in pairs] == counts[:5]
    assert all(matrix[pair.label, pair.taken_for] == pair.images for pair in pairs)
    assert most_confused(np.diag([3, 4]), 5) == []


def test_rows_that_are_no_numbers_count_as_wrong_in_every_figure() -> None:
    """Here argmax would find the label, since that is where the first NaN stands."""
    logits, labels = drawn(5)
    other, _ = drawn(6)
    lost = np.arange(N) < 40
    logits[lost, labels[lost]] = np.nan
    uniform = np.where(lost[:, None], 0.0, logits).astype(np.float32)

    says = np.where(lost, -1, logits.argmax(1))
    bins, ece = reliability(logits, labels)
    confidence = np.array([max(softmax(row)) for row in uniform])
    gaps = [(confidence[inside] - (says == labels)[inside]).sum() for inside in _bins(confidence)]
    assert ece == pytest.approx(100 * sum(map(abs, gaps)) / N)
    assert sum(each.samples for each in bins) == N
    assert fit_temperature(logits, labels) == pytest.approx(fit_temperature(uniform, labels), rel=1e-6)

    accuracy = accuracy_by_class(confusion(logits, labels), labels)
    assert accuracy == [pytest.approx(100 * (says == labels)[labels == label].mean()) for label in range(K)]
    assert confusion(logits, labels).sum() == N - 40

    found, mirror = fidelity(logits, other, labels), fidelity(other, logits, labels)
    assert found.agreement == mirror.agreement == pytest.approx(100 * np.mean(says == other.argmax(1)))
    assert mirror.teacher_wrong == (says != labels).sum()
    assert found.kl == pytest.approx(fidelity(uniform, other, labels).kl)
    assert fidelity(logits, logits, labels).agreement == pytest.approx(100 * (N - 40) / N)


def _bins(confidence: np.ndarray) -> list[np.ndarray]:
    return [(confidence > index / BINS) & (confidence <= (index + 1) / BINS) for index in range(BINS)]
