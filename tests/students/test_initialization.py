"""Mimetic and impulse initialisation, against their formulas in float64, through timm's own attention."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from distill.errors import InputError
from distill.recipe import from_mapping
from distill.recipe.initialization import Mimetic
from distill.students import Student, build_student
from distill.students.initialization import initialize_mimetic, sinusoidal_positions
from tests.students.helpers import KINDS, student_options

Array = np.ndarray[Any, np.dtype[np.float64]]


def build(init: dict[str, Any] | None, *, model: str = "vit_nano", seed: int = 0, **spec: Any) -> Student:
    return build_student(
        student_options(model=model, init=init, **({"patch_size": 4} | spec)),
        resolution=32, num_classes=10, channels=3, mean=(0.5,) * 3, std=(0.25,) * 3, seed=seed,
    )  # fmt: skip


def queries_keys_values(attention: Any, tokens: torch.Tensor) -> list[Array]:
    """Of tokens [N, D], as timm's attention reads its `qkv`: each [heads, N, d]."""
    output = attention.double().qkv(tokens).reshape(len(tokens), 3, attention.num_heads, -1)
    return [part.transpose(0, 1).detach().numpy() for part in output.unbind(1)]


def test_positions_are_sines_and_cosines_of_both_axes() -> None:
    found = sinusoidal_positions(3, 5, 12).numpy()
    for y in range(3):
        for x in range(5):
            row = found[y * 5 + x]
            for index in range(3):
                frequency = 10_000 ** (-index / 3)
                expected = [f(frequency * axis) for axis in (x, y) for f in (np.sin, np.cos)]
                np.testing.assert_allclose(row[index::3], expected, atol=1e-12)


