"""A hook of mkdocs that adds pages and files from the whole repository to the site.

Each file keeps its path, so links between pages work in the repository and on the site.
"""

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
PAGES = ["*.md", "docs/*.md", "course/*.md", "lab/*.md", "examples/*.md", "models/*.md"]
SEARCH = ROOT / "docs" / "iframe-worker.js"  # mkdocs.yml names it
LINK = re.compile(r'(?:\]\(|src="|srcset=")([\w./-]+)')


def linked_files(page: Path) -> set[Path]:
    """The files of the repository that a page links to."""
    text = page.read_text(encoding="utf-8")
    targets = {(page.parent / link).resolve() for link in LINK.findall(text)}
    return {path for path in targets if path.is_file() and ROOT in path.parents}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """The pages, every file to which a page links, and the files of the theme."""
    pages = {path for pattern in PAGES for path in ROOT.glob(pattern)}
    linked = set().union(*map(linked_files, pages))
    own = [
        File(
            path.relative_to(ROOT).as_posix(),
            str(ROOT),
            config.site_dir,
            config.use_directory_urls,
        )
        for path in sorted({SEARCH, *pages, *linked})
    ]
    others = [file for file in files if not Path(file.abs_src_path or "").is_relative_to(ROOT)]
    return Files([*others, *own])
