"""What is written down of attention is what the modules do."""

from __future__ import annotations

from dataclasses import replace

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from distill.analysis.attention import attention_maps, look
from distill.inputs import InputContract
from distill.recipe import from_mapping
from distill.students import Student, build_student
from distill.students.attention import AttentionKind, AttentionMaps
from distill.students.attention.area import AreaAttention
from distill.students.attention.area_pooling import Areas, coverage, pool
from distill.students.attention.base import PatchGrid
from tests.students.helpers import KINDS


def student(attention: dict[str, object], **changes: object) -> Student:
    given = {"model": "vit_nano", "patch_size": 4, "attention": attention, "distillation_token": True} | changes
    recipe = from_mapping({"student": given, "distill": []}, source="test")
    statistics = {"channels": 3, "mean": (0.5,) * 3, "std": (0.25,) * 3}
    return build_student(recipe.student, resolution=16, num_classes=4, seed=0, **statistics).eval()  # type: ignore[arg-type]


@pytest.mark.parametrize("key_mode", ["mean", "max", "sum", "max_concat"])
@pytest.mark.parametrize(("max_area", "grid"), [(2, None), ((2, 2), PatchGrid(3, 4))])
@pytest.mark.parametrize("top_k", [0, 3])
def test_weights_times_area_values_are_what_area_attention_answers(
    key_mode: str, max_area: object, grid: PatchGrid | None, top_k: int
) -> None:
    torch.manual_seed(0)
    module = AreaAttention(
        24, 3, max_area=max_area, grid=grid, num_prefix_tokens=2, key_mode=key_mode, top_k=top_k
    ).eval()  # type: ignore[arg-type]
    tokens = torch.randn(2, 14, 24)
    maps = attention_maps(module, tokens, queries=14)
    assert maps is not None
    weights, areas = maps.weights, module.areas(14)
    assert torch.allclose(weights.sum(-1), torch.ones(2, 3, 14))
    value = module.qkv(tokens).view(2, 14, 3, 3, 8).permute(2, 0, 3, 1, 4)[2]
    answer = module.proj((weights @ pool(value, areas, "sum")).transpose(1, 2).flatten(2))
    assert torch.allclose(answer, module(tokens), atol=1e-5)
    # A sum over areas is a sum over tokens, each as often as areas with weight cover it.
    by_token = module.proj(((weights @ maps.covered) @ value).transpose(1, 2).flatten(2))
    assert torch.allclose(by_token, answer, atol=1e-5)


def test_areas_of_a_run_cover_the_patches_that_they_name() -> None:
    covered = coverage(Areas.of(6, 2))
    assert covered.tolist()[:6] == torch.eye(6).tolist()
    assert [row.nonzero()[:, 0].tolist() for row in covered[6:]] == [[i, i + 1] for i in range(5)]
    boxes = coverage(Areas.of(6, (2, 2), (2, 2), 2))
    assert boxes[-1].tolist() == [0, 0, 1, 1, 1, 1]


@pytest.mark.parametrize(
    "attention", [{"kind": "standard"}, {"kind": "area", "max_area": 2, "blocks": [0, 2]}, *KINDS.values()], ids=str
)
def test_a_student_is_seen_block_by_block(attention: dict[str, object]) -> None:
    model, images = student(attention), torch.rand(3, 3, 16, 16)
    seen = look(model, images, drawn=2)
    assert seen is not None
    assert seen.tokens == ("class token", "distillation token")
    assert seen.patches.shape == (6, 2, 2, 4, 4)
    assert sorted(seen.areas) == ([0, 2] if attention["kind"] == "area" else [])
    if attention["kind"] != "area":  # the weights of patches and prefix tokens sum to 1
        assert seen.patches.min() >= 0
        assert seen.patches.sum((-2, -1)).max() < 1
    for masks in seen.areas.values():
        assert masks.shape == (2, 2, 4, 4, 4)
        assert masks.sum((-2, -1)).max() == 2
    # The cosines, by the model's own parts.
    network = model.model
    with torch.no_grad():
        stream = network._pos_embed(network.patch_embed(model.adapter(images)))
        expected = [F.cosine_similarity(stream[:, 0], stream[:, 1]).mean().item()]
        for block in network.blocks:
            stream = block(stream)
            expected.append(F.cosine_similarity(stream[:, 0], stream[:, 1]).mean().item())
    assert seen.cosines == pytest.approx(expected, abs=1e-5)


