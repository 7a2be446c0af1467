"""The documents as a site: it is built without a warning, its links lead somewhere, and its search
works from disk."""

import os
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from helpers.browsers import browser  # noqa: F401
from helpers.goldens import ROOT

pytestmark = pytest.mark.slow


class Page(HTMLParser):
    """The anchors of a page, and what it links to or loads."""

    def __init__(self, file: Path):
        super().__init__()
        self.anchors: set[str] = set()
        self.links: list[str] = []
        self.loaded: list[str] = []  # fetched when the page is opened
        self.feed(file.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        self.anchors |= {found[name] for name in ("id", "name") if found.get(name)}
        if tag == "a" and found.get("href"):
            self.links.append(found["href"])
        elif tag == "link" and found.get("rel") in ("stylesheet", "icon"):
            self.loaded.append(found["href"])
        elif tag in ("script", "img", "source"):
            self.loaded += [found[name] for name in ("src", "srcset") if found.get(name)]


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    pytest.importorskip("material", reason="needs pip install -e '.[docs]'")
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "-d", folder],
        cwd=ROOT, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True,
        timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr
    return folder


def test_every_document_is_a_page_and_in_the_navigation(site):
    listed = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    documents = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "course").glob("*.md")]
    assert len(documents) > 20
    for file in documents:
        name = file.relative_to(ROOT).as_posix()
        assert name in listed
        page = "index.html" if name == "README.md" else name.removesuffix(".md") + ".html"
        assert (site / page).is_file(), page


def test_every_link_leads_to_a_file_and_to_an_anchor_in_it(site):
    pages = {path: Page(path) for path in site.rglob("*.html") if path.name != "404.html"}
    count = 0
    for path, page in pages.items():
        if path.name == "book.html":  # a file of its own, which the course's test reads
            continue
        for link in [*page.links, *page.loaded]:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                assert link not in page.loaded, f"{path}: {link} is loaded from another host"
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            target = target / "index.html" if target.is_dir() else target
            assert target.is_file(), f"{path}: {link}"
            if parts.fragment and target in pages:
                assert unquote(parts.fragment) in pages[target].anchors, f"{path}: {link}"
            count += 1
    assert count > 1000


def test_the_search_works_from_disk(site, browser):  # noqa: F811
    page = browser.new_page()
    errors = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto((site / "docs" / "DESIGN.html").as_uri())
    page.wait_for_selector("iframe", state="attached", timeout=60_000)  # in which the search runs
    page.keyboard.press("/")
    page.wait_for_selector("input[name=query]", timeout=60_000)
    page.keyboard.type("preempt", delay=20)
    page.wait_for_selector(".md-search-result__item", timeout=60_000)
    found = page.locator(".md-search-result__item a").evaluate_all(
        "links => links.map(a => a.href)"
    )
    assert any("GLOSSARY.html" in link for link in found), found
    assert not errors
    page.close()
