"""Recipes cannot lie: a mistyped key is never passed over, and whatever a recipe says, it is valid or refused with one
message.
"""

from __future__ import annotations

import copy
import random
import string
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from distill.errors import InputError
from distill.recipe import Recipe, from_mapping, load, read_yaml
from distill.recipe.loading import _keys_under, _known_keys
from tests.conftest import Counted

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = sorted(path for path in (ROOT / "recipes").rglob("*.yaml") if "accelerate" not in path.parts)
LETTERS = string.ascii_lowercase + "_"


def typos(word: str) -> set[str]:
    """Everything one deletion, insertion, substitution or transposition away."""
    cuts = [(word[:at], word[at:]) for at in range(len(word) + 1)]
    deleted = {left + right[1:] for left, right in cuts if right}
    transposed = {left + right[1] + right[0] + right[2:] for left, right in cuts if len(right) > 1}
    inserted = {left + letter + right for left, right in cuts for letter in LETTERS}
    substituted = {left + letter + right[1:] for left, right in cuts if right for letter in LETTERS}
    return (deleted | transposed | inserted | substituted) - {word, ""}


LISTS = {"distill", "pairs", "views"}
"""Keys of lists of sections."""


def holding(path: tuple[str, ...], key: str) -> tuple[dict[str, Any], str]:
    """A recipe in which `key` stands where the last key of `path` belongs, and the dotted path that it has there."""
    inner: dict[str, Any] = {key: 1}
    if path[:-1] == ("student", "attention"):
        inner |= {} if path[-1] == "kind" else {"kind": "area"}
    dotted = key
    for depth in range(len(path) - 1, 0, -1):
        section = path[depth - 1]
        if section == "distill" and path[-1] != "method":
            inner |= {"method": "soft" if depth == len(path) - 1 else "guide"}
        inner = {section: [inner] if section in LISTS else inner}
        dotted = f"{section}.0.{dotted}" if section in LISTS else f"{section}.{dotted}"
    return inner, dotted


def problems_of(raw: dict[str, Any]) -> dict[str, str]:
    with pytest.raises(InputError) as caught:
        from_mapping(raw, source="r.yaml")
    return dict(line.strip().split(": ", 1) for line in str(caught.value).splitlines()[1:])


@pytest.mark.parametrize("per_key", [20, pytest.param(10**9, marks=pytest.mark.soak)])
def test_every_typo_of_every_key_is_rejected_and_its_key_suggested(per_key: int, counted: Counted) -> None:
    chance = random.Random(0)
    tried = rejected = suggested = 0
    for path in sorted(set(_known_keys())):
        words = sorted(typos(path[-1]) - set(_keys_under(path[:-1])))
        for word in chance.sample(words, min(per_key, len(words))):
            tried += 1
            recipe, at = holding(path, word)
            message = problems_of(recipe).get(at, "")
            rejected += message.startswith("unknown key")
            suggested += message.endswith(f"did you mean '{path[-1]}'?")
    share = suggested / tried
    counted("typos of recipe keys rejected", done=rejected, of=tried, suggested=suggested, share=round(share, 4))
    assert share >= 0.95


class Weird:
    """Values that no key wants, or that stand at some limit."""

    SCALARS: tuple[Any, ...] = (
        None, True, False, 0, 1, -1, 2, 7, 0.5, -0.0, 1e-300, 1e300, -1e300, float("inf"), float("nan"),
        2**31, 2**63, 2**64, -(2**63) - 1, 10**400, "", " ", "0", "null", "ü€\u202e\U0001d518",
        "\x00", "\x1b[31m", "\ud800",
        "a" * 10_000, "<script>", "../..", "[", "!!python/name:os.system", "area", "hard", "auto", "vit_nano",
        "resnet18", "cifar_resnet20", "digits", "test", "2024-13-45", b"\xff",
    )  # fmt: skip

    @classmethod
    def value(cls, chance: random.Random, depth: int = 0) -> Any:
        kind = chance.random()
        if kind < 0.75 or depth > 3:
            return chance.choice(cls.SCALARS)
        if kind < 0.85:
            return [cls.value(chance, depth + 1) for _ in range(chance.randrange(4))]
        keys = [key for path in chance.choices(_known_keys(), k=2) for key in path[-1:]]
        return {key: cls.value(chance, depth + 1) for key in chance.sample([*keys, "?", 1, None], chance.randrange(4))}


def places(node: Any) -> Iterator[tuple[Any, Any]]:
    """Every (container, key or index) in plain data."""
    for key in list(node) if isinstance(node, dict) else range(len(node)):
        yield node, key
        if isinstance(node[key], dict | list):
            yield from places(node[key])


