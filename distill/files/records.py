"""What the files that a run or an export consists of may hold: one model for each, checked when it is read.

They may come from anybody, with checksums that fit. Only what some reader relies on is listed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from distill.errors import InputError
from distill.options import Interpolation, Side
from distill.recipe.reading import short

LARGEST_ARGUMENT = 100_000
"""Of the integers among the arguments of a model."""
RESERVED = frozenset({"pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "pretrained_model_args",
                      "checkpoint_path", "cache_dir", "features_only", "scriptable", "exportable", "no_jit",
                      "device", "dtype"})  # fmt: skip
"""Arguments of timm's that are none of the model: they name files, or change what is built."""


class Record(BaseModel):
    """Base of all: types are strict, numbers are finite, and keys that are not listed are ignored."""

    model_config = ConfigDict(
        strict=True, extra="ignore", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


RecordType = TypeVar("RecordType", bound=Record)
Count = Annotated[int, Field(ge=0, lt=2**53)]
Item = TypeVar("Item")
Pair = Annotated[list[Item], Field(min_length=2, max_length=2)]
Size = Annotated[float, Field(ge=0.0, lt=1e18)]
Name = Annotated[str, Field(max_length=10_000)]


def check(model: type[RecordType], value: Mapping[str, Any], source: str) -> RecordType:
    """`value` as a `model`.

    Raises:
        InputError: the first thing that is wrong with it; the message begins with `source`.
    """
    try:
        return model.model_validate(value)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = "".join(f"{short(part)}: " for part in [".".join(map(str, first["loc"]))] if part)
        reason = first["msg"].removeprefix("Value error, ")
        shown = "" if isinstance(first["input"], dict | list) else f", got {short(repr(first['input']))}"
        raise InputError(
            f"{source}: {where}{reason[0].lower()}{reason[1:]}{shown}. It is damaged, or not of this project."
        ) from None


class Exported(Record):
    weights: Name
    step: Count


class Status(Record):
    """`status.json`."""

    state: Name | None = None
    """running, finished, trained (without `train.test`), interrupted or failed."""
    reason: str | None = None
    """Why it ended early."""
    step: Count = 0
    """Optimizer steps that were done."""
    epoch: Size = 0.0
    """Epochs that were done."""
    phase: Name | None = None
    """control: the student is finished, and the control is trained."""
    data_digest: Name | None = None
    """Of the data; a resumed run needs the same."""
    data_sizes: dict[Name, Count] = {}
    """Number of images of each split."""
    class_images: dict[Name, Count] = {}
    """Number of training images of each class."""
    selected_by: Name | None = None
    """The accuracy that weights are chosen by."""
    unlabelled_digest: Name | None = None
    """Of the images without labels."""
    training_images: dict[Name, Count] = {}
    """Labelled and unlabelled ones."""
    parameters: dict[Name, Count | None] | None = None
    """Of student and teacher."""
    teacher_weights: dict[Name, Name] = {}
    """Files of the teacher's weights, and their SHA-256."""
    initial_weights: dict[Name, Name] | None = None
    """Files that the student starts from, and their SHA-256."""
    exported: Exported | None = None
    """Which weights were exported, and of which step."""
    metrics: dict[Name, Annotated[float, Field(allow_inf_nan=True)]] | None = None
    """The last ones; the keys of `metrics.jsonl`."""
    seconds: dict[Name, Size] = {}
    """Spent in training, compilation, evaluation and analysis."""
    training_seconds: Size | None = None
    """Of training, in runs of earlier versions."""
    wandb: Name | None = None
    """Name of the run in W&B."""


class Environment(Record):
    """`environment.json`; a report lists these keys and no others."""

    command: list[Name] = []
    """What started the run."""
    python: Name | None = None
    """Version of Python."""
    platform: Name | None = None
    """Operating system."""
    host: Name | None = None
    """Name of the machine."""
    versions: dict[Name, Name | None] = {}
    """Of this package and of those that it needs."""
    commit: Name | None = None
    """Of the checkout."""
    processes: Count | None = None
    """Number of processes."""
    precision: Name | None = None
    """Of training: fp32, bf16 or fp16."""
    device: Name | None = None
    """cpu or cuda."""
    device_name: Name | None = None
    """Model of the CPU or GPU."""
    threads: Count | None = None
    """CPU threads of a process."""
    cores: Size | None = None
    """CPU cores that the processes may use."""
    tf32: dict[Name, bool | Name] | bool | Name | None = None
    """Where a GPU may compute in TF32."""
    variants: dict[Name, Name] = {}
    """Variants that are not of this package, with their version or SHA-256."""


class Line(Record):
    """Of `metrics.jsonl`, whatever its event; readers of further keys look at their types."""

    event: Name
    step: Count = 0
    epoch: Annotated[float, Field(ge=0.0, lt=1e9)] = 0.0
    time: Size = 0.0
    split: Name | None = None
    weights: Name | None = None
    samples: Count | None = None


class Costs(Record):
    """Of one model."""

    flops: Size
    bytes: Size
    images_per_second: Size
    latency_seconds: Size
    batch: Count


class CostsByModel(Record):
    student: Costs
    teacher: Costs | None = None


class Robustness(Record):
    images: Annotated[Count, Field(gt=0)]
    correct: Annotated[dict[Name, dict[Name, Annotated[list[Count], Field(min_length=2)]]], Field(min_length=1)]

    @model_validator(mode="after")
    def _fits(self) -> Robustness:
        counts = [levels for outputs in self.correct.values() for levels in outputs.values()]
        if len({tuple(outputs) for outputs in self.correct.values()}) > 1 or len(set(map(len, counts))) > 1:
            raise ValueError("corruptions should have the same outputs and severities")
        if any(count > self.images for levels in counts for count in levels):
            raise ValueError("more correct answers than images")
        return self


class Int8Values(Record):
    """`int8.json`: an int8 export beside the float32 file that it was made of; pairs have float32 first."""

    format: Name
    data: Name | None = None
    head: Literal["fused", "cls", "dist"]
    images: Annotated[Count, Field(gt=0)]
    correct: Pair[Count]
    only_int8_right: Count
    only_float32_right: Count
    agreements: Count
    latency_seconds: Pair[Size]
    bytes: Pair[Count]
    kept: list[Name] = []
    """Layers that stay in float32."""
    machine: Name | None = None
    threads: Count | None = None
    onnxruntime: Name | None = None

    @model_validator(mode="after")
    def _fits(self) -> Int8Values:
        float32, int8 = self.correct
        if int8 - float32 != self.only_int8_right - self.only_float32_right:
            raise ValueError("the counts of right answers do not fit together")
        if max(float32, int8, self.only_int8_right + self.only_float32_right, self.agreements) > self.images:
            raise ValueError("more answers than images")
        return self


class Tokens(Record):
    names: list[Name] | None = None
    token_cosines: list[Annotated[float, Field(ge=-2.0, le=2.0)]] | None = None


class Pixels(Record):
    """Right answers of votes on raw pixels."""

    images: Annotated[Count, Field(gt=0)]
    correct: Count


class AnalysisValues(Record):
    """`analysis.json`."""

    format: Name
    data: Name | None = None
    device: Name
    machine: Name | None = None
    """What the device is called; None in an analysis of an earlier version."""
    costs: CostsByModel
    robustness: Robustness | None = None
    """None for a student without a classifier."""
    pixels: Pixels | None = None
    tokens: Tokens | None = None


def _arguments(values: dict[str, Any]) -> dict[str, Any]:
    if foreign := sorted(RESERVED & values.keys()):
        raise ValueError(f"'{foreign[0]}' is no argument of a model")
    waiting: list[Any] = [values]
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict | list):
            waiting += value.values() if isinstance(value, dict) else value
        elif isinstance(value, int) and abs(value) > LARGEST_ARGUMENT:
            raise ValueError(f"{value} is no size of a model")
    return values


