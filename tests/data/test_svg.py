"""A drawing that crashes the renderer, or takes too long, is an error; the next drawing is rendered as usual."""

from __future__ import annotations

import multiprocessing
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pipeline.data import svg as drawings
from pipeline.data.media import open_image
from pipeline.data.svg import draw_svg

SVG = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 20 20">{}</svg>'
GOOD = SVG.format('<rect width="20" height="20" fill="red"/>')
ENDLESS = '<filter id="f"><feTurbulence baseFrequency="0.05" numOctaves="1000000"/></filter>'
BAD = {
    "deep": SVG.format("<g>" * 50_000 + "</g>" * 50_000),
    "far": SVG.format('<g transform="rotate(330)"><path d="M10 10 L 5 5 C 1 0 3 4 1e10 6 Z"/></g>'),
}


@pytest.mark.parametrize("name", BAD)
def test_a_drawing_that_crashes_the_renderer_is_an_error(name: str) -> None:
    expected = draw_svg(GOOD, 8)
    with pytest.raises(ValueError, match=r"^it brings its renderer down$"):
        draw_svg(BAD[name], 8)
    assert draw_svg(GOOD, 8) == expected


def test_a_drawing_that_takes_too_long_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = draw_svg(GOOD, 8)
    with monkeypatch.context() as patch:
        patch.setattr(drawings, "DRAWING_SECONDS", 0.5)
        with pytest.raises(ValueError, match=r"^drawing it takes more than 0\.5 seconds$"):
            draw_svg(SVG.format(ENDLESS + '<rect width="20" height="20" filter="url(#f)"/>'), 64)
    assert draw_svg(GOOD, 8) == expected


def test_text_that_is_not_svg_is_an_error() -> None:
    with pytest.raises(ValueError, match="SVG data parsing failed"):
        draw_svg("<html/>", 8)


def test_every_process_and_every_thread_has_its_own_renderer() -> None:
    """Four forked processes, and then four threads, render different sizes at the same time."""
    sizes = [8 * (number + 1) for number in range(40)]
    expected = [draw_svg(GOOD, size) for size in sizes]
    with multiprocessing.get_context("fork").Pool(4) as pool:
        assert pool.starmap(draw_svg, [(GOOD, size) for size in sizes], chunksize=1) == expected
    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(lambda size: draw_svg(GOOD, size), sizes)) == expected


ENCODED = """<?xml version="1.0"{}?>
<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 8 8">
<style>.gr\u00fcn {{ fill: lime }}</style><rect class="gr\u00fcn" width="8" height="8"/></svg>"""
ENCODINGS = {  # the bytes of a drawing: the name of its encoding, that in its declaration, and the mark before it
    "plain": ("utf-8", "", b""),
    "declared": ("utf-8", "UTF-8", b""),
    "marked": ("utf-8", "", b"\xef\xbb\xbf"),
    "latin": ("latin-1", "ISO-8859-1", b""),
    "windows": ("cp1252", "windows-1252", b""),
    "chinese": ("gb18030", "GB18030", b""),
    "utf-16": ("utf-16", "UTF-16", b""),
    "utf-16-be": ("utf-16-be", "UTF-16", b"\xfe\xff"),
    "utf-16-unmarked": ("utf-16-le", "", b""),
    "utf-32": ("utf-32", "", b""),
    "wrongly declared": ("utf-8", "utf-16", b""),  # as programs write that convert the text only
}


@pytest.mark.parametrize("name", ENCODINGS)
def test_drawings_in_every_encoding(name: str, tmp_path: Path) -> None:
    encoding, declared, mark = ENCODINGS[name]
    drawing = ENCODED.format(f' encoding="{declared}"' if declared else "")
    (tmp_path / "x.svg").write_bytes(mark + drawing.encode(encoding))
    assert open_image(tmp_path / "x.svg", 8).getcolors() == [(64, (0, 255, 0))]


@pytest.mark.parametrize(
    ("declared", "reason"),
    [
        ("x-nothing", "unknown encoding: x-nothing"),
        ("ascii", "'ascii' codec can't"),
        ("punycode", "unknown encoding: punycode"),  # a codec of Python that takes hours for 16 MB
        ("unicode_escape", "unknown encoding: unicode_escape"),
    ],
)
def test_drawings_in_another_encoding_than_declared_are_refused(declared: str, reason: str, tmp_path: Path) -> None:
    (tmp_path / "x.svg").write_bytes(ENCODED.format(f' encoding="{declared}"').encode())
    with pytest.raises(ValueError, match=rf"^x\.svg: {reason}"):
        open_image(tmp_path / "x.svg", 8)
