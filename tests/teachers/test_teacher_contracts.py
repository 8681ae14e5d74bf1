"""Weights of the user's own under a library's name: what they were trained with is measured, not assumed."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn

import distill
from distill.data import Dataset, open_dataset
from distill.errors import InputError
from distill.inputs import InputAdapter, InputContract
from distill.launching.processes import build_accelerator
from distill.recipe import Recipe, from_mapping
from distill.recipe import Teacher as Spec
from distill.teaching.teachers import build_teacher, run_preflight
from teachers.sources import contract_is_assumed
from tests.conftest import Toy

LIBRARY = InputContract((0.0, 0.0, 0.0), (1.0, 1.0, 1.0), 16, "bilinear")


class BySum(nn.Module):
    """Answers with the class whose centre is nearest to the sum of its inputs, which depends on size and statistics."""

    def __init__(self, num_classes: int = 1000, in_chans: int = 3, **unused: Any) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.centres = nn.Parameter(torch.zeros(num_classes))

    def forward(self, images: Tensor) -> Tensor:
        return -((images.sum((1, 2, 3))[:, None] - self.centres) ** 2)


default_cfgs = generate_default_cfgs(
    {"by_sum": {"input_size": (3, 16, 16), "interpolation": "bilinear", "mean": LIBRARY.mean, "std": LIBRARY.std}}
)


@register_model
def by_sum(pretrained: bool = False, **kwargs: Any) -> BySum:
    return build_model_with_cfg(BySum, "by_sum", pretrained, **kwargs)


@pytest.fixture
def dataset(toy: Toy) -> Dataset:
    recipe = from_mapping(toy.mapping())
    return open_dataset(recipe.data, seed=recipe.seed, device=torch.device("cpu"))


def _weights(path: Path, dataset: Dataset, contract: InputContract) -> Path:
    """Of a network that is right under this contract."""
    images, labels = next(dataset.evaluation_batches("train", 0, 96, 96))
    sums = InputAdapter(contract)(images).sum((1, 2, 3))
    centres = torch.stack([sums[labels == label].mean() for label in range(4)])
    save_file({"centres": centres}, path)
    return path


def _preflight(toy: Toy, dataset: Dataset, **teacher: Any) -> dict[str, Any]:
    recipe: Recipe = from_mapping(toy.mapping(teacher={"model": "by_sum", "min_accuracy": None} | teacher))
    accelerator = build_accelerator(recipe.train, toy.root)
    built = build_teacher(recipe, dataset, accelerator)
    assert built is not None
    return run_preflight(recipe, built, dataset, accelerator)[0]


def test_the_librarys_contract_is_used_and_said_where_it_is_right(
    toy: Toy, dataset: Dataset, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("distill"), "propagate", True)
    weights = _weights(tmp_path / "own.safetensors", dataset, LIBRARY)
    with caplog.at_level(logging.INFO, "distill"):
        found = _preflight(toy, dataset, weights=str(weights))
    assert found["teacher/top1"] == 100.0
    (line,) = [line for line in caplog.messages if "does not say for certain how its inputs were prepared" in line]
    assert f"100.00% with {LIBRARY}; " in line
    assert line.count("% with mean") == 4  # two sizes, two pairs of statistics
    assert line.endswith("; the first is used")


@pytest.mark.parametrize("size", [8, 16])
@pytest.mark.parametrize("by_data", [True, False])
def test_weights_that_were_trained_otherwise_are_refused_with_the_keys_to_set(
    toy: Toy, dataset: Dataset, tmp_path: Path, size: int, by_data: bool
) -> None:
    mean, std = (dataset.info.mean, dataset.info.std) if by_data else (LIBRARY.mean, LIBRARY.std)
    contract = InputContract(mean, std, size, "bilinear")
    if contract == LIBRARY:
        return
    weights = _weights(tmp_path / "own.safetensors", dataset, contract)
    with pytest.raises(InputError) as caught:
        _preflight(toy, dataset, weights=str(weights))
    message = str(caught.value)
    assert str(weights) in message
    assert f"% with {LIBRARY}" in message
    assert f"100.00% with {contract}" in message
    after = message.partition("in the latter case ")[2]
    keys = dict(part.split("=") for part in after.partition("; in the former")[0].replace("'", "").split(" teacher"))
    assert keys["teacher.size"] == str(size)
    values = {key: [float(value) for value in keys[f".{key}"][1:-1].split(", ")] for key in ("mean", "std")}
    assert values["mean"] == pytest.approx(list(mean), rel=1e-4)
    assert values["std"] == pytest.approx(list(std), rel=1e-4)
    assert _preflight(toy, dataset, weights=str(weights), size=size, **values)["teacher/top1"] == 100.0
    # Whoever insists gets what they ask for.
    stubborn = {"size": 16, "mean": list(LIBRARY.mean), "std": list(LIBRARY.std), "min_accuracy": 0.0}
    assert _preflight(toy, dataset, weights=str(weights), **stubborn)["teacher/top1"] < 100.0


def test_folders_of_timm_are_measured_and_ours_are_not(toy: Toy, dataset: Dataset, tmp_path: Path) -> None:
    contract = InputContract(LIBRARY.mean, LIBRARY.std, 8, "bilinear")
    _weights(tmp_path / "model.safetensors", dataset, contract)
    known = {"input_size": [3, 16, 16], "interpolation": "bilinear", "mean": LIBRARY.mean, "std": LIBRARY.std}
    config: dict[str, Any] = {"architecture": "by_sum", "num_classes": 4, "pretrained_cfg": known}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="does not say for certain how its inputs were prepared") as caught:
        _preflight(toy, dataset, model=f"local-dir:{tmp_path}", weights=None)
    assert "teacher.size=8" in str(caught.value)
    assert _preflight(toy, dataset, model=f"local-dir:{tmp_path}", weights=None, size=8)["teacher/top1"] == 100.0
    config["preparation"] = {}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert not contract_is_assumed(Spec(model=f"local-dir:{tmp_path}"))


def test_evaluating_a_teacher_measures_them_too(toy: Toy, dataset: Dataset, tmp_path: Path) -> None:
    weights = _weights(tmp_path / "own.safetensors", dataset, InputContract(LIBRARY.mean, LIBRARY.std, 8, "bilinear"))
    given = {"model": "by_sum", "weights": str(weights), "min_accuracy": None}
    with pytest.raises(InputError, match="does not say for certain how its inputs were prepared"):
        distill.evaluate(from_mapping(toy.mapping(teacher=given)))
    assert distill.evaluate(from_mapping(toy.mapping(teacher=given | {"size": 8})))["teacher"].top1 == 100.0


def test_what_the_recipe_gives_is_not_varied(toy: Toy, dataset: Dataset, tmp_path: Path) -> None:
    weights = _weights(tmp_path / "own.safetensors", dataset, InputContract(LIBRARY.mean, LIBRARY.std, 8))
    with pytest.raises(InputError, match="below the required") as caught:
        _preflight(toy, dataset, weights=str(weights), size=16)
    assert "does not say" not in str(caught.value)


def test_a_member_of_an_ensemble_is_named_by_its_key(toy: Toy, dataset: Dataset, tmp_path: Path) -> None:
    good = {"model": "by_sum", "weights": str(_weights(tmp_path / "good.safetensors", dataset, LIBRARY))}
    contract = InputContract(LIBRARY.mean, LIBRARY.std, 8, "bilinear")
    bad = {"model": "by_sum", "weights": str(_weights(tmp_path / "bad.safetensors", dataset, contract))}
    recipe = from_mapping(toy.mapping() | {"teacher": [good, bad]})
    accelerator = build_accelerator(recipe.train, toy.root)
    teacher = build_teacher(recipe, dataset, accelerator)
    assert teacher is not None
    with pytest.raises(InputError, match=r"bad\.safetensors does not say .* teacher\.1\.size=8 "):
        run_preflight(recipe, teacher, dataset, accelerator)


@pytest.mark.parametrize(
    ("teacher", "assumed"),
    [
        ({"model": "resnet18"}, False),  # the library's own weights
        ({"model": "resnet18", "weights": "w"}, True),
        ({"model": "torchvision/resnet18", "weights": "w"}, True),
        ({"model": "hf_hub:timm/resnet18.a1_in1k", "weights": "w"}, True),
        ({"model": "cifar_resnet20", "weights": "w"}, True),  # not the file of zoo.yaml
        ({"model": "local-dir:folder", "weights": "w"}, True),
        ({"model": "hf_hub:someone/resnet18"}, True),
        ({"model": "resnet18", "weights": "w", "size": 64, "mean": [0.5] * 3}, True),
        ({"model": "resnet18", "weights": "w", "size": 64, "mean": [0.5] * 3, "std": [0.5] * 3}, False),
    ],
)
def test_whose_contract_is_assumed(
    teacher: dict[str, Any], assumed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "w").write_bytes(b"not the zoo's")
    assert contract_is_assumed(from_mapping({"teacher": teacher}).teachers[0]) == assumed


@pytest.mark.shared
def test_the_zoos_own_file_has_its_contract(teacher_weights: Path) -> None:
    spec = {"model": "cifar_resnet20", "weights": str(teacher_weights / "resnet20-12fca82f.th")}
    assert not contract_is_assumed(from_mapping({"teacher": spec}).teachers[0])
