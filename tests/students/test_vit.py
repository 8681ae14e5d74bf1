"""The registered architectures: sizes, stems, the grid that follows the input, compilation and export to a graph."""

from __future__ import annotations

import subprocess
import sys

import pytest
import timm
import torch

import distill.students  # noqa: F401 (registers the architectures)
from distill.recipe import VIT_SIZES
from distill.students.vit import AttentionVisionTransformer
from tests.conftest import some
from tests.students.helpers import KINDS, of_kind

NANO = {"img_size": 32, "patch_size": 4, "num_classes": 10}
BOXES = {"max_area": [2, 2], "blocks": [0]}
FURTHER = [
    ("area_vit_nano", BOXES),
    ("area_vit_nano", {"max_area": 2, "blocks": [0]}),
    ("area_vit_nano", {"max_area": 2, "key_mode": "concat", "top_k": 9, "blocks": [0]}),
    *(of_kind(name, blocks=[0, 1]) for name in KINDS if name != "refiner"),  # the shared one has both
]


def create(name, **kwargs):
    torch.manual_seed(0)
    return timm.create_model(name, **{**NANO, **kwargs}).eval()


def count(model):
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(
    ("name", "parameters"), [("area_vit_tiny", 5_528_660), ("vit_tiny", 5_528_660), ("area_vit_small", 21_674_132)]
)
def test_parameters_at_imagenet_size(name, parameters):
    assert count(timm.create_model(name, num_classes=10, distilled=True)) == parameters


def test_every_size_is_registered_and_has_its_parameters():
    assert count(create("vit_nano", distilled=True)) == 684_404
    for name in VIT_SIZES:
        assert timm.is_model(name)
        assert timm.is_model(f"area_{name}")
    micro = create("vit_micro")
    assert (micro.embed_dim, len(micro.blocks), micro.blocks[0].attn.num_heads) == VIT_SIZES["vit_micro"]


@pytest.mark.parametrize("max_area", [1, [1, 1]], ids=str)
def test_areas_of_one_token_are_plain_attention(max_area):
    attention = {"max_area": max_area, "blocks": [0, 1]}
    area, plain = create("area_vit_nano", distilled=True, attention=attention), create("vit_nano", distilled=True)
    assert area.state_dict().keys() == plain.state_dict().keys()
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(area(images), plain(images), rtol=0, atol=1e-6)
    areas = create("area_vit_nano", distilled=True, attention={"max_area": 2, "blocks": [0, 1]})
    assert (areas(images) - plain(images)).abs().max() > 1e-4


def test_only_the_listed_blocks_change():
    model = create("area_vit_nano", attention={"max_area": 2, "blocks": [1, 4]})
    kinds = [type(block.attn).__name__ for block in model.blocks]
    assert [kind == "AreaAttention" for kind in kinds] == [False, True, False, False, True, False]


@pytest.mark.parametrize(("name", "attention"), [FURTHER[0], of_kind("focal")], ids=str)
@pytest.mark.parametrize("height_and_width", [(48, 48), (24, 40), (16, 32)], ids=str)
def test_the_grid_follows_the_input(height_and_width, name, attention):
    model = create(name, distilled=True, attention=attention)
    seen = []
    model.blocks[0].attn.register_forward_pre_hook(
        lambda module, inputs: seen.append((module.grid.height, module.grid.width))
    )
    assert model(torch.randn(1, 3, *height_and_width)).shape == (1, 10)
    assert model(torch.randn(1, 3, 32, 32)).shape == (1, 10)
    assert seen == [tuple(side // 4 for side in height_and_width), (8, 8)]


def test_the_grid_of_a_fixed_size_is_that_of_the_patches():
    fixed = create("area_vit_nano", attention=BOXES, dynamic_img_size=False)
    free = create("area_vit_nano", attention=BOXES)
    images = torch.randn(1, 3, 32, 32)
    torch.testing.assert_close(fixed(images), free(images), rtol=0, atol=1e-6)


def test_positions_are_resampled_only_to_another_size(monkeypatch):
    """Also where timm takes compilation for an export, as it does on torch 2.9 to 2.11."""
    model = create("area_vit_nano", distilled=True, attention=BOXES)
    resampled = []
    interpolate = torch.nn.functional.interpolate
    monkeypatch.setattr(timm.layers.pos_embed, "is_exporting", lambda: True)

    def counted(x, **options):
        resampled.append(tuple(options["size"]))
        return interpolate(x, **options)

    monkeypatch.setattr(torch.nn.functional, "interpolate", counted)
    for side in (32, 48, 32):
        model(torch.randn(1, 3, side, side))
    assert resampled == [(12, 12)]


@pytest.mark.parametrize(
    ("name", "attention"),
    some(FURTHER, 3),
    ids=str,
)
def test_torch_compile_gives_the_same_logits_and_gradients(name, attention):
    torch.compiler.reset()  # one process counts the recompilations of all tests
    model = create(name, distilled=True, attention=attention, depth=2).train()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for size in (32, 48):
        images = torch.randn(2, 3, size, size)
        gradients = []
        for one in (model, compiled):
            model.zero_grad()
            output = one(images)
            output.square().sum().backward()
            gradients.append([output.detach(), *(parameter.grad.clone() for parameter in model.parameters())])
        torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("name", "attention"), FURTHER[:3], ids=str)
def test_torch_export_round_trip(name, attention, tmp_path):
    model = create(name, distilled=True, attention=attention, depth=2)
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(model, (torch.randn(2, 3, 32, 32),), dynamic_shapes=({0: batch},))
    torch.export.save(program, tmp_path / "model.pt2")
    loaded = torch.export.load(tmp_path / "model.pt2").module()
    images = torch.randn(5, 3, 32, 32)
    torch.testing.assert_close(loaded(images), model(images), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("name", "attention"), [FURTHER[0], *(of_kind(name) for name in KINDS)], ids=str)
def test_gradient_checkpointing_gives_the_same_gradients(name, attention):
    model = create(name, attention=attention).train()
    images = torch.randn(2, 3, 32, 32)
    gradients = []
    for on in (False, True):
        if on and attention.get("share"):
            with pytest.raises(AssertionError, match="cannot be computed again"):
                model.set_grad_checkpointing()
            return
        model.set_grad_checkpointing(on)
        model.zero_grad()
        model(images).square().sum().backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-6)


