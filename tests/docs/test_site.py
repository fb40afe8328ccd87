"""The documentation builds strictly, every link leads somewhere, and no page loads anything from elsewhere."""

import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urldefrag

import pytest

from tests.conftest import REPOSITORY

LOADING = {"script": "src", "img": "src", "iframe": "src", "source": "src", "video": "src", "audio": "src"}
LOADING_RELATIONS = {"stylesheet", "icon", "preload", "preconnect", "prefetch", "dns-prefetch", "modulepreload"}
ROOT_PAGES = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md", "cluster/README.md"]


class Page(HTMLParser):
    """The anchors, the links and the loaded resources of a page."""

    def __init__(self, text: str):
        super().__init__()
        self.anchors: set[str] = set()
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        self.anchors.update(values[name] for name in ("id", "name") if values.get(name))
        if tag == "a" and "href" in values:
            self.links.append(values["href"])
        if LOADING.get(tag) in values:
            self.loaded.append(values[LOADING[tag]])
        if tag == "link" and set(values.get("rel", "").split()) & LOADING_RELATIONS:
            self.loaded.append(values["href"])


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    built = subprocess.run(
        command, cwd=REPOSITORY, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True
    )
    assert built.returncode == 0, built.stderr
    return folder


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[Path, Page]:
    return {path: Page(path.read_text()) for path in site.rglob("*.html")}


def is_external(address: str) -> bool:
    return re.match(r"[a-z][a-z0-9+.-]*:|//", address, re.I) is not None and not address.startswith("data:")


def broken(pages: dict[Path, Page], path: Path, link: str) -> bool:
    """Whether a link of a page leads to no file of the site, or to no anchor in it."""
    address, anchor = urldefrag(link)
    target = (path.parent / unquote(address)).resolve() if address else path
    target = target / "index.html" if target.is_dir() else target
    if not target.is_file():
        return True
    return bool(anchor) and target in pages and unquote(anchor) not in pages[target].anchors


def test_every_page_of_the_navigation_is_built(site: Path) -> None:
    sources = {path.stem for path in (REPOSITORY / "docs").glob("*.md")}
    assert sources <= {path.stem for path in site.glob("*.html")}


def test_no_link_is_broken(pages: dict[Path, Page], site: Path) -> None:
    # The page of an unknown address is served from any depth, so its links begin at the site's root.
    inner = {path: page for path, page in pages.items() if path.name != "404.html"}
    links = [(path, link) for path, page in inner.items() for link in page.links if not is_external(link)]
    assert len(links) > 100
    assert not [f"{path.relative_to(site)}: {link}" for path, link in links if broken(pages, path, link)]


def test_a_broken_link_and_a_broken_anchor_are_found(pages: dict[Path, Page], site: Path) -> None:
    index = site / "index.html"
    assert broken(pages, index, "nowhere.html")
    assert broken(pages, index, "concepts.html#nowhere")
    assert not broken(pages, index, "concepts.html#words")


def test_no_page_loads_anything_from_elsewhere(pages: dict[Path, Page], site: Path) -> None:
    loaded = [(path, address) for path, page in pages.items() for address in page.loaded]
    assert loaded
    assert not [f"{path.relative_to(site)}: {address}" for path, address in loaded if is_external(address)]


def test_no_style_loads_anything_from_elsewhere(site: Path) -> None:
    styles = list(site.rglob("*.css"))
    assert styles
    for path in styles:
        addresses = re.findall(r"url\(\s*[\"']?([^\"')]+)|@import\s+[\"']([^\"']+)", path.read_text())
        assert not [a for pair in addresses for a in pair if a and is_external(a)], path


@pytest.mark.parametrize("name", ROOT_PAGES)
def test_a_page_outside_of_the_site_links_to_files_that_exist(name: str) -> None:
    path = REPOSITORY / name
    links = re.findall(r"\]\(([^)\s]+)\)", path.read_text())
    local = [link for link in links if not is_external(link)]
    assert not [link for link in local if urldefrag(link)[0] and not (path.parent / urldefrag(link)[0]).exists()]


def test_the_readme_has_at_most_150_lines() -> None:
    assert len((REPOSITORY / "README.md").read_text().splitlines()) <= 150
