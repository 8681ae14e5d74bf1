"""Tokens of a block as a grid, beside what forward hooks see."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from distill.errors import InputError
from distill.features import Stage
from distill.students import Student, build_student
from tests.students.helpers import KINDS, student_options

AREA = {"kind": "area", "max_area": 2, "blocks": [0, 1]}
AREAS_2D = {"kind": "area", "max_area": [2, 2], "blocks": [0, 2]}
VITS: dict[str, tuple[int, dict[str, Any]]] = {
    "plain": (32, {"patch_size": 8}),
    "plain, one token": (32, {"patch_size": 8, "distillation_token": False}),
    "area": (32, {"patch_size": 8, "attention": AREA}),
    "area, one token": (32, {"patch_size": 8, "attention": AREA, "distillation_token": False}),
    "areas on the grid": (32, {"patch_size": 8, "attention": AREAS_2D}),
    "patch 4": (32, {"patch_size": 4, "attention": AREAS_2D}),
    "64 px": (64, {"patch_size": 8, "attention": AREA}),
    "64 px, plain": (64, {"patch_size": 8}),
    "conv stem": (32, {"patch_size": 8, "stem": "conv"}),
    **{name: (32, {"patch_size": 8, "attention": attention}) for name, attention in KINDS.items()},
    "conv stem, areas": (32, {"patch_size": 4, "stem": "conv", "attention": AREAS_2D, "distillation_token": False}),
}
# Stages of others: the modules whose outputs they are, and how these turn into [B, D, H, W].
OTHERS = {
    "cifar_resnet20": (["layer1", "layer2", "layer3"], False),
    "resnet18": (["act1", "layer1", "layer2", "layer3", "layer4"], False),
    "convnext_atto": ([f"stages.{stage}" for stage in range(4)], False),
    "swin_tiny_patch4_window7_224": ([f"layers.{stage}" for stage in range(4)], True),
    "focal_nano": ([f"stages.{stage}" for stage in range(3)], True),
    "lg_nano": ([f"stages.{stage}" for stage in range(3)], True),
}


def student_of(resolution: int, **spec: Any) -> Student:
    """With weights and biases that are all different."""
    section = student_options(**{"model": "vit_nano", **spec})
    student = build_student(
        section, resolution=resolution, num_classes=5, channels=3, mean=(0.5, 0.4, 0.3), std=(0.2,) * 3, seed=0
    )
    generator = torch.Generator().manual_seed(0)
    for parameter in student.parameters():
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    return student


def images_of(side: int, batch: int = 2) -> Tensor:
    return torch.rand(batch, 3, side, side, generator=torch.Generator().manual_seed(5))


def outputs_of(student: Student, modules: list[nn.Module], images: Tensor) -> list[Tensor]:
    found: dict[int, Tensor] = {}
    handles = [
        module.register_forward_hook(lambda _m, _i, output, place=place: found.__setitem__(place, output.clone()))
        for place, module in enumerate(modules)
    ]
    torch.manual_seed(0)
    student(images)
    for handle in handles:
        handle.remove()
    return [found[place] for place in range(len(modules))]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", VITS)
def test_the_grid_is_the_tokens_in_their_order(name: str, training: bool) -> None:
    resolution, spec = VITS[name]
    student = student_of(resolution, **spec).train(training)
    model: Any = student.model
    images, side = images_of(resolution), resolution // spec["patch_size"]
    assert student.stages == tuple(Stage(f"blocks.{block}", 96, spec["patch_size"]) for block in range(6))
    assert student.training == training
    tokens = outputs_of(student, list(model.blocks), images)
    plain = student(images)
    prefix = 1 if spec.get("distillation_token") is False else 2
    assert tokens[0].shape == (2, prefix + side * side, 96)
    for blocks in ((0, 1, 2, 3, 4, 5), (1, 3, 5), (0,), (5,)):
        logits, maps, *_ = student(images, blocks)
        assert tuple(logits) == tuple(plain.logits) == student.heads
        assert len(logits) == prefix
        assert all(torch.equal(logits[head], plain.logits[head]) for head in logits)
        assert tuple(maps) == blocks
        for block, found in maps.items():
            expected = torch.empty(2, 96, side, side)
            for row in range(side):
                for column in range(side):
                    expected[:, :, row, column] = tokens[block][:, prefix + row * side + column]
            assert torch.equal(found, expected), block


def test_a_token_stands_where_its_patch_is() -> None:
    """What changes in one patch changes, before anything is mixed, one place of the grid: row, then column."""
    student = student_of(32, patch_size=8)
    model: Any = student.model
    for block in model.blocks:
        nn.init.zeros_(block.attn.proj.weight)  # tokens do not see each other
    images, changed = images_of(32, batch=1), images_of(32, batch=1)
    changed[:, :, 8:16, 24:32] = 0.0
    (before, after) = (student(some, (2,)).maps[2] for some in (images, changed))
    assert (before != after).any(1)[0].nonzero().tolist() == [[1, 3]]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", OTHERS)
def test_stages_of_other_models(name: str, training: bool) -> None:
    modules, channels_last = OTHERS[name]
    student, images = student_of(32, model=name).train(training), images_of(32)
    model: Any = student.model
    before = {key: value.clone() for key, value in model.state_dict().items()}
    stages = student.stages
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items()), "nothing is learned"
    assert [stage.name for stage in stages] == modules
    found = outputs_of(student, [model.get_submodule(module) for module in modules], images)
    torch.manual_seed(0)
    plain = student(images)
    for blocks in (tuple(range(len(modules))), (1, len(modules) - 1)):
        torch.manual_seed(0)
        logits, maps, *_ = student(images, blocks)
        assert tuple(logits) == student.heads
        assert all(torch.equal(logits[head], plain.logits[head]) for head in logits)
        assert tuple(maps) == blocks
        for block, one in maps.items():
            expected = found[block].permute(0, 3, 1, 2) if channels_last else found[block]
            assert one.shape[1:] == (stages[block].channels, *[32 // stages[block].stride] * 2)
            assert torch.equal(one, expected), block
    sides = [one.shape[2] for one in student(images, tuple(range(len(modules)))).maps.values()]
    assert sides == sorted(sides, reverse=True)


@pytest.mark.parametrize(
    ("spec", "blocks"),
    [
        ({"patch_size": 8, "attention": AREAS_2D, "drop_path": 0.3}, (1, 4)),
        ({"patch_size": 8, "drop_path": 0.3}, (1, 4)),
        ({"model": "convnext_atto", "drop_path": 0.3}, (0, 3)),
    ],
    ids=["areas", "plain", "CNN"],
)
def test_gradient_checkpointing_changes_no_gradient(spec: dict[str, Any], blocks: tuple[int, ...]) -> None:
    """Of heads and maps together, drop path on."""
    gradients = []
    for checkpointed in (False, True):
        student = student_of(32, **spec).train()
        if checkpointed:
            student.checkpoint_gradients()
        torch.manual_seed(3)
        features = student(images_of(32, batch=4), blocks)
        (features.fused.square().mean() + sum((one**2).mean() for one in features.maps.values())).backward()
        gradients.append([parameter.grad for parameter in student.parameters()])
    assert all(one is not None and torch.equal(one, other) for one, other in zip(*gradients, strict=True))
    assert any(one.abs().max() > 0 for one in gradients[0])


def test_a_model_that_does_not_give_its_maps_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    student = student_of(32, model="cifar_resnet20")
    monkeypatch.delattr(type(student.model), "forward_intermediates")
    with pytest.raises(InputError) as refused:
        _ = student.stages
    assert str(refused.value).startswith("student.model: cifar_resnet20 does not give its feature maps (")
    assert student.training, "it is left as it was"
    assert student(images_of(32)).fused.shape == (2, 5)


@pytest.mark.parametrize("want", [(0,), (0, 1, 2), (2,)])
def test_a_pass_with_other_logits_is_refused(monkeypatch: pytest.MonkeyPatch, want: tuple[int, ...]) -> None:
    """Also where the head begins with zeros, which hides them."""
    student = student_of(32, model="cifar_resnet20")
    nn.init.zeros_(student.model.linear.weight)
    before = {key: value.clone() for key, value in student.model.state_dict().items()}
    student.check_maps(want)
    assert all(torch.equal(value, before[key]) for key, value in student.model.state_dict().items())
    forward = type(student.model).forward_intermediates

    def with_another_end(self: Any, x: Tensor, **options: Any) -> Any:
        _, maps = forward(self, x, **options)
        return maps[-1].sin(), maps

    monkeypatch.setattr(type(student.model), "forward_intermediates", with_another_end)
    with pytest.raises(InputError, match=r"cifar_resnet20 does not give its feature maps \("):
        student.check_maps(want)
    assert all(torch.equal(value, before[key]) for key, value in student.model.state_dict().items())


def test_maps_of_images_of_another_size() -> None:
    """The student resizes them itself."""
    _, maps, *_ = student_of(32, patch_size=8, attention=AREA)(images_of(20), (5,))
    assert maps[5].shape == (2, 96, 4, 4)
