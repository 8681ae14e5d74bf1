"""Which maps stand beside which blocks."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from distill.features import Features
from distill.methods import fitnet, guide, hard, relational, similarity, soft
from distill.methods.base import MapsMethod, Method, Shapes
from distill.methods.fitnet import Hint
from distill.methods.guide import Guidance, Guide
from distill.methods.maps import pairs_of, spread
from distill.options import MethodOptions, Pair
from tests.methods.helpers import build_methods, losses_of, normal, task_of


@pytest.mark.parametrize(
    ("number", "depth", "blocks"),
    [
        (3, 6, [1, 3, 5]),
        (5, 12, [2, 4, 7, 9, 11]),
        (4, 12, [2, 5, 8, 11]),
        (1, 6, [5]),
        (6, 6, [0, 1, 2, 3, 4, 5]),
        (2, 3, [1, 2]),
        (1, 1, [0]),
        # More maps than blocks: several stand beside one.
        (5, 3, [0, 1, 1, 2, 2]),
        (3, 1, [0, 0, 0]),
    ],
)
def test_maps_are_spread_over_the_blocks(number: int, depth: int, blocks: list[int]) -> None:
    assert spread(number, depth) == blocks


def test_spread_evenly_in_order_to_the_last() -> None:
    for depth in range(1, 25):
        for number in range(1, 25):
            blocks = spread(number, depth)
            assert len(blocks) == number
            assert blocks == sorted(blocks)
            assert blocks[-1] == depth - 1
            assert blocks[0] >= 0
            # After at least that share of the network, by less than one block.
            for place, block in enumerate(blocks, 1):
                assert block + 1 == math.ceil(place * depth / number)


MAPS = ["a", "b", "c"]


@pytest.mark.parametrize(
    ("pairing", "depth", "maps", "pairs"),
    [
        ("all", 6, MAPS, [(1, "a"), (3, "b"), (5, "c")]),
        ("middle", 6, MAPS, [(2, "b")]),
        ("middle", 12, ["a", "b", "c", "d"], [(5, "b")]),
        ("middle", 1, ["a"], [(0, "a")]),
        ("middle", 3, ["a", "b"], [(1, "a")]),
        ("last", 6, MAPS, [(5, "c")]),
    ],
)
def test_pairs_by_method(pairing: str, depth: int, maps: list[str], pairs: list[tuple[int, str]]) -> None:
    assert pairs_of([], pairing, depth=depth, maps=maps) == pairs


def test_pairs_that_are_given() -> None:
    """None is the last; whatever the method's own pairing; a map may be none of the stages."""
    given = [(0, "b"), (None, "a"), (2, None), (None, None), (2, "inside")]
    for pairing in ("all", "middle", "last"):
        found = pairs_of(given, pairing, depth=6, maps=MAPS)
        assert found == [(0, "b"), (5, "a"), (2, "c"), (5, "c"), (2, "inside")]
    with pytest.raises(ValueError, match=r"the student has blocks 0 to 5, got \[6, 9\]"):
        pairs_of([(6, None), (0, None), (9, "a")], "all", depth=6, maps=MAPS)


# What becomes of them


def methods(*options: MethodOptions) -> dict[str, Method]:
    """Between a student of six blocks, each with another width, and a teacher of three maps."""
    torch.manual_seed(0)
    channels = {"a": 8, "b": 16, "c": 32, "inside": 64}
    return build_methods(options, Shapes([2, 3, 4, 5, 6, 7], channels, MAPS))


def pair(block: int | None, name: str | None) -> Pair:
    return Pair(block=block, map=name)


