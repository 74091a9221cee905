"""The documentation site: strict, without a network; its pictures are those that the scripts draw."""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path
from urllib.parse import urlsplit

from helpers.pages import Page

ROOT = Path(__file__).parents[2]
BOX = re.compile(r'<rect class="box \w*" x="(\d+)" y="(\d+)" width="(\d+)" height="(\d+)"')
TEXT = re.compile(r'<text(?: class="(\w+)")? x="(\d+)" y="(\d+)"(?: text-anchor="middle")?>([^<]+)<')


def test_the_site_is_built_and_loads_nothing_from_a_network(tmp_path: Path) -> None:
    """Every link and anchor leads somewhere (--strict), and what a page loads lies in the folder."""
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(
        [*command, "--config-file", "docs/site/mkdocs.yml"],
        env=environment, cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    pages = sorted((tmp_path / "site").rglob("*.html"))
    assert len(pages) > 20
    for path in pages:
        loaded = [
            address
            for tag, attributes in Page(path).elements
            for name in ("src", "href")
            if tag != "a" and (address := attributes.get(name)) and attributes.get("rel") != "canonical"
        ]
        assert loaded
        for address in loaded:
            place = urlsplit(address)
            assert (place.scheme, place.netloc) == ("", "") or place.scheme == "data", f"{path.name} loads {address}"
            if place.path and path.name != "404.html":
                assert (path.parent / place.path).exists(), f"{path.name}: {address}"
    assert not re.findall(r"@import|url\(['\"]?https?:", "".join(css.read_text() for css in tmp_path.rglob("*.css")))
    assert "class ColourHistogram" in re.sub(r"<[^>]+>", "", (tmp_path / "site" / "plugins.html").read_text(encoding="utf-8"))


def test_the_pictures_are_those_of_the_script() -> None:
    drawn = runpy.run_path(str(ROOT / "docs" / "draw_concepts.py"))
    for name, draw in drawn["PICTURES"].items():
        assert (ROOT / "docs" / f"concepts-{name}.svg").read_text(encoding="utf-8") == draw(), "run: make docs"


def test_the_texts_of_the_pictures_fit_into_their_boxes() -> None:
    for path in (ROOT / "docs").glob("concepts-*.svg"):
        svg = path.read_text(encoding="utf-8")
        boxes = [tuple(map(int, box)) for box in BOX.findall(svg)]
        assert len(boxes) >= 5
        for kind, x, y, text in TEXT.findall(svg):
            width = len(text) * (7.9 if kind == "name" else 6.9 if not kind else 6.4)
            inside = [box for box in boxes if box[0] <= int(x) <= box[0] + box[2] and box[1] <= int(y) <= box[1] + box[3]]
            room = inside[0][0] + inside[0][2] - int(x) if inside else 860 - int(x)
            assert width <= room, f"{path.name}: {text}"
