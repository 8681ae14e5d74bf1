"""The model card: an export's README.md, with Hugging Face's front matter, from the files of its run."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from distill import run
from distill.errors import InputError
from distill.files.text import markdown
from distill.recipe import Data
from distill.report.metrics import Metrics, measure, read_predictions
from distill.students import Student
from distill.students.saved import read_export

HEADS = {"fused": "both heads", "cls": "class head", "dist": "distillation head", "knn": "k-NN"}
HUB_NAMES = {
    "cifar10": "uoft-cs/cifar10",
    "cifar100": "uoft-cs/cifar100",
    "mnist": "ylecun/mnist",
    "fashion_mnist": "zalando-datasets/fashion_mnist",
    "svhn": "ufldl-stanford/svhn",
    "imagenet": "ILSVRC/imagenet-1k",
}
"""What the Hugging Face Hub calls the data that recipes name."""
MOST_LABELS = 20
NOT_ORIGIN = ("format", "accuracy", "knn_accuracy", "head", "dtype")
"""In the metadata of weights: what is true of one export only."""


class Result(NamedTuple):
    """A line of the table of results."""

    model: str
    """'teacher', 'student' or 'control'."""
    head: str | None
    """Of `HEADS`; None where the model has one only, 'knn' where it has none."""
    metrics: Metrics
    parameters: int | None


@dataclass(frozen=True)
class Card:
    """What is told of a student beside itself."""

    name: str
    data: str
    """The recipe's `data.name`."""
    class_names: Sequence[str]
    origin: Mapping[str, str]
    """Where it comes from: what goes into the metadata of its weights."""
    results: Sequence[Result] = ()
    head: str = "fused"
    """'fused' (both heads, or the only one there is), 'cls' or 'dist': what the student answers with."""
    license: str = "unknown"
    half: bool = False
    onnx: bool = False
    int8: Any = None
    """What its int8 file costs, an `int8.Cost`."""

    @property
    def metadata(self) -> dict[str, str]:
        """For the weights: their origin, and what is known of them now."""
        name = "accuracy" if self.class_names else "knn_accuracy"
        known = {} if self.own is None else {name: f"{self.own.top1:.2f}"}
        return {**self.origin, **known, "head": self.head, "dtype": "float16" if self.half else "float32"}

    @property
    def own(self) -> Metrics | None:
        """The figures of what the student answers; None where it has not been measured."""
        whole = (self.head, None, "knn")
        found = (line for line in self.results if line.model == "student" and line.head in whole)
        return next((line.metrics for line in found), None)


def card_of_run(path: Path, class_names: Sequence[str]) -> Card:
    """Of the run at `path` and its export, as far as the run has come.

    Raises:
        InputError: a file is missing or damaged.
    """
    recipe = run.read_recipe(path)
    metadata = read_export(path / "export").metadata
    origin = {key: value for key, value in metadata.items() if key not in NOT_ORIGIN and not key.startswith("sha256/")}
    return Card(recipe.name, data_name(recipe.data), class_names, origin, results_of(path))


def data_name(spec: Data) -> str:
    """What people call the data of a recipe."""
    if spec.name.endswith(".csv"):
        return Path(spec.name).stem
    return Path(spec.root).resolve().name if spec.name == "folder" else spec.name.removesuffix(".safetensors")


def results_of(path: Path) -> list[Result]:
    """Teacher, student by head, and the control once it is finished, from the files of the run at `path`; nothing
    before its test set was read.

    Raises:
        InputError: they are damaged.
    """
    results = _measured(path, "student") if (path / "predictions.safetensors").exists() else []
    return results + (_measured(path / "control", "control") if run.is_finished(path / "control") else [])


def _measured(path: Path, model: str) -> list[Result]:
    predictions = read_predictions(path / "predictions.safetensors")
    counts, results = run.read_status(path).get("parameters") or {}, []
    if (teacher := predictions.logits.get("teacher")) is not None:
        results.append(Result("teacher", None, measure(teacher, predictions.labels), counts.get("teacher")))
    for head, _, logits in predictions.heads:
        results.append(Result(model, head, measure(logits, predictions.labels), counts.get("student")))
    return results


def render(card: Card, student: Student) -> str:
    """README.md."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["markdown"] = markdown
    text = environment.get_template("card.md.j2").render(
        card=card,
        student=student,
        contract=student.adapter.contract,
        front_matter=yaml.safe_dump(_front_matter(card), sort_keys=False, allow_unicode=True),
        heads=HEADS,
        most=MOST_LABELS,
        parameters=sum(parameter.numel() for parameter in student.model.parameters()),
        # Whether timm alone knows the architecture.
        stock=type(student.model).__module__.startswith("timm.") and "stem" not in student.model_args,
        teacher=card.origin.get("teacher"),
        teacher_license=card.origin.get("teacher_license", "unknown"),
    )
    return text.rstrip() + "\n"


def _front_matter(card: Card) -> dict[str, Any]:
    distilled = "teacher" in card.origin
    models = list(dict.fromkeys(filter(None, card.origin.get("base_model", "").split(", "))))
    task = "image-classification" if card.class_names else "image-feature-extraction"
    content: dict[str, Any] = {
        "library_name": "timm",
        "pipeline_tag": task,
        "license": card.license,
        **({"base_model": models if len(models) > 1 else models[0]} if models else {}),
        "datasets": [_hub_name(card.data)],
        "metrics": ["accuracy"],
        "tags": [task, "timm", *(["knowledge-distillation"] if distilled else [])],
    }
    if (own := card.own) is not None and card.class_names:
        result = {
            "task": {"type": "image-classification"},
            "dataset": {"name": card.data, "type": _hub_name(card.data), "split": "test"},
            "metrics": [{"type": "accuracy", "value": round(own.top1_correct / own.samples, 6)}],
        }
        content["model-index"] = [{"name": card.name, "results": [result]}]
    return content


def _hub_name(data: str) -> str:
    """The Hub's name of the data; of data that it does not know, theirs in letters that it takes."""
    known = HUB_NAMES.get(data, data.partition("/")[2] if data.startswith(("hfds/", "hfids/")) else data)
    return re.sub(r"[^\w./-]+|\.{2,}|--+", "-", known, flags=re.ASCII).strip("-./") or "other"


def check_license(text: str) -> str:
    """A licence's identifier, as the Hub writes them.

    Raises:
        InputError: it is none.
    """
    if not re.fullmatch(r"[a-z0-9][a-z0-9.-]*", text):
        raise InputError(f"--license {text}: give an identifier of the Hugging Face Hub's, such as apache-2.0 or mit.")
    return text
