"""Images of every kind become RGB on white; a file that is not a whole image is an error that names the file."""

from __future__ import annotations

import base64
import io
import os
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.data.media import MAX_SVG_BYTES, open_image

SVG = '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" viewBox="0 0 {} {}">{}</svg>'


def svg(path: Path, body: str, width: int = 20, height: int = 20) -> Path:
    path.write_text(SVG.format(width, height, body), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("mode", "colour", "expected"),
    [
        ("1", 1, (255, 255, 255)),
        ("L", 90, (90, 90, 90)),
        ("LA", (0, 0), (255, 255, 255)),
        ("RGB", (1, 2, 3), (1, 2, 3)),
        ("RGBA", (200, 100, 0, 0), (255, 255, 255)),
        ("RGBA", (200, 100, 0, 255), (200, 100, 0)),
        ("I;16", 65535, (255, 255, 255)),
        ("I;16", 0x8080, (0x80, 0x80, 0x80)),
    ],
)
def test_every_mode_becomes_rgb_on_white(tmp_path: Path, mode: str, colour: int, expected: tuple[int, ...]) -> None:
    Image.new(mode, (5, 3), colour).save(tmp_path / "x.png")
    image = open_image(tmp_path / "x.png", 99)
    assert (image.mode, image.size, image.getpixel((2, 1))) == ("RGB", (5, 3), expected)


@pytest.mark.parametrize(
    ("mode", "colour", "expected"),
    [
        ("I;16", 65535, (255, 255, 255)),
        ("I;16", 0x8080, (0x80, 0x80, 0x80)),
        ("CMYK", (0, 255, 255, 0), (255, 0, 0)),
        ("P", 0, (0, 0, 0)),
        ("LA", (9, 255), (9, 9, 9)),
    ],
)
def test_every_mode_of_tiff_becomes_rgb(tmp_path: Path, mode: str, colour: int, expected: tuple[int, ...]) -> None:
    Image.new(mode, (5, 3), colour).save(tmp_path / "x.tiff")
    image = open_image(tmp_path / "x.tiff", 99)
    assert (image.mode, image.size, image.getpixel((2, 1))) == ("RGB", (5, 3), expected)


