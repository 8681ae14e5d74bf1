"""Behind `distill export`: a run's student once more, as somebody needs it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from distill import run
from distill.console import say
from distill.data import Dataset, at_hand, open_dataset
from distill.errors import InputError
from distill.evaluation import SMALLEST_BATCH
from distill.exports.card import card_of_run, check_license, render
from distill.exports.folder import Differs, load_export, write_export
from distill.exports.int8 import Int8, add_int8, record_of
from distill.exports.onnx_file import ONNX_FILE, check_installed, compare_logits, onnx_logits
from distill.files.text import write_text
from distill.report.metrics import measure
from distill.report.runs import INT8
from distill.students import Student, one_head

MOST_COMPARED = 10_000
"""Test images; the more there are, the longer the export takes."""


def export_run(
    path: Path,
    to: Path,
    *,
    onnx: bool,
    half: bool,
    head: Literal["fused", "cls", "dist"],
    license: str,
    int8: Int8 | None = None,
) -> None:
    """Write the student of a run as a timm folder at `to`, and print what became of its logits where they changed.

    Raises:
        InputError: the run has no export, something stands at `to`, it cannot be written, what was asked for is not to
        be had, or what was written is not the student. Nothing is left at `to`.
    """
    if os.path.lexists(to):
        raise InputError(f"--to {to}: exists already. Choose another folder.")
    if int8 is not None and not 0 <= int8.max_drop <= 100:
        raise InputError(f"--max-drop {int8.max_drop:g}: from 0 to 100 points.")
    onnx = onnx or int8 is not None
    if onnx:
        check_installed()
    student, class_names = load_export(path / "export")
    recorded: list[dict[str, Any]] = []
    card = replace(card_of_run(path, class_names), head=head, license=check_license(license), half=half, onnx=onnx)
    if int8 is not None and not student.heads:
        raise InputError("--int8: without a classifier nothing tells what int8 loses. Use --onnx.")
    if head != "fused":
        student = one_head(student, head)

    def inspect(folder: Path) -> None:
        if not (half or onnx):
            return
        dataset = _test_set(path)
        _compare_on_test_set(student, folder, dataset)
        if int8 is None:
            return
        if dataset is None:
            raise InputError("--int8: what it loses is measured on the run's data, and they are not at hand.")
        cost = add_int8(load_export(folder)[0], folder, dataset, int8, run.read_recipe(path).seed)
        say(f"int8: {cost.words}.")
        recorded.append(record_of(cost, data=dataset.info.digest, head=head, kept=int8.keep_float))
        write_text(folder / "README.md", render(replace(card, int8=cost), student))

    try:
        write_export(
            student,
            to,
            class_names=class_names,
            metadata=card.metadata,
            readme=render(card, student),
            half=half,
            onnx=onnx,
            inspect=inspect,
        )
    except OSError as error:
        raise InputError(f"--to {to}: cannot be written ({error.strerror or error}).") from None
    except Differs as error:
        raise InputError(f"--to {to}: not written: {error}.") from error
    for values in recorded:
        try:
            write_text(path / INT8, json.dumps(values, indent=1) + "\n")
        except OSError as error:
            say(f"{path / INT8}: cannot be written ({error.strerror or error}); reports on the run have no row of it.")


def _test_set(path: Path) -> Dataset | None:
    """The data of the run at `path`, unless they would have to be downloaded, or are others now."""
    recipe = run.read_recipe(path)
    try:
        if not at_hand(recipe.data):
            return None
        dataset = open_dataset(recipe.data, seed=recipe.seed, device=torch.device("cpu"), unlabelled=False)
    except InputError:
        return None
    return dataset if dataset.info.digest == run.read_status(path).get("data_digest") else None


def _answer(student: Student, images: Tensor) -> Tensor:
    """What its model answers: logits [B, classes], or features [B, D] without a classifier."""
    return student(images).fused if student.heads else student.embedding(images)


@torch.inference_mode()
def _compare_on_test_set(student: Student, folder: Path, dataset: Dataset | None) -> None:
    """Compare an export with the student it was made of, and its ONNX file with itself.

    Raises:
        Differs: the ONNX file is another model.
    """
    if dataset is None:
        say("The run's data are not at hand: compared on random images only.")
        return
    exported, _ = load_export(folder)
    what = "logits" if student.heads else "features"
    before: list[Tensor] = []
    after: list[Tensor] = []

    def answered() -> Iterator[Tensor]:
        for images, _ in dataset.evaluation_batches("test", 0, MOST_COMPARED, SMALLEST_BATCH):
            before.append(_answer(student, images))
            after.append(_answer(exported, images))
            yield exported.adapter.fit(images)

    has_onnx = (folder / ONNX_FILE).exists()
    by_onnx = onnx_logits(folder / ONNX_FILE, answered()) if has_onnx else list(answered())
    expected, logits, labels = torch.cat(before), torch.cat(after), dataset.labels("test")[:MOST_COMPARED]
    if isinstance(by_onnx, Tensor):
        compared = compare_logits(by_onnx, logits)
        if compared.problem is not None:
            raise Differs(f"the ONNX file is another model than the student: {compared.problem}")
        say(f"ONNX: {what} within {compared.difference:.2g} of torch's on {len(logits):,} test images.")
    changed = compare_logits(logits, expected)
    if changed.difference and not student.heads:
        say(f"float16: features within {changed.difference:.2g} of float32's on {len(logits):,} test images.")
    elif changed.difference:
        right = [measure(answer.numpy(), labels.numpy()).top1 for answer in (expected, logits)]
        say(
            f"float16: logits within {changed.difference:.2g} of float32's on {len(logits):,} test images, top-1 "
            f"{right[1]:.2f} % instead of {right[0]:.2f} %."
        )