@pytest.mark.parametrize("patch_size", [1, 2, 4, 8, 16])
def test_a_conv_stem_reaches_the_same_grid(patch_size):
    model = create("vit_nano", stem="conv", patch_size=patch_size, img_size=32, depth=1)
    plain = create("vit_nano", patch_size=patch_size, img_size=32, depth=1)
    images = torch.randn(2, 3, 32, 32)
    assert model.patch_embed(images).shape == plain.patch_embed(images).shape
    assert model(images).shape == (2, 10)


def test_the_conv_stem_is_the_papers():
    def channels(model):
        return [(layer[0].out_channels, layer[0].stride[0]) for layer in model.patch_embed.proj[:-1]]

    assert channels(create("vit_nano", stem="conv")) == [(32, 1), (64, 2), (96, 2)]
    assert channels(create("vit_tiny", stem="conv", patch_size=16)) == [(24, 2), (48, 2), (96, 2), (192, 2)]
    assert create("vit_tiny", stem="conv").patch_embed.proj[-1].kernel_size == (1, 1)


def test_weight_decay_spares_what_is_like_a_position():
    model = create("area_vit_nano", distilled=True, attention={"max_area": 2, "blocks": [3], "key_mode": "sum"})
    spared = {"blocks.3.attn.height_embedding", "blocks.3.attn.width_embedding"}
    assert model.no_weight_decay() >= spared | {"pos_embed", "cls_token", "dist_token"}
    tables = {f"blocks.1.attn.bias_{name}" for name in ("window", "ring", "coarse")}
    assert create("focal_vit_nano", attention={"blocks": [1]}).no_weight_decay() >= tables


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"attention": {"blocks": [6]}}, "blocks 0 to 5"),
        ({"attention": {}, "qk_norm": True}, "q_norm"),
        ({"attention": {}, "attn_drop_rate": 0.1}, "attn_drop_rate"),
        ({"stem": "pool"}, "stem is"),
        ({"stem": "conv", "patch_size": 6, "img_size": 36}, "power of 2"),
    ],
)
def test_what_cannot_be_built_is_refused(options, words):
    with pytest.raises(ValueError, match=words):
        create("area_vit_nano", **options)


def test_shared_maps_are_refined_by_every_second_block():
    """By the released alternation, computed from the parts of the blocks; those without maps keep timm's values."""
    name, attention = of_kind("refiner, shared", blocks=[0, 2, 3, 5, 4])
    model, plain = create(name, attention=attention).train(), create("vit_nano").train()
    shapes = [block.attn.qkv.weight.shape[0] for block in model.blocks]
    assert shapes == [288, 288, 96, 288, 96, 288]
    assert torch.equal(model.blocks[2].attn.qkv.weight, plain.blocks[2].attn.qkv.weight[192:])
    assert torch.equal(model.blocks[2].attn.qkv.bias, plain.blocks[2].attn.qkv.bias[192:])
    inputs, outputs = [], []
    for block in model.blocks:
        block.attn.register_forward_pre_hook(lambda _, given: inputs.append(given[0]))
        block.attn.register_forward_hook(lambda _, given, output: outputs.append(output))
    images = torch.randn(2, 3, 32, 32)
    model(images)
    before = None
    for index, place in zip((0, 2, 3, 4, 5), range(5), strict=True):
        x, module = inputs[index], model.blocks[index].attn
        *query_and_key, value = module.qkv(x).unflatten(-1, (-1, 3, 32)).transpose(1, 3).unbind(2)
        if place % 2 == 0:
            query, key = query_and_key
            own = (query @ key.transpose(-1, -2) / 32**0.5).softmax(-1)
            before = own if before is None else own + before / 32**0.5
            weights = before
        else:
            weights = module.refine(before) / 32**0.5
        expected = module.proj((weights @ value).transpose(1, 2).flatten(2))
        torch.testing.assert_close(outputs[index], expected, rtol=1e-4, atol=1e-5)
    assert not model.shared, "nothing is left of a forward pass"


def test_projection_dropout_is_kept():
    model = create("area_vit_nano", attention={"max_area": 2}, proj_drop_rate=0.3)
    assert isinstance(model, AttentionVisionTransformer)
    assert model.blocks[0].attn.proj_drop.p == 0.3


def test_plain_timm_knows_nothing_of_areas():
    code = "import timm; timm.create_model('area_vit_tiny')"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode
    assert "Unknown model (area_vit_tiny)" in result.stderr
