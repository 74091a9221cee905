"""Parse HTML pages in tests; and a text that becomes markup where it is not escaped."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path

from pipeline.report import write_report

HOSTILE_TEXT = "<script>alert(1)</script>\"'><img src=x onerror=alert(1)>|$\\frac$ --> ]]> {x}"


class Page(HTMLParser):
    """A parsed HTML page: its elements with their attributes, and the text between them, without scripts."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.scripts: list[str] = []
        self._is_in_script = False
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self._is_in_script = tag == "script"
        self.scripts += [""] if self._is_in_script else []

    def handle_endtag(self, tag: str) -> None:
        self._is_in_script = False

    def handle_data(self, data: str) -> None:
        if self._is_in_script:
            self.scripts[-1] += data
        else:
            self.text += data

    @property
    def foreign_scripts(self) -> list[str]:
        """The scripts that are neither the library's or ours, whose hashes the page names, nor data."""
        (policy,) = [str(each["content"]) for _, each in self.elements if each.get("http-equiv") == "Content-Security-Policy"]
        kinds = [each.get("type") for tag, each in self.elements if tag == "script"]
        digests = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in self.scripts]
        return [
            script
            for script, kind, digest in zip(self.scripts, kinds, digests, strict=True)
            if kind != "application/json" and f"'sha256-{digest}'" not in policy
        ]

    @property
    def drawings(self) -> list[bytes]:
        """The SVG figures that are embedded in the page."""
        start = "data:image/svg+xml;base64,"
        sources = [attributes["src"] or "" for tag, attributes in self.elements if tag == "img"]
        return [base64.b64decode(source.removeprefix(start)) for source in sources if source.startswith(start)]


def write_page(home: Path, dataset: str, across: Sequence[str] = ()) -> tuple[Path, Path]:
    """Write a report without the files beside it, most of whose time is that of PDF, and return HTML and Markdown."""
    return write_report(home, dataset, across=across, with_files=False)