def test_what_is_asked_of_student_and_teacher() -> None:
    found = methods(guide.Options(), relational.Options(), fitnet.Options(pairs=[pair(3, "inside")]))
    pairs = {name: method.pairs for name, method in found.items() if isinstance(method, MapsMethod)}
    assert pairs == {
        "guide": [(1, "a"), (3, "b"), (5, "c")],
        "relational": [(5, "c")],
        "fitnet": [(3, "inside")],
    }
    assert {name: method.blocks for name, method in found.items()} == {
        "guide": (1, 3, 5),
        "relational": (5,),
        "fitnet": (3,),
    }
    assert {name: set(method.maps) for name, method in found.items()} == {
        "guide": {"a", "b", "c"},
        "relational": {"c"},
        "fitnet": {"inside"},
    }
    assert task_of(found, {"cls": torch.zeros(1, 3)}, {}, None).blocks == (1, 3, 5)
    none = methods(hard.Options())["hard"]
    assert (none.blocks, none.maps, none.state_dict()) == ((), (), {})


def test_what_is_owned_has_the_widths_of_its_pairs() -> None:
    found = nn.ModuleDict(methods(guide.Options(), similarity.Options(), fitnet.Options()))
    assert {name: tuple(value.shape) for name, value in found.named_parameters() if value.ndim > 1} == {
        "guide.guidance.0.projection.weight": (8, 3, 1, 1),
        "guide.guidance.1.projection.weight": (16, 5, 1, 1),
        "guide.guidance.2.projection.weight": (32, 7, 1, 1),
        "fitnet.hints.0.regressor.weight": (16, 4, 1, 1),
    }
    assert {type(module) for module in found.modules()} >= {Guidance, Hint}


def test_the_loss_of_a_method_is_the_mean_over_its_pairs() -> None:
    """Each with its own block, map and projection."""
    found = methods(guide.Options(pairs=[pair(4, "b"), pair(None, "a"), pair(4, "b")]))
    assert found["guide"].blocks == (4, 5)
    student = {block: normal(block, 2, block + 2, 4, 4).float() for block in range(6)}
    maps = {"a": normal(6, 2, 8, 8, 8).float(), "b": normal(7, 2, 16, 4, 4).float()}
    teacher = Features({"cls": normal(9, 2, 3).float()}, maps)
    heads = {"cls": normal(8, 2, 3).float()}
    targets = torch.eye(3)[:2]
    parts = losses_of(task_of(found, heads, {4: student[4], 5: student[5]}, teacher), targets).parts
    assert isinstance(found["guide"], Guide)
    owned = found["guide"].guidance
    by_hand = [owned[0](student[4], maps["b"]), owned[1](student[5], maps["a"])]
    by_hand.append(owned[2](student[4], maps["b"]))
    assert by_hand[0] != by_hand[2], "a projection for each pair"
    assert list(parts) == ["label", "guide"]
    torch.testing.assert_close(parts["guide"], sum(by_hand) / 3)


@pytest.mark.parametrize("with_logits", [False, True])
def test_who_learns_the_labels(with_logits: bool) -> None:
    """Both heads where nothing else teaches the second: maps do not."""
    found = methods(*([soft.Options()] if with_logits else []), similarity.Options())
    cls, second, targets = normal(0, 2, 3).float(), normal(1, 2, 3).float(), torch.eye(3)[:2]
    teacher = Features({"cls": normal(2, 2, 3).float()}, {"c": normal(3, 2, 32, 2, 2).float()})
    task = task_of(found, {"cls": cls, "dist": second}, {5: normal(4, 2, 7, 4, 4).float()}, teacher)
    parts = losses_of(task, targets).parts
    losses = [-(head.log_softmax(1) * targets).sum(1).mean() for head in (cls, second)]
    torch.testing.assert_close(parts["label"], losses[0] if with_logits else (losses[0] + losses[1]) / 2)
    assert set(parts) == {"label", "similarity"} | ({"soft"} if with_logits else set())


def test_a_block_that_there_is_not() -> None:
    with pytest.raises(ValueError, match=r"the student has blocks 0 to 5, got \[6\]"):
        methods(guide.Options(pairs=[pair(6, "a")]))
