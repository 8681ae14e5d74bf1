"""Builds the documentation as a site, of which every page works without a network.

    python -m docs.build SITE

Needs the extra `docs`. Pages have the paths that they have in the repository, so that their links work here and there:
README.md, docs/, results/ and what they link to. The reference is generated (docs/generate.py), docs/zensical.toml has
the navigation. A link that leads nowhere, or what a page would load from another host, is an error.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote

from docs.generate import PAGES

ROOT = Path(__file__).resolve().parents[1]
CONFIG = ROOT / "docs" / "zensical.toml"
GENERATED = re.compile(r"^<!-- generated: ([\w ]+) -->$", re.MULTILINE)
LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\]\([^)]*\))*)\]\(([^)\s:#]+)(#[^)\s]*)?\)")
ELEMENT = re.compile(r"<(script|img|iframe|source|link)\b[^>]*>")
SHIM = re.compile(r'<script src="https://unpkg\.com/iframe-worker/shim"[^>]*>')
REMOTE = re.compile(r"\b(?:src|href)=[\"']?(?:https?:)?//[^\s\"'>]+")


def navigation() -> list[str]:
    """Paths of all pages, in the order of the navigation."""
    return list(_paths(tomllib.loads(CONFIG.read_text(encoding="utf-8"))["project"]["nav"]))


def _paths(node: object) -> Iterator[str]:
    if isinstance(node, str):
        yield node
    else:
        for inner in node.values() if isinstance(node, dict) else node:
            yield from _paths(inner)


def main() -> int:
    if len(sys.argv) != 2:
        print("usage: python -m docs.build SITE", file=sys.stderr)
        return 2
    site = Path(sys.argv[1])
    if site.exists() and not (site / "sitemap.xml").exists():
        print(f"error: {site}: exists, and is no site. Name another folder.", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        assemble(work)
        done = subprocess.run([sys.executable, "-m", "zensical", "build", "--strict"], cwd=work, check=False)
        with_own_worker(work / "site")
        problems = list(loads_from_elsewhere(work / "site"))
        for problem in problems:
            print(f"error: {problem}", file=sys.stderr)
        if done.returncode or problems:
            return 1
        shutil.rmtree(site, ignore_errors=True)
        shutil.copytree(work / "site", site)
    print(site / "index.html")
    return 0


def assemble(work: Path) -> None:
    """Pages, what they link to, and the configuration, in `work`."""
    pages = navigation()
    for page in pages:
        to = work / "pages" / page
        to.parent.mkdir(parents=True, exist_ok=True)
        text = _linked((ROOT / page).read_text(encoding="utf-8"), page, pages, work)
        to.write_text(GENERATED.sub(lambda found: PAGES[found[1]](), text), encoding="utf-8")
    shutil.copy(CONFIG, work)
    shutil.copy(ROOT / "docs" / "site.css", work / "pages" / "docs")
    for package in ("distill", "teachers"):
        (work / "code").mkdir(exist_ok=True)
        (work / "code" / package).symlink_to(ROOT / package)


def _linked(text: str, page: str, pages: list[str], work: Path) -> str:
    """The page, with the files that it links to beside it. Folders and code are no part of the site: of a link to them
    the text remains.
    """

    def link(found: re.Match[str]) -> str:
        image, words, target, anchor = found.groups(default="")
        path = ((ROOT / page).parent / unquote(target)).resolve()
        name, inner = path.relative_to(ROOT).as_posix(), LINK.sub(link, words)
        if path.exists() and name not in pages:  # of what leads nowhere Zensical says where it is
            if not path.is_file() or path.suffix in (".py", ".md", ""):
                return inner
            (work / "pages" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, work / "pages" / name)
        return f"{image}[{inner}]({target}{anchor})"

    return LINK.sub(link, text)


def with_own_worker(site: Path) -> None:
    """Replace the one script that pages load from elsewhere; their search needs it where they are opened as files."""
    shutil.copy(ROOT / "docs" / "worker.js", site / "assets")
    for path in site.rglob("*.html"):
        text = path.read_text(encoding="utf-8")
        up = "../" * (len(path.relative_to(site).parts) - 1)
        path.write_text(SHIM.sub(f'<script src="{up}assets/worker.js">', text), encoding="utf-8")


def loads_from_elsewhere(site: Path) -> Iterator[str]:
    """What pages would load from another host."""
    for path in sorted(site.rglob("*.html")):
        for element in remote(path.read_text(encoding="utf-8")):
            yield f"{path.relative_to(site)}: {element}"


def remote(html: str) -> list[str]:
    """Elements of a page that load something from another host."""
    elements = [found[0] for found in ELEMENT.finditer(html) if REMOTE.search(found[0])]
    return [element for element in elements if not re.search(r"rel=[\"']?(?:canonical|prev|next)", element)]


if __name__ == "__main__":
    sys.exit(main())
