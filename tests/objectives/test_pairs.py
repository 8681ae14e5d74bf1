"""Which maps stand beside which blocks."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from distill.features import Features
from distill.objectives import Objectives, Seen
from distill.objectives.fitnet import Fitnet
from distill.objectives.guide import Guide
from distill.objectives.maps import pairs_of, spread
from distill.recipe import objectives as sections
from tests.objectives.helpers import normal


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


def objectives(*on_maps: sections.OnMaps, on_logits: tuple[sections.OnLogits, ...] = ()) -> Objectives:
    """Between a student of six blocks, each with another width, and a teacher of three maps."""
    torch.manual_seed(0)
    return Objectives(
        on_logits,
        on_maps,
        label_smoothing=0.0,
        student_channels=[2, 3, 4, 5, 6, 7],
        teacher_channels={"a": 8, "b": 16, "c": 32, "inside": 64},
        stages=MAPS,
    )


def pair(block: int | None, name: str | None) -> sections.Pair:
    return sections.Pair(block=block, map=name)


def test_what_is_asked_of_student_and_teacher() -> None:
    found = objectives(sections.Guide(), sections.Relational(), sections.Fitnet(pairs=[pair(3, "inside")]))
    assert found.on_maps == {
        "guide": [(1, "a"), (3, "b"), (5, "c")],
        "relational": [(5, "c")],
        "fitnet": [(3, "inside")],
    }
    assert found.blocks == (1, 3, 5)
    assert set(found.maps) == {"a", "b", "c", "inside"}
    none = objectives(on_logits=(sections.Hard(),))
    assert (none.blocks, none.maps, none.state_dict()) == ((), (), {})


def test_what_is_owned_has_the_widths_of_its_pairs() -> None:
    found = objectives(sections.Guide(), sections.Similarity(), sections.Fitnet())
    assert {name: tuple(value.shape) for name, value in found.named_parameters() if value.ndim > 1} == {
        "owned.guide.0.projection.weight": (8, 3, 1, 1),
        "owned.guide.1.projection.weight": (16, 5, 1, 1),
        "owned.guide.2.projection.weight": (32, 7, 1, 1),
        "owned.fitnet.0.regressor.weight": (16, 4, 1, 1),
    }
    assert {type(module) for module in found.modules()} >= {Guide, Fitnet}


def test_the_loss_of_a_method_is_the_mean_over_its_pairs() -> None:
    """Each with its own block, map and projection."""
    found = objectives(sections.Guide(pairs=[pair(4, "b"), pair(None, "a"), pair(4, "b")]))
    assert found.blocks == (4, 5)
    student = {block: normal(block, 2, block + 2, 4, 4).float() for block in range(6)}
    seen = Seen(normal(9, 2, 3).float(), {"a": normal(6, 2, 8, 8, 8).float(), "b": normal(7, 2, 16, 4, 4).float()})
    heads = {"cls": normal(8, 2, 3).float()}
    targets = torch.eye(3)[:2]
    parts = found(Features(heads, {4: student[4], 5: student[5]}), targets, seen)
    owned = found.owned["guide"]
    assert isinstance(owned, nn.ModuleList)
    by_hand = [owned[0](student[4], seen.maps["b"]), owned[1](student[5], seen.maps["a"])]
    by_hand.append(owned[2](student[4], seen.maps["b"]))
    assert by_hand[0] != by_hand[2], "a projection for each pair"
    assert list(parts) == ["label", "guide"]
    torch.testing.assert_close(parts["guide"], sum(by_hand) / 3)


@pytest.mark.parametrize("with_logits", [False, True])
def test_who_learns_the_labels(with_logits: bool) -> None:
    """Both heads where nothing else teaches the second: maps do not."""
    found = objectives(sections.Similarity(), on_logits=(sections.Soft(),) if with_logits else ())
    cls, second, targets = normal(0, 2, 3).float(), normal(1, 2, 3).float(), torch.eye(3)[:2]
    seen = Seen(normal(2, 2, 3).float(), {"c": normal(3, 2, 32, 2, 2).float()})
    student = Features({"cls": cls, "dist": second}, {5: normal(4, 2, 7, 4, 4).float()})
    parts = found(student, targets, seen)
    losses = [-(head.log_softmax(1) * targets).sum(1).mean() for head in (cls, second)]
    torch.testing.assert_close(parts["label"], losses[0] if with_logits else (losses[0] + losses[1]) / 2)
    assert set(parts) == {"label", "similarity"} | ({"soft"} if with_logits else set())


def test_a_block_that_there_is_not() -> None:
    with pytest.raises(ValueError, match=r"the student has blocks 0 to 5, got \[6\]"):
        objectives(sections.Guide(pairs=[pair(6, "a")]))
