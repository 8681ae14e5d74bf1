"""The blocks of the documentation: where they stand, and what is said of them."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGES = ["README.md", "CONTRIBUTING.md", *sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").rglob("*.md"))]
"""Pages whose blocks are run. README.md is the first: others use what its commands write."""


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    page: str
    line: int
    language: str
    text: str
    not_run: str | None
    """Why it is not run."""
    file: str | None
    """The file that it is the content of."""

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"

    @property
    def commands(self) -> list[str]:
        """Of a shell block: its lines, continued ones joined, without comments."""
        lines = self.text.replace("\\\n", " ").splitlines()
        return [line for line in lines if line.strip() and not line.startswith("#")]


def blocks(page: str) -> list[Block]:
    return list(_blocks(page, (ROOT / page).read_text(encoding="utf-8").splitlines()))


def _blocks(page: str, lines: list[str]) -> Iterator[Block]:
    start = None
    for number, line in enumerate(lines):
        if not line.startswith("```"):
            assert not line.lstrip().startswith("```"), f"{page}:{number + 1}: an indented fence"
        elif start is None:
            start = number
        else:
            before = [text for text in lines[max(0, start - 4) : start] if text.strip()]
            reason = re.fullmatch(r"<!-- not run: (.+) -->", before[-1]) if before else None
            said = before[-2] if reason and len(before) > 1 else before[-1] if before else ""
            file = re.match(r"`([\w-]+\.(?:yaml|py|sbatch))`[^.]*:$", said)
            text = "\n".join([*lines[start + 1 : number], ""])
            yield Block(
                page, start + 1, lines[start][3:], text, reason and reason[1], file and file[1],
            )  # fmt: skip
            start = None
    assert start is None, f"{page}:{start}: a fence without an end"


def words_of(command: str) -> tuple[list[str], str | None]:
    """Words of a simple shell command without variables before it, and the file that its output goes to."""
    words = shlex.split(command.strip().removesuffix("&"), comments=True)
    while words and re.match(r"[A-Z_]+=", words[0]):
        words.pop(0)
    if ">" in words:
        at = words.index(">")
        return words[:at], words[at + 1]
    return words, None
