"""Numbers of areas and parameters, half precision, and what area attention refuses."""

from __future__ import annotations

import pytest
import torch

from distill import registry
from distill.students.attention import build_attention
from distill.students.attention.area import AreaAttention, area_attention
from distill.students.attention.area_pooling import Areas


@pytest.mark.parametrize(
    ("tokens", "max_area", "grid", "prefix", "areas"),
    [
        (197, 2, None, 0, 393),
        (198, 2, (14, 14), 2, 395),
        (66, 2, None, 0, 131),
        (66, 3, None, 0, 195),
        (66, 4, None, 0, 258),
        (198, (2, 2), (14, 14), 2, 731),
        (198, (3, 3), (14, 14), 2, 1523),
        (66, (2, 2), (8, 8), 2, 227),
        (66, (3, 3), (8, 8), 2, 443),
        (5, 9, None, 0, 15),
        (6, (5, 5), (2, 3), 0, 18),
    ],
)
def test_number_of_areas(tokens, max_area, grid, prefix, areas):
    assert Areas.of(tokens, max_area, grid, prefix).number == areas


@pytest.mark.parametrize(
    ("mode", "parameters"), [("mean", 0), ("max", 0), ("sum", 8416), ("max_concat", 12512), ("concat", 16608)]
)
def test_parameters_beside_the_projections(mode, parameters):
    def count(module: AreaAttention) -> int:
        return sum(
            parameter.numel()
            for name, parameter in module.named_parameters()
            if name.split(".")[0] not in ("qkv", "proj")
        )

    assert count(AreaAttention(192, 3, max_area=2, key_mode=mode)) == parameters


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("compiling", [False, True], ids=["token-weights", "pooled"])
@pytest.mark.parametrize("max_area", [2, (3, 3)], ids=str)
def test_half_precision_neither_overflows_nor_drifts(max_area, compiling, dtype, monkeypatch):
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: compiling)
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, 2, 66, 32).to(dtype) for _ in range(3))
    # Token logits up to several hundred, whose exponentials no float holds.
    for scale in (1, 100):
        inputs = [(query * scale).requires_grad_(), key.clone().requires_grad_(), value.clone().requires_grad_()]
        exact = [tensor.detach().double() for tensor in inputs]
        options = {"max_area": max_area, "grid": (8, 8), "num_prefix_tokens": 2}
        output = area_attention(*inputs, **options)
        output.float().square().mean().backward()
        assert output.dtype == dtype
        assert all(torch.isfinite(tensor.grad).all() for tensor in inputs)
        if scale == 1:
            torch.testing.assert_close(output.double(), area_attention(*exact, **options), rtol=0.03, atol=0.03)


def test_under_autocast_the_gradients_have_the_type_of_their_inputs():
    inputs = [torch.randn(1, 2, 6, 4, requires_grad=True) for _ in range(3)]
    with torch.autocast("cpu", torch.bfloat16):
        output = area_attention(*inputs, max_area=2)
    output.float().sum().backward()
    assert [tensor.grad.dtype for tensor in inputs] == [torch.float32] * 3


def test_what_does_not_fit_is_refused():
    x = torch.randn(1, 1, 6, 2)
    for options, words in [
        ({"max_area": (2, 2)}, "grid="),
        ({"max_area": (2, 2), "grid": (2, 2)}, "not 6 tokens"),
        ({"max_area": 0}, "at least one token"),
        ({"max_area": 2, "key_mode": "concat"}, "without parameters"),
        ({"max_area": 2, "value_mode": "median"}, "value modes"),
        ({"max_area": 2, "top_k": -1}, "top_k"),
    ]:
        with pytest.raises(ValueError, match=words):
            area_attention(x, x, x, **options)
    with pytest.raises(ValueError, match="mask"):
        AreaAttention(4, 2)(torch.randn(1, 3, 4), is_causal=True)
    with pytest.raises(ValueError, match="key modes are"):
        AreaAttention(4, 2, key_mode="median")
    with pytest.raises(ValueError, match="odd"):
        AreaAttention(6, 2, key_mode="sum")


def test_the_kind_is_found_by_its_name():
    assert registry.find("attention", "area").implementation is AreaAttention
    assert isinstance(build_attention("area", 4, 2), AreaAttention)
