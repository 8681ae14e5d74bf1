"""The reference has every key, command, function and file of the code."""

from __future__ import annotations

import re

import distill
from distill.cli import COMMANDS
from distill.recipe import Recipe, load
from docs.build import GENERATED, remote
from docs.generate import PAGES, commands, python, recipe
from tests.docs.blocks import PAGES as FILES
from tests.docs.blocks import ROOT


def test_every_key_of_a_recipe_is_there_once_in_its_section() -> None:
    sections = dict(re.findall(r"^#{3,4} (.+?)\n(.*?)(?=^#{3,4} |\Z)", recipe(), flags=re.MULTILINE | re.DOTALL))
    rows = {name: re.findall(r"^\| `(\w+)`", text, flags=re.MULTILINE) for name, text in sections.items()}
    assert rows["The recipe itself"] == list(Recipe.model_fields)
    assert [name for name, keys in rows.items() if len(set(keys)) != len(keys)] == []
    assert {"max_area", "key_mode", "value_mode", "top_k"} <= set(rows["area"])
    assert {"temperature", "standardize"} <= set(rows["soft"])
    named = {key for keys in rows.values() for key in keys}
    keys = {part for key in load(ROOT / "recipes" / "cifar10" / "laptop.yaml").flat() for part in key.split(".")}
    assert {key for key in keys if not key.isdigit()} - named == {"method"}


def test_types_ranges_and_defaults_are_told() -> None:
    text = recipe()
    assert "| `batch_size` | int above 0 | `1024` |" in text
    assert '| `fit` | `crop`, `squash` or `pad` | `"crop"` |' in text
    assert r"| `root`\* | string | " in text


def test_commands_have_the_help_of_a_terminal() -> None:
    text = commands()
    assert re.findall(r"^## distill (\w+)$", text, flags=re.MULTILINE) == list(COMMANDS)
    assert text.count("usage: distill ") == len(COMMANDS)
    assert "\x1b" not in text


def test_every_public_name_is_documented() -> None:
    assert sorted(re.findall(r"^ +heading: distill\.(\w+)$", python(), flags=re.MULTILINE)) == sorted(distill.__all__)


def test_each_generated_page_has_its_place() -> None:
    places = [place for page in FILES for place in GENERATED.findall((ROOT / page).read_text(encoding="utf-8"))]
    assert sorted(places) == sorted(PAGES)


def test_what_comes_from_elsewhere_is_found() -> None:
    loaded = ['<link rel="stylesheet" href="https://example.org/css">', "<img src=//example.org/a>"]
    here = ['<a href="https://example.org">', '<script src="../a.js">', '<link rel="canonical" href="https://a.org/">']
    assert remote(" ".join([*here, *loaded])) == loaded