def test_mimetic_products_are_noise_plus_identity_up_to_the_rank_of_a_head() -> None:
    network: Any = build(None).model
    torch.manual_seed(5)
    initialize_mimetic(network, Mimetic(alpha1=0.5, beta2=0.3))
    torch.manual_seed(5)
    dim, heads = 96, 3
    for index, block in enumerate(network.blocks):
        attention = block.attn
        noise = [torch.randn(dim, dim, dtype=torch.float64).numpy() / dim**0.5 for _ in range(heads + 1)]
        if index not in (0, 5):
            continue
        query, key, value = queries_keys_values(attention, torch.eye(dim, dtype=torch.float64))
        for head in range(heads):
            left, values, right = np.linalg.svd(0.5 * noise[head] + 0.7 * np.eye(dim))
            values[dim // heads :] = 0.0
            np.testing.assert_allclose(query[head] @ key[head].T, (left * values) @ right, atol=1e-5)
            assert np.linalg.norm(query[head]) == pytest.approx(np.linalg.norm(key[head]), rel=1e-5)
        combined = torch.from_numpy(np.concatenate(list(value), axis=1))
        product = (attention.proj(combined) - attention.proj.bias).detach().numpy()
        np.testing.assert_allclose(product, 0.4 * noise[heads] - 0.3 * np.eye(dim), atol=1e-5)


def test_mimetic_has_the_papers_coefficients() -> None:
    dim, diagonals, others = 96, [], []
    for block in build({"kind": "mimetic"}).model.blocks:
        attention: Any = block.attn
        product = (attention.proj.weight @ attention.qkv.weight[2 * dim :]).T.detach().numpy()  # W_V W_proj
        diagonals.append(product.diagonal())
        others.append(product[~np.eye(dim, dtype=bool)])
    assert np.mean(diagonals) == pytest.approx(-0.4, abs=0.01)
    assert np.var(others) == pytest.approx(0.4**2 / dim, rel=0.05)


@pytest.mark.parametrize(("model", "distillation_token"), [("vit_nano", True), ("vit_micro", False)])
@torch.no_grad()
def test_impulse_heads_attend_to_one_neighbour(model: str, distillation_token: bool) -> None:
    network: Any = build({"kind": "impulse"}, model=model, distillation_token=distillation_token).eval().model.double()
    side, prefix, seen = 8, network.num_prefix_tokens, set()
    assert prefix == 1 + distillation_token
    interior = [(y, x) for y in range(1, side - 1) for x in range(1, side - 1)]
    offsets = [(down, right) for down in (-1, 0, 1) for right in (-1, 0, 1)]

    def place(y: int, x: int) -> int:
        return prefix + y * side + x

    def towards(weights: Array, down: int, right: int) -> float:
        return float(np.mean([weights[place(y, x), place(y + down, x + right)] for y, x in interior]))

    def attention(block: Any, tokens: torch.Tensor) -> Array:
        query, key, _ = queries_keys_values(block.attn, block.norm1(tokens)[0])
        weights = np.exp(query @ key.transpose(0, 2, 1) / query.shape[2] ** 0.5)
        return np.asarray(weights / weights.sum(2, keepdims=True))

    # The papers' input, positions alone, with our prefix tokens; and what this becomes on its way through the blocks.
    positions = network._pos_embed(torch.zeros(1, side**2, network.embed_dim, dtype=torch.float64))
    stream = positions
    for block in network.blocks:
        for weights, later in zip(attention(block, positions), attention(block, stream), strict=True):
            down, right = max(offsets, key=lambda offset: towards(weights, *offset))
            assert towards(weights, down, right) > 0.5
            for y, x in interior:
                assert weights[place(y, x)].argmax() == place(y + down, x + right)
            assert towards(later, down, right) > 0.3
            assert np.isfinite(weights).all()
            seen.add((down, right))
        stream = block(stream)
    assert len(seen) > 4


def test_a_window_of_one_patch_attends_to_the_patch_itself_as_focused_as_asked() -> None:
    network: Any = build({"kind": "impulse", "window": 1, "focus": 0.9}).model.double()
    tokens = network.blocks[0].norm1(network.pos_embed[:, 2:])[0]
    query, key, _ = queries_keys_values(network.blocks[0].attn, tokens)
    weights = torch.from_numpy(query @ key.transpose(0, 2, 1) / 32**0.5).softmax(-1)
    for head in weights:
        assert float(head.diagonal().mean()) == pytest.approx(0.9, abs=1e-3)


@pytest.mark.parametrize("kind", ["mimetic", "impulse"])
def test_only_attention_and_the_patches_positions_change_and_the_seed_decides_how(kind: str) -> None:
    plain, first = build(None).model.state_dict(), build({"kind": kind}).model.state_dict()
    again, other = build({"kind": kind}).model.state_dict(), build({"kind": kind}, seed=1).model.state_dict()
    changed = {name for name in plain if not torch.equal(plain[name], first[name])}
    weights = ["qkv", "proj"] if kind == "mimetic" else ["qkv"]
    assert changed == {"pos_embed"} | {f"blocks.{block}.attn.{name}.weight" for block in range(6) for name in weights}
    assert torch.equal(plain["pos_embed"][:, :2], first["pos_embed"][:, :2])
    if kind == "impulse":
        values = plain["blocks.0.attn.qkv.weight"][2 * 96 :]
        assert torch.equal(values, first["blocks.0.attn.qkv.weight"][2 * 96 :])
    assert all(torch.equal(tensor, again[name]) for name, tensor in first.items())
    assert not torch.equal(first["blocks.5.attn.qkv.weight"], other["blocks.5.attn.qkv.weight"])


@pytest.mark.parametrize("attention", ["area", *KINDS])
@pytest.mark.parametrize("kind", ["mimetic", "impulse"])
def test_attention_kinds_have_it_too(attention: str, kind: str) -> None:
    options = KINDS.get(attention, {"kind": "area", "max_area": [2, 2]})
    student, plain = build({"kind": kind}, attention=options), build(None, attention=options)
    own = {"qkv.weight", "proj.weight"} if kind == "mimetic" else {"qkv.weight"}
    for mine, unchanged in zip(student.model.blocks, plain.model.blocks, strict=True):
        before: dict[str, torch.Tensor] = unchanged.attn.state_dict()
        after: dict[str, torch.Tensor] = mine.attn.state_dict()
        has_maps = len(before["qkv.weight"]) == 3 * 96
        differ = {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}
        assert differ == (own if has_maps or kind == "mimetic" else set())
    output = student.eval()(torch.rand(2, 3, 32, 32)).fused
    assert bool(output.isfinite().all())


@pytest.mark.parametrize(
    ("student", "message"),
    [
        ({"init": "mimetic"}, "student.init: should be a section of keys, such as {kind: mimetic}"),
        ({"init": {"kind": "mimetik"}}, "student.init.kind: should be one of 'mimetic', 'impulse', 'select'"),
        ({"init": {"kind": "mimetic", "beta1": -1}}, "student.init.beta1: should be greater than or equal to 0"),
        ({"init": {"kind": "impulse", "window": 4}}, "student.init.window: should be odd"),
        ({"init": {"kind": "impulse", "window": 9}}, "student.init.window: a window of 9 is larger than the 8x8 patch"),
        ({"init": {"kind": "select"}}, "student.init.source: name a timm model with weights, or an export folder"),
        ({"init": {"kind": "mimetic"}, "weights": "runs/a/export"},
         "student.init: the student starts from these weights, or from those of student.weights"),
        ({"init": {"kind": "mimetic"}, "model": "vit_tiny", "pretrained": True}, "or from those of student.pretrained"),
        ({"init": {"kind": "mimetic"}, "model": "focal_nano", "patch_size": None}, "student.init: unknown key"),
        ({"init": {"kind": "mimetic"}, "model": "resnet18", "patch_size": None}, "student.init: unknown key"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_one_message_at_validation(student: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=r"1 problem\(s\)") as refused:
        from_mapping({"student": {"model": "vit_nano", "patch_size": 4} | student})
    assert message in str(refused.value)


def test_pretraining_by_a_recipe_is_another_start() -> None:
    with pytest.raises(InputError, match=r"1 problem.*\n  pretrain: .* or from student.init; leave one"):
        from_mapping(
            {"pretrain": {"recipe": "a.yaml"}, "student": {"model": "vit_nano", "patch_size": 4}},
            ["student.init={kind: mimetic}"],
        )
