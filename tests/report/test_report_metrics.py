"""Figures against plain Python loops, scikit-learn and torch; ties and damaged files."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from sklearn.metrics import log_loss, recall_score, top_k_accuracy_score

from distill.errors import InputError
from distill.report.metrics import decisions, measure, read_predictions


def brute_force(logits: np.ndarray, labels: np.ndarray, k: int) -> tuple[int, int, float]:
    """Counts and mean NLL by loops over Python floats: classes sorted by logit, the lower index first among equals."""
    top1 = topk = 0
    nll = 0.0
    for row, label in zip(logits.tolist(), labels.tolist(), strict=True):
        order = sorted(range(len(row)), key=lambda index: (-row[index], index))
        top1 += order[0] == label
        topk += label in order[:k]
        largest = max(row)
        nll -= math.log(math.exp(row[label] - largest) / math.fsum(math.exp(value - largest) for value in row))
    return top1, topk, nll / len(labels)


@pytest.mark.parametrize("classes", [2, 3, 5, 10, 100])
def test_figures_equal_loops_and_libraries(classes: int) -> None:
    draw = np.random.default_rng(classes)
    logits = (3 * draw.normal(size=(500, classes))).astype(np.float32)
    labels = draw.integers(0, classes, 500)
    labels[:classes] = np.arange(classes)
    found = measure(logits, labels)
    k = min(5, classes)
    top1, topk, nll = brute_force(logits, labels, k)
    assert (found.samples, found.k, found.top1_correct, found.topk_correct) == (500, k, top1, topk)
    assert found.nll == pytest.approx(nll, rel=1e-12)
    assert found.top1 == 100 * top1 / 500
    assert found.topk == 100 * topk / 500
    if classes > k:
        assert topk == top_k_accuracy_score(labels, logits, k=k, normalize=False, labels=np.arange(classes))
    probabilities = torch.from_numpy(logits).double().softmax(1).numpy()
    assert found.nll == pytest.approx(log_loss(labels, probabilities, labels=np.arange(classes)), rel=1e-9)
    assert top1 == int((torch.from_numpy(logits).argmax(1) == torch.from_numpy(labels)).sum())


def test_averages_over_classes_are_those_of_scikit_learn() -> None:
    draw = np.random.default_rng(1)
    labels = draw.choice(6, 400, p=[0.6, 0.2, 0.1, 0.06, 0.04, 0.0])  # a class without images has no accuracy
    logits = draw.normal(size=(400, 6)).astype(np.float32)
    logits[np.arange(400), labels] += 1.5 * (labels < 3)
    found, answers = measure(logits, labels), logits.argmax(1)
    by_class = recall_score(labels, answers, labels=np.arange(5), average=None)
    assert found.macro == pytest.approx(100 * by_class.mean(), rel=1e-12)
    assert found.worst_class == pytest.approx(100 * by_class.min(), rel=1e-12)
    logits[labels == 3] = np.nan
    assert measure(logits, labels).worst_class == 0.0


def test_equal_logits_rank_by_class_index() -> None:
    draw = np.random.default_rng(0)
    logits = draw.integers(0, 3, (400, 8)).astype(np.float32)  # three values for eight classes: ties everywhere
    labels = draw.integers(0, 8, 400)
    found = measure(logits, labels)
    assert (found.top1_correct, found.topk_correct) == brute_force(logits, labels, 5)[:2]
    constant = measure(np.zeros((16, 8), np.float32), np.arange(16) % 8)
    assert (constant.top1_correct, constant.topk_correct) == (2, 10)
    assert constant.nll == pytest.approx(math.log(8), rel=1e-12)


def test_agreement_counts_equal_decisions_right_or_wrong() -> None:
    student = np.eye(4, dtype=np.float32)[[0, 1, 2, 3]]
    teacher = np.eye(4, dtype=np.float32)[[0, 1, 3, 3]]
    found = measure(student, np.array([0, 2, 2, 0]), teacher)
    assert (found.agreements, found.agreement) == (3, 75.0)
    assert measure(student, np.array([0, 2, 2, 0])).agreement is None


def test_nll_is_exact_where_float32_is_not() -> None:
    found = measure(np.array([[1e4, 0.0], [0.0, -1e4]], np.float32), np.array([1, 0]))
    assert found.nll == 5e3
    assert measure(np.array([[0.0, -np.inf]], np.float32), np.array([1])).nll == math.inf


@pytest.mark.parametrize("row", [[np.nan] * 3, [0, np.nan, 5], [0, 9, np.inf], [-np.inf] * 3])
def test_a_row_that_is_no_numbers_is_wrong_and_agrees_with_nothing(row: list[float]) -> None:
    """argmax takes the first NaN for the largest, which may be at the label."""
    logits = np.array([[5, 0, 0], row, [0, -np.inf, 5]], np.float32)  # an impossible class is an answer
    for label in range(3):
        found = measure(logits, np.array([0, label, 2]), logits)
        assert (found.top1_correct, found.topk_correct, found.agreements) == (2, 2, 2)
        kept = [math.log(math.exp(5) / (math.exp(5) + others)) for others in (2, 1)]
        assert found.nll == pytest.approx((math.log(3) - sum(kept)) / 3)
    assert decisions(logits).tolist() == [0, -1, 2]


def write(path: Path, **changes: np.ndarray | None) -> Path:
    tensors = {"labels": np.array([0, 1, 2]), "student.fused": np.eye(3, dtype=np.float32)}
    tensors |= {key.replace("__", "."): value for key, value in changes.items() if value is not None}
    save_file({key: value for key, value in tensors.items() if changes.get(key, value) is not None}, path)
    return path


def test_optional_outputs_are_optional(tmp_path: Path) -> None:
    assert set(read_predictions(write(tmp_path / "p.safetensors")).logits) == {"student.fused"}
    both = read_predictions(write(tmp_path / "q.safetensors", teacher=np.ones((3, 3), np.float32)))
    assert set(both.logits) == {"student.fused", "teacher"}


BAD = {
    "holds no labels": {"labels": None},
    "labels must be": {"labels": np.zeros(3, np.float32)},
    "labels run from 0 to 3": {"labels": np.array([0, 1, 3])},
    "labels run from -1": {"labels": np.array([0, 1, -1])},
    "teacher has shape [3, 4]": {"teacher": np.zeros((3, 4), np.float32)},
    "student.fused has shape [2, 3]": {"student__fused": np.zeros((2, 3), np.float32)},
}


@pytest.mark.parametrize("message", BAD)
def test_damaged_predictions_are_refused_by_name(tmp_path: Path, message: str) -> None:
    path = write(tmp_path / "predictions.safetensors", **BAD[message])
    with pytest.raises(InputError) as caught:
        read_predictions(path)
    assert message in str(caught.value)
    assert str(path) in str(caught.value)


def test_truncated_and_absent_files_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "predictions.safetensors")
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(InputError, match="cannot be read"):
        read_predictions(path)
    with pytest.raises(InputError, match="no such file"):
        read_predictions(tmp_path / "absent.safetensors")