class Nearby(AttentionKind):
    """Tokens look at those that are like them."""

    def forward(self, x: Tensor) -> Tensor:
        return self.maps(x, x.shape[1]).weights[:, 0] @ x

    def maps(self, x: Tensor, queries: int) -> AttentionMaps:
        weights = (x[:, :queries] @ x.transpose(1, 2)).softmax(-1)
        return AttentionMaps(weights[:, None], torch.eye(x.shape[1]))


class Foreign(nn.Module):
    """A network of no library's: patches, two layers of attention, the mean."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 8, 4, 4)
        self.layers = nn.ModuleList([Nearby(), Nearby()])
        self.head = nn.Linear(8, 4)

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.patches(images).flatten(2).transpose(1, 2)
        for layer in self.layers:
            tokens = tokens + layer(tokens)
        return self.head(tokens.mean(1))


CONTRACT = InputContract((0.5,) * 3, (0.25,) * 3, 16)


def test_a_strangers_student_is_seen_by_its_own_maps() -> None:
    model, images = Foreign().eval(), torch.rand(2, 3, 16, 16)
    foreign = Student(model, CONTRACT, architecture="foreign", model_args={}).eval()
    seen = look(foreign, images, drawn=1)
    assert seen is not None
    assert (seen.tokens, seen.areas, seen.cosines) == (("mean of all patches",), {}, ())
    assert seen.patches.shape == (2, 1, 1, 4, 4)
    with torch.no_grad():
        tokens = model.patches(foreign.adapter(images[:1])).flatten(2).transpose(1, 2)
    weights = (tokens @ tokens.transpose(1, 2)).softmax(-1)
    assert torch.allclose(seen.patches[0, 0, 0].flatten(), weights[0].mean(0), atol=1e-6)


def test_students_without_such_attention_are_none() -> None:
    for name in ("resnet18", "swin_tiny_patch4_window7_224", "mobilevit_xxs"):
        model: nn.Module = timm.create_model(name, num_classes=4)
        contract = replace(CONTRACT, size=256 if name == "mobilevit_xxs" else 224)
        looked = Student(model, contract, architecture=name, model_args={}).eval()
        assert look(looked, torch.rand(1, 3, 224, 224), drawn=1) is None


def test_a_student_of_one_token_has_no_cosines() -> None:
    seen = look(student({"kind": "standard"}, distillation_token=False), torch.rand(2, 3, 16, 16), drawn=2)
    assert seen is not None
    assert seen.tokens == ("class token",)
    assert seen.patches.shape[2] == 1
    assert seen.cosines == ()


@pytest.mark.parametrize("model", ["focal_nano", "regionvit_nano", "lg_nano"])
def test_pyramids_are_seen_stage_by_stage_on_the_finest_grid(model: str) -> None:
    looked = student({"kind": "standard"}, model=model, patch_size=None, width=12)
    images = torch.rand(3, 3, 16, 16)
    seen = look(looked, images, drawn=2)
    assert seen is not None
    assert (seen.tokens, seen.cosines, seen.side) == (("mean of all places",), (), 8)
    assert seen.patches.shape == (6, 2, 1, 8, 8)
    # A place of a coarser grid is a square of the finest one.
    for block, side in enumerate((8, 8, 4, 4, 2, 2)):
        squares = seen.patches[block].unfold(-2, 8 // side, 8 // side).unfold(-2, 8 // side, 8 // side)
        assert (squares == squares[..., :1, :1]).all()
        if model != "focal_nano":  # where windows of 4x4 places are pooled from the 2x2 that there are
            assert squares[..., 0, 0].sum((-2, -1)).flatten().tolist() == pytest.approx([1.0, 1.0], abs=1e-5)
    # Pooled windows, regions and squares: on grids of 8x8 and 4x4 places they are 4x4.
    covered = {block: masks.sum((-2, -1)).unique().tolist() for block, masks in seen.areas.items()}
    whole = {2: [64], 3: [64], 4: [64], 5: [64]}
    assert covered == {0: [16], 1: [16]} | ({2: [16], 3: [16]} if model == "lg_nano" else whole)
