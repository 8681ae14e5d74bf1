"""Print the N-th ```bash block of a Markdown file: `python readme_blocks.py README.md 1`."""

from __future__ import annotations

import re
import sys
from pathlib import Path


def bash_blocks(markdown: str) -> list[str]:
    """The content of every ```bash block that starts at the beginning of a line, in their order."""
    return re.findall(r"^```bash\n(.*?)^```$", markdown, flags=re.DOTALL | re.MULTILINE)


if __name__ == "__main__":
    path, number = sys.argv[1:]
    print(bash_blocks(Path(path).read_text(encoding="utf-8"))[int(number) - 1], end="")
