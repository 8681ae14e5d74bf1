"""Pages name what exists, lead where they say, and say all that there is to say."""

from __future__ import annotations

import re
import runpy
import subprocess
from pathlib import Path
from urllib.parse import unquote

import pytest

from distill import registry
from distill.cli import COMMANDS
from distill.launching.exit_messages import EXIT_BAD_INPUT, EXIT_FAILED, EXIT_INTERRUPTED
from docs.build import navigation
from tests.docs.blocks import PAGES, ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")


def text_of(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def test_the_first_two_blocks_are_those_that_ci_runs() -> None:
    first, second, *_ = runpy.run_path(str(ROOT / ".ci" / "readme_blocks.py"))["bash_blocks"](README)
    install, launch = first.splitlines()
    assert install == "python -m pip install -e ."
    assert re.fullmatch(r"accelerate launch .* distill/train\.py recipes/quickstart\.yaml", launch)
    assert second == 'python -m pip install -e ".[test]"\npytest\n'


def test_the_readme_is_short() -> None:
    assert len(README.splitlines()) < 150


@pytest.mark.parametrize("page", PAGES)
def test_files_that_are_named_exist(page: str) -> None:
    text = re.sub(r"\]\([^)]*\)", "", text_of(page))  # links have a test of their own
    paths = re.findall(
        r"(?<![\w/])(?:recipes|distill|teachers|tests|docs|results)/[\w./-]+\.(?:yaml|py|md|json)\b", text
    )
    assert [path for path in paths if not (ROOT / path).exists()] == []


def _anchors(page: Path) -> set[str]:
    """Of the headings of a page, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_links_lead_somewhere() -> None:
    command = ["git", "ls-files", "-co", "--exclude-standard", "*.md"]
    documents = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout.split()
    assert {"README.md", "results/README.md", "docs/README.md"} <= set(documents)
    broken = []
    for document in documents:
        for link, anchor in re.findall(r"\]\(([^)\s:#]*)(?:#([^)\s]+))?\)", text_of(document)):
            target = (ROOT / document).parent / unquote(link) if link else ROOT / document
            if not target.exists() or (anchor and anchor not in _anchors(target)):
                broken.append(f"{document}: {link}#{anchor}")
    assert broken == []


def test_every_page_is_in_the_navigation_and_in_the_list() -> None:
    pages = navigation()
    assert len(set(pages)) == len(pages)
    assert [page for page in pages if not (ROOT / page).is_file()] == []
    assert [page for page in PAGES if page not in pages] == []
    listed = re.findall(r"\]\((?!\.\.)([^)#]+)\)", text_of("docs/README.md"))
    assert {f"docs/{link}" for link in listed} == {page for page in PAGES if page.startswith("docs/")} - {
        "docs/README.md"
    }


def test_tests_that_are_named_exist() -> None:
    named = {name for page in PAGES for name in re.findall(r"`(test_\w+)`", text_of(page))}
    assert len(named) > 30
    sources = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py"))
    assert [name for name in sorted(named) if f"def {name}(" not in sources] == []


def test_commands_that_are_named_exist() -> None:
    text = "\n".join(text_of(page) for page in [*PAGES, "CHANGELOG.md"])
    named = set(re.findall(r"(?:^|`)distill ([a-z]+)", text, flags=re.MULTILINE))
    assert len(named) > 10
    assert named <= set(COMMANDS)


def test_every_variant_is_explained() -> None:
    methods, students = text_of("docs/explanation/methods.md"), text_of("docs/explanation/students.md")
    assert [name for name in registry.options_of("methods") if f"| `{name}` |" not in methods] == []
    assert [name for name in registry.options_of("attention") if f"| `{name}` |" not in students] == []


def test_the_exit_codes_are_those_of_the_code() -> None:
    stated = re.findall(r"^\| (\d+) \|", text_of("docs/how-to/resume.md"), flags=re.MULTILINE)
    assert list(map(int, stated)) == [0, EXIT_BAD_INPUT, EXIT_FAILED, EXIT_INTERRUPTED]
