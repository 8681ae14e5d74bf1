"""Licences of teachers' weights: where they are stated, and what they allow."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from distill.errors import InputError
from distill.files.plain_data import MOST_BYTES
from distill.files.regular import read_bytes
from distill.recipe import read_yaml

FREE = frozenset(
    ["apache-2.0", "mit", "bsd", "bsd-2-clause", "bsd-3-clause", "isc", "unlicense", "cc0-1.0", "cc-by-4.0"]
)
"""Those that ask for no more than to be named."""
NOT_COMMERCIAL = re.compile(r"(^|-)nc(-|$)|non-?commercial|research|^apple-amlr$")
"""In the identifiers of licences that exclude commercial use."""


class Origin(NamedTuple):
    """Where a teacher's weights come from."""

    license: str | None = None
    """Its identifier, as the Hugging Face Hub writes it; None: unknown."""
    base_model: str | None = None
    """Their name on the Hub; None: they are not from there."""


def identifier(value: Any) -> str | None:
    """A licence as a card, a configuration or the zoo states it; None: it states none."""
    text = value.strip().lower() if isinstance(value, str) else ""
    return text if re.fullmatch(r"[a-z0-9][a-z0-9.-]{0,60}", text) and text not in ("unknown", "none") else None


def is_free(license: str | None) -> bool:
    return license in FREE


def brief(license: str | None) -> str:
    """What a licence restricts, in a word or two; empty: nothing."""
    if license is None:
        return "unknown"
    if NOT_COMMERCIAL.search(license):
        return "non-commercial"
    return "" if is_free(license) else "its own terms"


def remark(name: str, license: str | None) -> str:
    """What to know of a teacher's licence before its student is used or passed on."""
    if license is None:
        return f"teacher {name}: the licence of its weights is unknown"
    if NOT_COMMERCIAL.search(license):
        return (
            f"teacher {name}: the licence of its weights, {license}, excludes commercial use, which may bind what is "
            "learned from them too"
        )
    if not is_free(license):
        return f"teacher {name}: the licence of its weights, {license}, has terms of its own: read them"
    return f"teacher {name}: the licence of its weights is {license}"


def of_folder(folder: Path, config: Mapping[str, Any]) -> Origin:
    """By the front matter of a folder's README.md, else by its configuration."""
    card: Any = None
    try:
        text = (read_bytes(folder / "README.md", MOST_BYTES, links=True) or b"").decode(errors="replace")
        if found := re.match(r"---\r?\n(.*?)\r?\n---", text, re.DOTALL):
            card = read_yaml(found[1], source="README.md")
    except InputError:
        pass
    card = card if isinstance(card, Mapping) else {}
    base = card.get("base_model")
    base = base[0] if isinstance(base, list) and base else base
    license = identifier(card.get("license")) or identifier(config.get("license"))
    return Origin(license, base if isinstance(base, str) and re.fullmatch(r"[\w.-]+/[\w.-]+", base) else None)


def of_hub(name: str, config: Mapping[str, Any]) -> Origin:
    """By a model's card on the Hub, else by its configuration."""
    from huggingface_hub import ModelCard

    repository = name.partition("@")[0]
    license = identifier(config.get("license"))
    if license is None:
        try:
            license = identifier(ModelCard.load(repository).data.license)
        except Exception:  # a card is no condition: it may be missing, invalid, or not at hand without network
            license = None
    return Origin(license, repository)
