"""What the launcher decides and what the recipe does."""

from __future__ import annotations

import pytest

from distill.errors import InputError
from distill.processes import with_precision
from distill.recipe import from_mapping


@pytest.mark.parametrize(
    ("launched", "precision"), [(None, "fp32"), ("no", "fp32"), ("bf16", "bf16"), ("fp16", "fp16")]
)
def test_the_resolved_recipe_has_the_launched_precision(
    monkeypatch: pytest.MonkeyPatch, launched: str | None, precision: str
) -> None:
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    if launched is not None:
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", launched)
    assert with_precision(from_mapping({})).train.precision == precision
    assert with_precision(from_mapping({"train": {"precision": "bf16"}})).train.precision == "bf16"  # the recipe wins


def test_a_precision_that_no_recipe_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp8")
    with pytest.raises(InputError, match="--mixed_precision fp8"):
        with_precision(from_mapping({}))
