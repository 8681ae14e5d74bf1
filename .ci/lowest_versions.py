"""Print the lowest version of each dependency and extra, as pip takes it: `lowest_versions.py pyproject.toml`."""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path


def lowest_versions(pyproject: str) -> list[str]:
    """`name>=version`, perhaps with `,<version`, -> `name==version`, each once, in their order; else a ValueError."""
    project = tomllib.loads(pyproject)["project"]
    requirements = [
        *project["dependencies"],
        *(item for extra in project["optional-dependencies"].values() for item in extra),
    ]
    if wrong := [item for item in requirements if not re.fullmatch(r"[\w-]+>=[\d.]+(,<[\d.]+)?", item)]:
        raise ValueError(f"requirements are of the form name>=version, got {', '.join(wrong)}")
    return [item.partition(",")[0].replace(">=", "==") for item in dict.fromkeys(requirements)]


if __name__ == "__main__":
    print("\n".join(lowest_versions(Path(sys.argv[1]).read_text(encoding="utf-8"))))
