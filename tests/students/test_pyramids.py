"""Pyramids as timm's models: published sizes, heads, maps, any size of image, gradients of every parameter."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

import distill.students  # noqa: F401 (registers the architectures)
from tests.conftest import some

PUBLISHED = {
    "regionvit_tiny": 13_842_676,
    "regionvit_small": 30_586_618,
    "regionvit_medium": 41_215_906,
    "regionvit_base": 72_747_232,
    "lg_tiny": 32_596_654,
    "lg_small": 61_035_214,
    # Published: 28,880,380, 51,141,940 and 89,815,400. The ring has 120 keys, of which the published code has 12 twice,
    # each with a bias of its own for 49 queries and every head of the first three stages' blocks.
    "focal_tiny": 28_880_380 - 12 * 49 * (2 * 3 + 2 * 6 + 6 * 12),
    "focal_small": 51_141_940 - 12 * 49 * (2 * 3 + 2 * 6 + 18 * 12),
    "focal_base": 89_815_400 - 12 * 49 * (2 * 4 + 2 * 8 + 18 * 16),
}
"""Parameters at 1,000 classes."""
SMALL = {
    "regionvit_nano": 1_190_452,
    "regionvit_micro": 2_101_990,
    "regionvit_mini": 2_499_438,
    "regionvit_midi": 5_592_352,
    "lg_nano": 1_381_660,
    "lg_micro": 2_446_262,
    "lg_mini": 2_975_686,
    "lg_midi": 6_675_364,
    "focal_nano": 1_283_026,
    "focal_micro": 2_256_444,
    "focal_mini": 2_659_846,
    "focal_midi": 6_855_774,
}
"""Parameters at 10 classes."""
NANO = [name for name in SMALL if name.endswith("nano")]


def create(name: str, **kwargs: Any) -> Any:
    torch.manual_seed(0)
    return timm.create_model(name, **{"num_classes": 10, **kwargs})


def pixels(*shape: int) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(0))


def count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes(name: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(name)
    assert count(model) == PUBLISHED[name]
    assert model.pretrained_cfg["input_size"] == (3, 224, 224)
    assert [info["reduction"] for info in model.feature_info] == [4, 8, 16, 32]


@pytest.mark.parametrize("name", SMALL)
def test_sizes_for_small_images(name: str) -> None:
    model = create(name)
    assert count(model) == SMALL[name]
    assert model.pretrained_cfg["input_size"] == (3, 32, 32)


@torch.no_grad()
@pytest.mark.parametrize("name", ["regionvit_tiny", "regionvit_medium", "lg_tiny", "focal_tiny"])
def test_four_stages_at_224(name: str) -> None:
    model = create(name, width=16, heads=[1, 2, 4, 8], depths=[1, 1, 1, 1]).eval()
    maps = model.forward_intermediates(pixels(1, 3, 224, 224), intermediates_only=True)
    assert [tuple(found.shape) for found in maps] == [(1, 16 * 2**i, 56 // 2**i, 56 // 2**i) for i in range(4)]


@torch.no_grad()
@pytest.mark.parametrize("name", NANO)
def test_images_of_any_size(name: str) -> None:
    """Also with grids that no window divides; a place of a map beyond a ragged end would change the answer."""
    model = create(name).eval()
    for height, width in ((32, 32), (28, 28), (16, 16), (40, 24), (33, 35), (10, 32)):
        final, maps = model.forward_intermediates(pixels(2, 3, height, width))
        for stage, found in enumerate(maps):
            side = 2 ** (stage + 1)
            assert found.shape == (2, 48 * 2**stage, -(-height // side), -(-width // side))
        torch.testing.assert_close(model.forward_head(final), model(pixels(2, 3, height, width)))


@torch.no_grad()
@pytest.mark.parametrize("name", NANO)
def test_images_do_not_see_each_other(name: str) -> None:
    model, images = create(name).double().eval(), pixels(3, 3, 28, 20).double()
    torch.testing.assert_close(model(images)[1:2], model(images[1:2]))


@pytest.mark.parametrize("name", NANO)
def test_two_heads_on_the_same_features(name: str) -> None:
    model, images = create(name, distilled=True).train(), pixels(2, 3, 32, 32)
    assert count(model) == SMALL[name] + 193 * 10
    assert isinstance(model(images), Tensor), "until the mode is set"
    model.set_distilled_training(True)
    both = model(images)
    assert isinstance(both, tuple)
    assert model.get_classifier() == (model.head, model.head_dist)
    model.eval()
    cls, dist = (
        head(model.forward_head(model.forward_features(images), pre_logits=True))
        for head in (model.head, model.head_dist)
    )
    torch.testing.assert_close(model(images), (cls + dist) / 2)
    torch.testing.assert_close(torch.stack(both), torch.stack([cls, dist]))
    model.reset_classifier(7)
    assert model(images).shape == (2, 7)
    assert [head.out_features for head in model.get_classifier()] == [7, 7]
    model.reset_classifier(0)
    torch.testing.assert_close(model(images), model.forward_features(images).mean((1, 2)))


@pytest.mark.parametrize("name", NANO)
def test_every_parameter_has_a_gradient_also_with_checkpointing(name: str) -> None:
    images, gradients = pixels(2, 3, 24, 32), []
    for checkpointing in (False, True):
        model = create(name, distilled=True, drop_path_rate=0.2).train()
        model.set_distilled_training(True)
        model.set_grad_checkpointing(checkpointing)
        torch.manual_seed(1)
        torch.stack(model(images)).square().sum().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert all(gradient is not None for gradient in gradients[0])
    torch.testing.assert_close(*gradients, rtol=0, atol=0)


@pytest.mark.parametrize("name", NANO)
def test_drop_path_rises_from_block_to_block(name: str) -> None:
    model = create(name, drop_path_rate=0.2)
    of_blocks = [
        {module.drop_prob for module in block.modules() if type(module).__name__ == "DropPath"}
        for stage in model.stages
        for block in stage.blocks
    ]
    assert [max(rates, default=0.0) for rates in of_blocks] == pytest.approx([0.0, 0.04, 0.08, 0.12, 0.16, 0.2])
    assert all(len(rates) <= 1 for rates in of_blocks)


@torch.no_grad()
@pytest.mark.parametrize("name", NANO)
def test_features_only(name: str) -> None:
    whole, images = create(name).eval(), pixels(2, 3, 32, 32)
    for indices in (None, (0, 1), (1,)):
        arguments = {} if indices is None else {"out_indices": indices}
        features = create(name, features_only=True, **arguments).eval()
        assert not features.model.load_state_dict(whole.state_dict(), strict=False).missing_keys
        expected = whole.forward_intermediates(images, indices and list(indices), intermediates_only=True)
        found = features(images)
        torch.testing.assert_close(found, expected)
        assert [one.shape[1] for one in found] == features.feature_info.channels()
        assert [32 // one.shape[2] for one in found] == features.feature_info.reduction()


@pytest.mark.parametrize("name", NANO)
def test_weight_decay_spares_tables_of_biases(name: str) -> None:
    model = create(name)
    spared = {key.rpartition(".")[2] for key in model.no_weight_decay()}
    assert (
        spared
        == {
            "regionvit_nano": {"bias_local"},
            "lg_nano": {"relative_position_bias_table"},
            "focal_nano": {"bias_window", "bias_ring", "bias_coarse"},
        }[name]
    )
    assert model.no_weight_decay() <= dict(model.named_parameters()).keys()


@pytest.mark.parametrize("name", some(NANO))
def test_compiled_and_exported_it_is_the_same(name: str) -> None:
    model = create(name, distilled=True, depths=[1, 1], heads=[3, 6]).train()
    model.set_distilled_training(True)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    images, gradients = pixels(2, 3, 32, 32), []
    for one in (model, compiled):
        model.zero_grad()
        output = torch.stack(one(images))
        output.square().sum().backward()
        gradients.append([output.detach(), *(parameter.grad.clone() for parameter in model.parameters())])
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)
    model.eval()
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(model, (images,), dynamic_shapes=({0: batch},))
    torch.testing.assert_close(program.module()(pixels(5, 3, 32, 32)), model(pixels(5, 3, 32, 32)), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"heads": [3, 5, 12]}, "width of 96 does not divide into 5 heads"),
        ({"heads": [3, 6]}, "3 depths and 2 heads"),
        ({"img_size": 8}, "too deep for 8 px"),
        ({"global_pool": "max"}, "global_pool"),
    ],
    ids=str,
)
@pytest.mark.parametrize("name", NANO)
def test_what_cannot_be_built_is_refused(name: str, arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        create(name, **arguments)
