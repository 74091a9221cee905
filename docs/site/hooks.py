"""What `mkdocs` runs while it builds the site: files beside docs/ that the pages link to become part of it.

The pages are read on a code host as well, where `../examples/own_method.py` is a link; on the site it is
examples/own_method.py.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[2]
FOLDERS = ("examples", "benchmarks")  # beside docs/
LINKED = re.compile(rf"\]\(\.\./((?:{'|'.join(FOLDERS)})/[\w./-]+)\)")


def linked_files(folder: Path) -> set[str]:
    """Return the paths of the files in these folders that the pages link to."""
    return {path for page in folder.glob("*.md") for path in LINKED.findall(page.read_text(encoding="utf-8"))}


def on_files(files: Files, config: Any) -> Files:
    """Add those files: Markdown becomes a page, everything else is copied."""
    for path in sorted(linked_files(Path(config["docs_dir"]))):
        files.append(File.generated(config, path, abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Let the links point to the copies."""
    depth = "../" * page.file.src_uri.count("/")
    if depth:  # a page of such a folder: its links to docs/ are links to pages
        return markdown.replace("](../docs/", "](../")
    return LINKED.sub(r"](\1)", markdown)