class Inputs(Record):
    """`pretrained_cfg` of an export: no other keys, since timm knows some that name files and addresses."""

    model_config = ConfigDict(extra="forbid")
    num_classes: Count
    input_size: Annotated[list[Side], Field(min_length=3, max_length=3)]
    mean: list[float]
    std: list[Annotated[float, Field(gt=0.0)]]
    interpolation: Interpolation
    fixed_input_size: bool = False
    crop_pct: Annotated[float, Field(gt=0.0, le=2.0)] = 1.0
    crop_mode: Name = "center"
    first_conv: Name | list[Name] | None = None
    classifier: Name | list[Name] | None = None

    @model_validator(mode="after")
    def _fits(self) -> Inputs:
        channels, height, width = self.input_size
        if not len(self.mean) == len(self.std) == channels:
            raise ValueError(f"mean and std should have a value for each of {channels} channels")
        if height != width:
            raise ValueError(f"input_size should be square, got {height} x {width}")
        return self


class Split(Record):
    name: Name
    num_samples: Count
    filenames: list[Name]
    shard_lengths: list[Count]
    alt_label: Name = ""


class ShardList(Record):
    """`_info.json` of a webdataset, as timm reads it."""

    splits: dict[Name, Split] = {}


class TimmInputs(Record):
    """What a teacher takes of `pretrained_cfg` in a folder of timm's."""

    input_size: Annotated[list[Side], Field(min_length=3, max_length=3)] | None = None
    mean: list[float] | None = None
    std: list[Annotated[float, Field(gt=0.0)]] | None = None
    interpolation: Name | None = None


