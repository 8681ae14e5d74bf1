"""Names that installed packages know, read from their source without importing them and torch."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from distill import registry

TIMM_MODEL = re.compile(r"^@register_model\n(?:@.*\n)*def (\w+)\(", re.MULTILINE)
OLD_TIMM_MODELS = re.compile(r"^register_model_deprecations\(__name__, \{\n([\s\S]*?)^\}\)", re.MULTILINE)
OLD_TIMM_MODEL = re.compile(r"^ +'(\w+)' ?: '", re.MULTILINE)
TORCHVISION_MODEL = re.compile(r"^@register_model\((?:name=\"(\w+)\")?\)[\s\S]*?^def (\w+)\(", re.MULTILINE)
OPTIMIZER = re.compile(r"(?:OptimInfo\(|register_alias\()\s*(?:name=)?'(\w+)'")


def own_students() -> list[str]:
    """Names of this project's students, and of loaded plugins'."""
    return [name for options in registry.options_of("students").values() for name in getattr(options, "models", ())]


@cache
def timm_models() -> frozenset[str]:
    """Names of the installed timm's models, out of its source, and of this project's CNNs."""
    found = {name for text in _sources("timm", "models") for name in TIMM_MODEL.findall(text)}
    own = Path(__file__).resolve().parents[2] / "teachers"
    return frozenset(
        found | {name for path in own.glob("*.py") for name in TIMM_MODEL.findall(path.read_text("utf-8"))}
    )


@cache
def old_timm_models() -> frozenset[str]:
    """Names that models of the installed timm had earlier, under which it still builds them."""
    mappings = (mapping for text in _sources("timm", "models") for mapping in OLD_TIMM_MODELS.findall(text))
    return frozenset(name for mapping in mappings for name in OLD_TIMM_MODEL.findall(mapping))


@cache
def torchvision_models() -> frozenset[str]:
    """Names of the installed torchvision's models, out of its source."""
    found = (match for text in _sources("torchvision", "models") for match in TORCHVISION_MODEL.findall(text))
    return frozenset(given or function for given, function in found)


@cache
def optimizers() -> frozenset[str]:
    """Names of the installed timm's optimizers, out of its source."""
    return frozenset(name for text in _sources("timm", "optim/_optim_factory.py") for name in OPTIMIZER.findall(text))


def _sources(package: str, part: str) -> Iterator[str]:
    """The text of a file, or of all files of a folder, in an installed package, which is not imported."""
    spec = find_spec(package)
    if spec is None or spec.origin is None:
        return
    path = Path(spec.origin).parent / part
    for file in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
        yield file.read_text(encoding="utf-8")
