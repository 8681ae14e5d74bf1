"""Refiner-ViT as published: its sizes, and its blocks against plain tensors' arithmetic."""

from __future__ import annotations

import pytest
import timm
import torch
from torch.nn import functional as F

import distill.students  # noqa: F401 (registers the architectures)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("refiner_vit_s", 25_023_656), ("refiner_vit_m", 55_029_932), ("refiner_vit_l", 80_637_192)],
)
def test_published_sizes(name, parameters):
    with torch.device("meta"):
        model = timm.create_model(name)
    assert sum(map(torch.numel, model.parameters())) == parameters
    assert (model.patch_embed.grid_size, model.num_prefix_tokens) == ((14, 14), 1)


def test_blocks_double_their_branches():
    torch.manual_seed(0)
    model = timm.create_model("refiner_vit_s", img_size=32, embed_dim=24, depth=2, num_heads=3, num_classes=5).eval()
    state = model.state_dict()
    assert torch.equal(state["blocks.0.ls2.gamma"], torch.full((24,), 1e-5))
    assert "blocks.0.ls1.gamma" not in state
    for name in ("pos_embed", "cls_token"):
        assert 0.01 < state[name].std() < 0.03
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    images = torch.randn(2, 3, 32, 32)
    # The stem, by hand: batch norms are as they were created, with factor and summand drawn anew.
    x = images
    for index, (stride, padding) in enumerate(((2, 3), (1, 1), (1, 1))):
        x = F.conv2d(x, state[f"patch_embed.proj.{index}.0.weight"], stride=stride, padding=padding)
        norm = [state[f"patch_embed.proj.{index}.1.{name}"][:, None, None] for name in ("weight", "bias")]
        x = F.relu(norm[0] * x / (1 + 1e-5) ** 0.5 + norm[1])
    x = F.conv2d(x, state["patch_embed.proj.3.weight"], state["patch_embed.proj.3.bias"], stride=8)
    x = torch.cat([state["cls_token"].expand(2, -1, -1), x.flatten(2).transpose(1, 2)], 1) + state["pos_embed"]

    def norm_of(x, name):
        return F.layer_norm(x, (24,), state[f"{name}.weight"], state[f"{name}.bias"], 1e-6)

    first, second = (block.attn for block in model.blocks)
    before = norm_of(x / 2, "blocks.0.norm1")
    query, key, value = first.qkv(before).view(2, 5, 3, 3, 8).permute(2, 0, 3, 1, 4)
    maps = (query @ key.transpose(-1, -2) / 8**0.5).softmax(-1)
    for index, block in enumerate(model.blocks):
        if index:
            value = second.qkv(norm_of(x / 2, "blocks.1.norm1")).view(2, 5, 3, 8).transpose(1, 2)
            maps = second.refine(maps) / 8**0.5
        x = x + 2 * block.attn.proj((maps @ value).transpose(1, 2).flatten(2))
        hidden = F.gelu(block.mlp.fc1(norm_of(x / 2, f"blocks.{index}.norm2")))
        x = x + 2 * state[f"blocks.{index}.ls2.gamma"] * block.mlp.fc2(hidden)
    logits = F.linear(norm_of(x, "norm")[:, 0], state["head.weight"], state["head.bias"])
    torch.testing.assert_close(model(images), logits, rtol=1e-4, atol=1e-4)


def test_what_it_cannot_do_is_refused():
    with pytest.raises(ValueError, match="patches of 16"):
        timm.create_model("refiner_vit_s", patch_size=8, depth=2)
    model = timm.create_model("refiner_vit_s", depth=2)
    with pytest.raises(AssertionError, match="computed again"):
        model.set_grad_checkpointing()
