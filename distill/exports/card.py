"""The model card: an export's README.md, with Hugging Face's front matter, from the files of its run."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from distill import run
from distill.errors import InputError
from distill.files.text import markdown
from distill.recipe import Data
from distill.report.metrics import Metrics, measure, read_predictions
from distill.students import Student
from distill.students.saved import read_export

HEADS = {"fused": "both heads", "cls": "class head", "dist": "distillation head"}
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
NOT_ORIGIN = ("format", "accuracy", "head", "dtype")
"""In the metadata of weights: what is true of one export only."""


class Result(NamedTuple):
    """A line of the table of results."""

    model: str
    """'teacher', 'student' or 'control'."""
    head: str | None
    """Of `HEADS`; None where the model has one only."""
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

    @property
    def metadata(self) -> dict[str, str]:
        """For the weights: their origin, and what is known of them now."""
        known = {} if self.own is None else {"accuracy": f"{self.own.top1:.2f}"}
        return {**self.origin, **known, "head": self.head, "dtype": "float16" if self.half else "float32"}

    @property
    def own(self) -> Metrics | None:
        """The figures of what the student answers; None where it has not been measured."""
        found = (line for line in self.results if line.model == "student" and line.head in (self.head, None))
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
    counts = run.read_status(path).get("parameters") or {}
    measured = {name: measure(logits, predictions.labels) for name, logits in predictions.logits.items()}
    teacher = [Result("teacher", None, measured["teacher"], counts.get("teacher"))] if "teacher" in measured else []
    if "student.dist" not in measured:
        return [*teacher, Result(model, None, measured["student.fused"], counts.get("student"))]
    return [*teacher, *(Result(model, head, measured[f"student.{head}"], counts.get("student")) for head in HEADS)]


def render(card: Card, student: Student) -> str:
    """README.md."""
    sections = [
        _front_matter(card),
        f"# {markdown(card.name)}\n\n{_summary(card, student)}",
        _results(card),
        _use(card),
        _loading(card, student),
        _origin(card),
    ]
    return "\n\n".join(filter(None, sections)) + "\n"


def _front_matter(card: Card) -> str:
    distilled = "teacher" in card.origin
    content: dict[str, Any] = {
        "library_name": "timm",
        "pipeline_tag": "image-classification",
        "license": card.license,
        "datasets": [_hub_name(card.data)],
        "metrics": ["accuracy"],
        "tags": ["image-classification", "timm", *(["knowledge-distillation"] if distilled else [])],
    }
    if (own := card.own) is not None:
        result = {
            "task": {"type": "image-classification"},
            "dataset": {"name": card.data, "type": _hub_name(card.data), "split": "test"},
            "metrics": [{"type": "accuracy", "value": round(own.top1_correct / own.samples, 6)}],
        }
        content["model-index"] = [{"name": card.name, "results": [result]}]
    return f"---\n{yaml.safe_dump(content, sort_keys=False, allow_unicode=True)}---"


def _hub_name(data: str) -> str:
    """The Hub's name of the data; of data that it does not know, theirs in letters that it takes."""
    known = HUB_NAMES.get(data, data.partition("/")[2] if data.startswith(("hfds/", "hfids/")) else data)
    return re.sub(r"[^\w./-]+|\.{2,}|--+", "-", known, flags=re.ASCII).strip("-./") or "other"


def _summary(card: Card, student: Student) -> str:
    parameters = sum(parameter.numel() for parameter in student.model.parameters())
    contract = student.adapter.contract
    answer = {"cls": "its class head alone", "dist": "its distillation head alone"}.get(
        card.head, "the mean of its two heads" if len(student.heads) > 1 else "its one head"
    )
    teacher = card.origin.get("teacher")
    origin = f"distilled from {markdown(teacher)}" if teacher else "trained without a teacher"
    return (
        f"An image classifier of {parameters:,} parameters, {origin}: timm's architecture "
        f"`{student.architecture}`, for {len(card.class_names)} classes and images of "
        f"{contract.size} x {contract.size} pixels. It answers with {answer}."
    )


