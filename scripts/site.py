"""Hooks of `make docs` (mkdocs.yml): the files outside docs/ that are pages too, and links between all of them.

Documents link to each other as a code host shows them. Here a link to a file that is a page leads to it. A link to any
other file of the repository becomes its text, because the site has no such file.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    **{
        f"examples/{name}/README.md": f"examples/{name}.md"
        for name in ("countdown", "gsm8k", "smollm2", "sources", "trainers")
    },
    "examples/study/README.md": "examples/study.md",
    "examples/study/study.md": "examples/study-results.md",
}
"""Pages by the file that each is made from."""
API = (
    "eopd.storage.teacher_cache",
    "eopd.storage.teacher_record",
    "eopd.storage.listing",
    "eopd.storage.artifacts",
    "eopd.storage.records",
    "eopd.storage.coverage",
    "eopd.storage.places",
    "eopd.storage.errors",
)
"""Modules that a program which reads a cache imports; their docstrings are the page api.md."""
LINK = re.compile(r"(!?)\[([^\]]*)\]\((?!https?://|mailto:)([^)#\s]*)(#[^)\s]*)?\)")
PICTURE = re.compile(r"!\[[^\]]*\]\((?!https?://)([^)\s]+)\)")


def on_files(files: Files, config: Any) -> Files:
    for source, page in PAGES.items():
        text = (ROOT / source).read_text(encoding="utf-8")
        files.append(File.generated(config, page, content=text))
        for link in PICTURE.findall(text):
            target = _resolve(source, link)
            if not target.startswith("docs/"):
                files.append(File.generated(config, target, abs_src_path=str(ROOT / target)))
    modules = "\n\n".join(f"::: {module}" for module in API)
    intro = "These modules need no torch. [A first program](your-own.md#the-cache-in-a-trainer-of-your-own)."
    files.append(File.generated(config, "api.md", content=f"# Reading the cache\n\n{intro}\n\n{modules}"))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    sources = {site: source for source, site in PAGES.items()}
    here = page.file.src_uri
    source = sources.get(here, f"docs/{here}")
    return re.sub(LINK, lambda match: _link(match, source, here), markdown)


def _link(match: re.Match[str], source: str, here: str) -> str:
    picture, text, link, anchor = match[1], match[2], match[3], match[4] or ""
    if not link:
        return match[0]
    target = _resolve(source, link)
    page = PAGES.get(target) or (target.removeprefix("docs/") if target.startswith("docs/") else target)
    if target not in PAGES and not target.startswith("docs/") and not picture:
        return text
    return f"{picture}[{text}]({posixpath.relpath(page, posixpath.dirname(here) or '.')}{anchor})"


def _resolve(source: str, link: str) -> str:
    return posixpath.normpath(posixpath.join(posixpath.dirname(source), link))
