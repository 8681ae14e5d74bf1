"""Whole runs of pyramids: a stopped one ends as one that was not, two processes learn what one does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from distill.errors import Interrupted
from distill.recipe import Recipe, from_mapping
from tests.conftest import Toy, some
from tests.test_pipeline_variants import exported_answers
from tests.test_resume import go, same_end, train_lines
from tests.warm import launch

PYRAMIDS: dict[str, dict[str, Any]] = {
    "focal": {"model": "focal_nano", "width": 24, "depths": [1, 1, 2]},
    "regional": {"model": "regionvit_nano", "width": 24, "depths": [1, 1, 2]},
    "local_global": {"model": "lg_nano", "width": 24, "depths": [2, 1, 1]},
}


def recipe_of(toy: Toy, family: str, **train: Any) -> Recipe:
    """Guidance of the stages' maps beside the teacher's decisions, on images that grow from 8 to 16 px."""
    raw = toy.mapping(
        data={"resolution": 16, "growth": {"start": 8, "until": 0.5}},
        student={},
        distill=[{"method": "hard", "weight": 0.5}, {"method": "guide"}],
        optim={"name": "nmuon", "warmup_epochs": 1},
        train={"threads": 1, "gradient_accumulation": 1, **train},
    )
    raw["student"] = {**PYRAMIDS[family], "drop_path": 0.1}
    recipe = from_mapping(raw, default_name="toy")
    assert recipe.student.family == family
    return recipe


@pytest.mark.parametrize("family", some(PYRAMIDS))
def test_a_stopped_run_goes_on_bit_for_bit_and_its_export_answers_as_it_did(
    toy: Toy, family: str, tmp_path: Path
) -> None:
    recipe = recipe_of(toy, family)
    go(recipe, tmp_path / "whole", None)
    with pytest.raises(Interrupted):
        go(recipe, tmp_path / "stopped", 7)
    go(recipe, tmp_path / "stopped", None, resume="auto")
    same_end(tmp_path / "whole", tmp_path / "stopped")
    found = load_file(tmp_path / "whole" / "predictions.safetensors")
    assert found.keys() == {"student.cls", "student.dist", "student.fused", "labels", "teacher"}
    images = load_file(toy.root / "toy.safetensors")["test.images"].float() / 255
    answers = exported_answers(tmp_path / "whole", images)
    torch.testing.assert_close(found["student.fused"], answers, rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", some(PYRAMIDS, 1))
def test_two_processes_use_every_parameter_and_learn_what_one_does(toy: Toy, family: str, tmp_path: Path) -> None:
    recipe = recipe_of(toy, family, epochs=1, max_steps=3, ema=None)
    recipe = recipe.replace(student=recipe.student.model_copy(update={"drop_path": 0.0}))
    go(recipe, tmp_path / "one", None)
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml())
    two = launch(["train", "recipe.yaml", "--out", "two"], cwd=tmp_path, processes=2)
    assert two.wait(200) == [0, 0], two.output
    lines = [train_lines(tmp_path / name) for name in ("one", "two")]
    for key in ("loss", "loss/label", "loss/hard", "loss/guide"):
        assert [line[key] for line in lines[1]] == pytest.approx([line[key] for line in lines[0]], abs=1e-5), key