def _results(card: Card) -> str:
    if not card.results:
        return ""
    k = card.results[0].metrics.k
    lines = [f"| model | top-1 % | top-{k} % | NLL | parameters |", "| :--- | ---: | ---: | ---: | ---: |"]
    for model, head, metrics, parameters in card.results:
        label = model if head is None else f"{model}, {HEADS[head]}"
        count = "" if parameters is None else f"{parameters:,}"
        lines.append(f"| {label} | {metrics.top1:.2f} | {metrics.topk:.2f} | {metrics.nll:.4f} | {count} |")
    notes = [f"{card.results[0].metrics.samples:,} test images of {markdown(card.data)}, in float32."]
    if any(line.model == "control" for line in card.results):
        notes.append("The control is the same student, trained on the same batches without the teacher.")
    return "## Results\n\n" + "\n".join(lines) + "\n\n" + " ".join(notes)


def _use(card: Card) -> str:
    names = ", ".join(markdown(name) for name in card.class_names[:MOST_LABELS])
    rest = len(card.class_names) - MOST_LABELS
    return (
        "## Intended use\n\n"
        f"It tells images like those of {markdown(card.data)} apart, into these classes: {names}"
        f"{f' and {rest:,} more, all of them in `config.json`' if rest > 0 else ''}. Only what is measured above "
        "is known of it. An image of anything else gets one of these classes all the same, and the probabilities are "
        "not calibrated: measure it on images of your own before you rely on it, and do not let it decide about "
        "people.\n\n"
        f"License: {_license(card)}"
    )


def _license(card: Card) -> str:
    if card.license == "unknown":
        return "not stated; whoever trained it has the say, as far as the licences of its data and its teacher allow."
    return f"{markdown(card.license)}."


def _loading(card: Card, student: Student) -> str:
    stock = type(student.model).__module__.startswith("timm.") and "stem" not in student.model_args
    registers = "" if stock else "import distill.students  # registers the architecture\n"
    contract = markdown(str(student.adapter.contract))
    text = f"""## Load it

With the project that made it, transform and class names included:

```python
import distill
from PIL import Image

student = distill.load_student("PATH/OF/THIS/FOLDER")
logits = student.model(student.transform(Image.open("image.png"))[None])
print(student.labels[logits.argmax()])
```

or, on the command line, `distill predict PATH/OF/THIS/FOLDER image.png`. With timm:

```python
{registers}import timm

model = timm.create_model("local-dir:PATH/OF/THIS/FOLDER", pretrained=True).eval()
```

It takes {contract} (of images in [0, 1])."""
    if card.half:
        text += " The weights are stored as float16; timm computes with them in float32."
    if card.onnx:
        text += (
            "\n\n`model.onnx` needs neither: its input `images` is float32 [batch, channels, height, width] in [0, 1], "
            "not normalised, of exactly that size; its output `logits` is float32 [batch, classes]."
        )
    return (
        text
        + "\n\nTo share it, `hf upload YOUR_NAME/THIS_MODEL PATH/OF/THIS/FOLDER` puts the folder on the Hugging Face "
        'Hub; then `timm.create_model("hf_hub:YOUR_NAME/THIS_MODEL", pretrained=True)` loads it from there'
        f"{'' if stock else ', after the same import'}."
    )


def _origin(card: Card) -> str:
    lines = "\n".join(f"- {markdown(key)}: {markdown(value)}" for key, value in sorted(card.origin.items()))
    return f"## How it was made\n\n{lines}"


def check_license(text: str) -> str:
    """A licence's identifier, as the Hub writes them.

    Raises:
        InputError: it is none.
    """
    if not re.fullmatch(r"[a-z0-9][a-z0-9.-]*", text):
        raise InputError(f"--license {text}: give an identifier of the Hugging Face Hub's, such as apache-2.0 or mit.")
    return text