class TimmConfig(TimmInputs):
    """`config.json` of a folder of timm's; its older form has the inputs beside the architecture."""

    architecture: Name
    num_classes: Count | None = None
    model_args: Annotated[dict[str, Any], AfterValidator(_arguments)] | None = None
    pretrained_cfg: TimmInputs | None = None


class Prepared(Record):
    """`preparation` of an export."""

    channels: Annotated[int, Field(ge=1, le=1024)] = 3
    by_pillow: bool = True
    square: bool = True
    background: Annotated[list[Annotated[int, Field(ge=0, le=255)]], Field(min_length=3, max_length=3)] = [255] * 3
    fit: Literal["crop", "squash", "pad"] = "crop"


class ExportConfig(Record):
    """`config.json` of an export."""

    architecture: Name
    num_classes: Count
    """0: without a head."""
    label_names: list[Name]
    model_args: Annotated[dict[str, Any], AfterValidator(_arguments)]
    pretrained_cfg: Inputs
    preparation: Prepared = Prepared()

    @model_validator(mode="after")
    def _fits(self) -> ExportConfig:
        if not len(self.label_names) == len(set(self.label_names)) == self.num_classes:
            raise ValueError(f"label_names should be {self.num_classes} different names")
        if self.pretrained_cfg.num_classes != self.num_classes:
            raise ValueError("num_classes of pretrained_cfg should be the same")
        return self


class LabelNames(Record):
    label_names: list[Name] | None = None


class InputSize(Record):
    input_size: Annotated[list[Side], Field(min_length=3, max_length=3)] | None = None


class ExportedNetwork(LabelNames):
    """All that a report takes of an export's `config.json`."""

    architecture: Name | None = None
    model_args: dict[str, Any] | None = None
    pretrained_cfg: InputSize | None = None


class Progress(Record):
    step: Count
    evaluated_at: Count
    best_top1: float
    best_step: Count | None
    best_weights: Literal["raw", "ema"]


class Accumulated(Record):
    """Sums of metrics since the last line, for each process; NaN is the loss of a method that has ended."""

    names: list[Name]
    sums: list[list[Annotated[float, Field(allow_inf_nan=True)]]]
    skipped: Count

    @model_validator(mode="after")
    def _fits(self) -> Accumulated:
        if any(len(row) != len(self.names) + 1 for row in self.sums):
            raise ValueError("sums should have a value for each name, and their number")
        return self


class CheckpointState(Record):
    """`state.json` of a checkpoint."""

    progress: Progress
    metrics_size: Count
    metrics: Accumulated
    scaler: dict[str, Any] | None