@pytest.mark.parametrize(
    ("kind", "sample"), [(2, (0xFFFF, 0x8080, 0)), (6, (0xFFFF, 0x8080, 0, 0xFFFF)), (4, (0x8080, 0xFFFF))]
)
def test_sixteen_bit_png_with_channels(tmp_path: Path, kind: int, sample: tuple[int, ...]) -> None:
    """Pillow reads 16-bit RGB, RGBA and LA images but cannot write them: the file is written by hand."""
    row = b"\0" + struct.pack(f">{len(sample)}H", *sample) * 2
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", 2, 1, 16, kind, 0, 0, 0)), (b"IDAT", zlib.compress(row)), (b"IEND", b"")]
    body = [struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in chunks]
    (tmp_path / "x.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(body))
    expected = (255, 128, 0) if len(sample) > 2 else (128, 128, 128)
    assert open_image(tmp_path / "x.png", 9).getpixel((1, 0)) == expected


def test_half_transparent_is_mixed_with_white(tmp_path: Path) -> None:
    Image.new("RGBA", (2, 2), (255, 0, 0, 51)).save(tmp_path / "x.png")  # one fifth of red
    assert np.asarray(open_image(tmp_path / "x.png", 2))[0, 0].tolist() == pytest.approx((255, 204, 204), abs=1)


def test_palette_with_a_transparent_entry(tmp_path: Path) -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.putpixel((1, 0), 1)
    image.save(tmp_path / "x.png", transparency=0)
    assert np.asarray(open_image(tmp_path / "x.png", 2)).tolist() == [[[255, 255, 255], [0, 0, 255]]]


def test_cmyk_and_exif_rotation(tmp_path: Path) -> None:
    Image.new("CMYK", (4, 4), (0, 255, 255, 0)).save(tmp_path / "cmyk.jpg")
    assert np.asarray(open_image(tmp_path / "cmyk.jpg", 4))[0, 0].tolist() == pytest.approx((254, 0, 0), abs=3)
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise
    sideways = Image.new("RGB", (6, 4), "white")
    sideways.paste("black", (0, 0, 3, 4))  # left half
    sideways.save(tmp_path / "turned.png", exif=exif)
    upright = np.asarray(open_image(tmp_path / "turned.png", 4))
    assert upright.shape == (6, 4, 3)
    assert upright[:3].max() == 0
    assert upright[3:].min() == 255


def test_broken_files_are_named(tmp_path: Path) -> None:
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(tmp_path / "whole.jpg")
    data = (tmp_path / "whole.jpg").read_bytes()
    broken = {
        "empty.png": b"",
        "text.png": b"no picture",
        "cut.jpg": data[: len(data) // 2],
        "broken.svg": b"<svg",
        "x.svg": b"",
    }
    for name, content in broken.items():
        (tmp_path / name).write_bytes(content)
    for name in (*broken, "missing.png"):
        with pytest.raises(ValueError, match=f"^{name}: "):
            open_image(tmp_path / name, 8)


def test_pipes_and_folders_are_not_images(tmp_path: Path) -> None:
    """Reading a pipe would never end."""
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "folder.png").mkdir()
    for name in ("pipe.png", "folder.png"):
        with pytest.raises(ValueError, match=f"^{name}: not a regular file"):
            open_image(tmp_path / name, 8)


def test_decompression_bombs_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("1", (100, 100)).save(tmp_path / "big.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 9_000)  # the image is 1.1 times too large: Pillow alone would only warn
    with pytest.raises(ValueError, match=r"big\.png: .*exceeds limit"):
        open_image(tmp_path / "big.png", 8)


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000"])
def test_the_formats_that_are_promised_are_read(tmp_path: Path, form: str) -> None:
    Image.new("RGB", (5, 3), (255, 0, 0)).save(tmp_path / "x.png", form)
    assert np.asarray(open_image(tmp_path / "x.png", 9))[1, 1].tolist() == pytest.approx((254, 0, 0), abs=3)


@pytest.mark.parametrize("form", ["EPS", "ICO", "PPM"])
def test_other_formats_are_refused_by_the_list(tmp_path: Path, form: str) -> None:
    """EPS files are programs, and Pillow would run them with Ghostscript."""
    Image.new("RGB", (16, 16)).save(tmp_path / "x.jpg", form)
    with pytest.raises(ValueError, match=r"^x\.jpg: not a JPEG, PNG, WEBP, GIF, BMP, TIFF, AVIF, JPEG2000 or SVG picture$"):
        open_image(tmp_path / "x.jpg", 8)


@pytest.mark.parametrize("size", [(1, 40_000), (40_000, 1), (3, 301)])
def test_very_narrow_images_are_refused(tmp_path: Path, size: tuple[int, int]) -> None:
    """If the shorter side of the first image were scaled to 256 pixels, the longer one would have ten million pixels."""
    Image.new("L", size).save(tmp_path / "x.png")
    with pytest.raises(ValueError, match=rf"^x\.png: {size[0]} x {size[1]} pixels: one side is more than 100 times the other$"):
        open_image(tmp_path / "x.png", 8)
    Image.new("L", (3, 300)).save(tmp_path / "x.png")
    assert open_image(tmp_path / "x.png", 8).size == (3, 300)


def test_very_narrow_drawings_are_rendered_within_the_size(tmp_path: Path) -> None:
    drawing = svg(tmp_path / "thin.svg", '<rect width="1" height="40000"/>', width=1, height=40_000)
    pixels = np.asarray(open_image(drawing, 32))
    assert pixels.shape == (32, 32, 3)
    assert (pixels < 255).any(axis=(0, 2)).sum() == 1  # only one column is drawn


def test_an_image_that_does_not_fit_into_memory_is_an_error_of_that_image(tmp_path: Path) -> None:
    Image.new("1", (9_000, 9_000)).save(tmp_path / "large.png")
    program = """if True:
        import resource, sys
        from pathlib import Path
        from pipeline.data.media import open_image
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + 200 * 2**20
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        try:
            open_image(Path(sys.argv[1]), 8)
        except ValueError as error:
            print(error)
    """
    done = subprocess.run([sys.executable, "-c", program, tmp_path / "large.png"], capture_output=True, text=True, check=True)
    assert done.stdout == "large.png: it does not fit into memory\n"


def test_drawings_fill_the_size_and_are_centred_on_white(tmp_path: Path) -> None:
    wide = svg(tmp_path / "wide.svg", '<rect width="40" height="20" fill="#0000ff"/>', width=40)
    pixels = np.asarray(open_image(wide, 32))
    assert pixels.shape == (32, 32, 3)
    assert (pixels[8:24] == (0, 0, 255)).all()
    assert (pixels[:8] == 255).all()
    assert (pixels[24:] == 255).all()
    half = svg(tmp_path / "half.svg", '<rect width="20" height="20" fill="#000000" fill-opacity="0.2"/>')
    assert np.asarray(open_image(half, 8))[4, 4].tolist() == pytest.approx((204, 204, 204), abs=1)


def test_drawings_sized_in_millimetres_are_drawn(tmp_path: Path) -> None:
    drawing = tmp_path / "metric.svg"
    drawing.write_text(
        '<svg xmlns="http://www.w3.org/2000/svg" width="10mm" height="10mm" viewBox="0 0 10 10">'
        '<rect width="10" height="10" fill="#00ff00"/></svg>'
    )
    assert (np.asarray(open_image(drawing, 8)) == (0, 255, 0)).all()


def test_drawings_cannot_reach_other_files(tmp_path: Path) -> None:
    Image.new("RGB", (4, 4), (255, 0, 0)).save(tmp_path / "secret.png")
    secret = tmp_path / "secret.png"
    for number, link in enumerate((f'xlink:href="{secret}"', f'href="{secret}"', 'href="secret.png"', 'href="http://a/b.png"')):
        with pytest.raises(ValueError, match="external picture"):
            open_image(svg(tmp_path / f"{number}.svg", f'<image {link} width="20" height="20"/>'), 8)
    entity = f'<!DOCTYPE svg [<!ENTITY e "{secret}">]>' + SVG.format(20, 20, '<image href="&e;" width="20" height="20"/>')
    (tmp_path / "entity.svg").write_text(entity)
    with pytest.raises(ValueError, match="external picture"):
        open_image(tmp_path / "entity.svg", 8)
    inner = SVG.format(20, 20, f'<image href="{secret}" width="20" height="20"/>')
    nested = f'<image href="data:image/svg+xml;base64,{base64.b64encode(inner.encode()).decode()}" width="20" height="20"/>'
    assert (np.asarray(open_image(svg(tmp_path / "nested.svg", nested), 8)) == 255).all()


def test_drawings_may_hold_their_own_pictures(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), (255, 0, 0)).save(buffer, "png")
    data = base64.b64encode(buffer.getvalue()).decode()
    body = f'<image href="data:image/png;base64,{data}" width="20" height="20"/>'
    assert np.asarray(open_image(svg(tmp_path / "own.svg", body), 8))[4, 4].tolist() == [255, 0, 0]


def test_huge_drawings_and_entity_bombs_are_refused(tmp_path: Path) -> None:
    (tmp_path / "huge.svg").write_bytes(b" " * (MAX_SVG_BYTES + 1))
    with pytest.raises(ValueError, match=r"huge\.svg: the drawing is larger"):
        open_image(tmp_path / "huge.svg", 8)
    entities = '<!ENTITY a0 "aaaaaaaaaa">' + "".join(f'<!ENTITY a{i} "{f"&a{i - 1};" * 10}">' for i in range(1, 10))
    (tmp_path / "bomb.svg").write_text(f"<!DOCTYPE svg [{entities}]><svg>&a9;</svg>")
    with pytest.raises(ValueError, match=r"bomb\.svg: .*amplification"):
        open_image(tmp_path / "bomb.svg", 8)


@pytest.mark.parametrize(
    "exif",
    [
        (
            "O-%qQ0000800#jM00IC200sa60Ac|W00RI3009670003R00jU5009610BC}k00IC200LtG004(+00aO4009610C0#U00aO40"
            "09610G6Da0096100UuSV*mgE003xZY;11;0001y0000200M%V01N;C009610FICV00#g700b~HGyebp002MJGcz+YGcy4H00"
            "96300002P5=M^00IC7000030002A00000000010000100002000010000300001"
        ),
        (
            "O-%qQ0000800#jM00IC200sa60Ac|W00RI3009670003G00jU5009610BC}k00IC200LtG004(+00aO4009610C0#U00aO40"
            "09610G6Da0096100UuSV*mgE003xZY;11;0001y0000200M%V01N;C009610FICV00#g700b~HGcW)E002MJGcz+YGcy1J00"
            "96300002P5=M^00IC7000030002A0000u000010000100002000010000300001"
        ),
    ],
)
def test_damaged_exif_is_an_error_with_a_reason(exif: str, tmp_path: Path) -> None:
    """One byte of EXIF data was changed, so that Pillow cannot write the data again when it turns the image."""
    Image.new("RGB", (24, 16), "red").save(tmp_path / "damaged.jpg", exif=b"Exif\0\0" + base64.b85decode(exif))
    with pytest.raises(ValueError, match=r"damaged\.jpg"):
        open_image(tmp_path / "damaged.jpg", 16)
