"""Recipes as files: YAML 1.2 numbers, no key twice, no tag that builds an object, one message for what is no recipe."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import yaml

from distill.errors import InputError
from distill.recipe import from_mapping, load, read_yaml


def test_yaml_numbers_are_those_of_yaml_1_2() -> None:
    values = {"1e-3": 1e-3, "1.0e-3": 1e-3, "-2E+4": -2e4, ".5e1": 5.0, "3": 3, "0.1": 0.1, "1e": "1e", "e3": "e3"}
    for text, value in values.items():
        assert read_yaml(text, source="x") == value
        assert type(read_yaml(text, source="x")) is type(value)


# Ten of ten of ten ...: a few hundred bytes that stand for 10**9 values; the same by merging.
BOMB = "a: &a [x]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 10)}]\n" for old, new in pairwise("abcdefghij")
)
MERGED_BOMB = "a: &a {x: 1}\n" + "".join(
    f"k{new}: &k{new} {{<<: [*{old}, *{old}]}}\n" for old, new in [("a", 0), *((f"k{at}", at + 1) for at in range(40))]
)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("train: {epochs: 1}\ntrain: {epochs: 2}\n", "line 2, column 1): duplicate key 'train'"),
        ("train: {epochs: 1, seed: 0, epochs: 2}\n", "duplicate key 'epochs'"),
        ("teacher:\n  - model: a\n    model: b\n", "line 3, column 5): duplicate key 'model'"),
        ("train: [\n", "not valid YAML (line 2"),
        ("\tname: x\n", "not valid YAML (line 1"),
        ("name: a\n---\nname: b\n", "another document"),
        ("? [a, b]\n: c\n", "unhashable"),
        ("- name: a\n", "not a list"),
        ("just words\n", "not a str"),
        pytest.param("[" * 4000, "not valid YAML", id="deep"),
        ("name: \x00\n", "not valid YAML"),
        ("teacher: &a {model: x, again: *a}\n", "line 1, column 31): an alias refers to a section that contains it"),
        pytest.param(BOMB, "more than 100,000 values", id="bomb"),
        pytest.param(MERGED_BOMB, "more than 100,000 values", id="merged bomb"),
        ("- " * 60, "nested more than 50 deep"),
        pytest.param("seed: " + "9" * 5000, "not valid YAML", id="digits"),
        ("seed: 2024-13-45\n", "month must be in 1..12"),
        ("control: !!bool perhaps\n", "not valid YAML"),
        pytest.param("#" * 1_000_001, "longer than 1,000,000 characters", id="long"),
        ('data: {root: "a\\eb"}\n', "data.root: should have no control characters"),
        ('"a\\eb": 1\n', "a\\x1bb: unknown key"),
    ],
)
def test_files_that_are_no_recipe_are_refused_by_name(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(text)
    with pytest.raises(InputError) as caught:
        load(path)
    assert words in str(caught.value)
    assert str(path) in str(caught.value)


def test_files_that_cannot_be_read_are_refused_by_name(tmp_path: Path) -> None:
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"name: \xff\xfe")
    for path, words in ((tmp_path / "absent.yaml", "no such file"), (tmp_path, "directory"), (binary, "decode")):
        with pytest.raises(InputError) as caught:
            load(path)
        assert words in str(caught.value)
        assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    "tag", ["!!python/object/apply:os.system", "!!python/object/new:os.system", "!!python/name:os.system"]
)
def test_tags_that_build_objects_are_refused_and_do_nothing(tmp_path: Path, tag: str) -> None:
    mark = tmp_path / "executed"
    text = f"name: {tag} ['touch {mark}']"
    yaml.compose(text)  # it is YAML
    path = tmp_path / "r.yaml"
    path.write_text(text)
    with pytest.raises(InputError, match="tag"):
        load(path)
    with pytest.raises(InputError, match="tag"):
        from_mapping({}, [f"name={tag} ['touch {mark}']"])
    assert not mark.exists()


def test_the_mark_would_appear_if_tags_were_followed(tmp_path: Path) -> None:
    mark = tmp_path / "executed"
    yaml.unsafe_load(f"name: !!python/object/apply:os.system ['touch {mark}']")
    assert mark.exists()