def mutate_data(raw: dict[str, Any], chance: random.Random) -> str:
    """Change the recipe as data in one to three places."""
    raw = copy.deepcopy(raw)
    for _ in range(chance.choice([1, 1, 2, 3])):
        if not raw:
            break
        node, key = chance.choice(list(places(raw)))
        how = chance.randrange(6)
        if how == 0:
            node[key] = Weird.value(chance)
        elif how == 1:
            del node[key]
        elif how == 2:
            node[key] = [node[key]]
        elif how == 3:
            path = chance.choice(_known_keys())
            inner = raw
            for part in path[:-1]:
                inner = inner.setdefault(part, {}) if isinstance(inner, dict) else {}
            if isinstance(inner, dict):
                inner[path[-1]] = Weird.value(chance)
        elif how == 4 and isinstance(node[key], int | float):
            node[key] *= chance.choice([-1, 0, 0.5, 2, 3, 10, 1e9])
        else:
            for _ in range(chance.choice([1, 30, 80])):
                node[key] = {"data": node[key]}
    return yaml.dump(raw, sort_keys=False, allow_unicode=True)


def mutate_text(text: str, chance: random.Random) -> str:
    """Change the file as characters or lines."""
    for _ in range(chance.choice([1, 1, 2, 4])):
        at = chance.randrange(len(text))
        lines = text.splitlines(keepends=True)
        row = chance.randrange(len(lines))
        how = chance.randrange(6)
        if how == 0:
            text = text[:at] + text[at + chance.randint(1, 5) :]
        elif how == 1:
            text = (
                text[:at]
                + chance.choice([*string.printable, "&a ", "*a", "<<: *a", "!!set ", "\x00", "é", "- "])
                + text[at:]
            )
        elif how == 2:
            text = "".join([*lines[:row], lines[row], *lines[row:]])
        elif how == 3:
            text = "".join([*lines[:row], *lines[row + 1 :]])
        elif how == 4:
            text = "".join([*lines[:row], chance.choice([" ", "\t", "  "]), *lines[row:]])
        else:
            chance.shuffle(lines)
            text = "".join(lines)
        text = text or "\n"
    return text


def an_override(chance: random.Random) -> str:
    path = list(chance.choice(_known_keys()))
    if chance.random() < 0.3:
        path.insert(chance.randrange(len(path) + 1), chance.choice(["0", "1", "x", "-1", "", "9" * 30]))
    value = chance.choice([repr(chance.choice(Weird.SCALARS)), "[1, 2]", "{a: 1}", "[", "&a [*a]", "1e400", "1:30", ""])
    return ".".join(path) + chance.choice(["=", "=", "=", "==", "", " = "]) + value


def mutants(count: int, seed: int) -> Iterator[tuple[str, list[str]]]:
    """YAML texts and overrides, made from the shipped recipes."""
    chance = random.Random(seed)
    sources = [path.read_text(encoding="utf-8") for path in SHIPPED]
    parsed = [read_yaml(text, source="shipped") for text in sources]
    for _ in range(count):
        index = chance.randrange(len(sources))
        text = mutate_data(parsed[index], chance) if chance.random() < 0.5 else mutate_text(sources[index], chance)
        yield text, [an_override(chance) for _ in range(chance.choice([0, 0, 0, 1, 3]))]


def resolved(path: Path, text: str, overrides: list[str]) -> Recipe | None:
    """The recipe, or None where it is refused as it should be; anything else fails."""
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    try:
        return load(path, overrides)
    except InputError as error:
        message = str(error)
        assert str(path) in message
        assert len(message) < 20_000
        assert len(message.splitlines()) < 50
        assert message.replace("\n", " ").replace(str(path), "").isprintable(), repr(message)
        return None


@pytest.mark.parametrize("count", [300, pytest.param(10_000, marks=pytest.mark.soak)])
def test_a_mutated_recipe_is_valid_or_refused_with_a_message(count: int, tmp_path: Path, counted: Counted) -> None:
    path, valid = tmp_path / "mutant.yaml", 0
    held = 0
    for text, overrides in mutants(count, seed=1):
        recipe = resolved(path, text, overrides)
        if recipe is not None:
            valid += 1
            again = from_mapping(read_yaml(recipe.to_yaml(), source="resolved"), source="resolved")
            assert again == recipe, recipe.to_yaml()
            assert again.to_yaml() == recipe.to_yaml()
            assert again.digest() == recipe.digest()
        held += 1
    assert 0 < valid < count
    counted("mutated recipes valid or refused", done=held, of=count, valid=valid, refused=count - valid)
