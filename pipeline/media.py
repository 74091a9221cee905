"""Open the picture of a file, whatever it is: RGB pixels on white, or one reason why not."""

from __future__ import annotations

import io
import warnings
from pathlib import Path
from xml.etree import ElementTree

from PIL import Image, ImageOps, UnidentifiedImageError

SVG_LIMIT = 16 * 2**20  # bytes; a drawing larger than this is not an icon
WHITE = (255, 255, 255)


def open_image(path: Path, size: int) -> Image.Image:
    """The picture in a file as RGB; transparent parts become white.

    Raster files keep their own size and are turned upright by their EXIF tag. SVG files are rendered to `size` x `size`
    pixels, without fonts and external files, and centred when they are not square.
    Raises `ValueError` with the file's name and the reason when there is no whole picture in it.
    """
    try:
        if path.suffix.lower() == ".svg":
            return _render(_read_drawing(path), size)
        return _decode(path)
    except FileNotFoundError as error:
        raise ValueError(f"{path.name}: no such file") from error
    except OSError as error:
        reason = "not a picture that Pillow can read" if isinstance(error, UnidentifiedImageError) else error.strerror or error
        raise ValueError(f"{path.name}: {reason}") from error
    except (ValueError, SyntaxError, EOFError, Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ValueError(f"{path.name}: {error}") from error


def _decode(path: Path) -> Image.Image:
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        with Image.open(path) as file:
            file.load()
            return _on_white(ImageOps.exif_transpose(file))


def _on_white(image: Image.Image) -> Image.Image:
    if image.mode in ("I;16", "I;16B", "I;16L", "I"):  # 16-bit greys: PIL's own conversion clips instead of scaling
        image = image.point(lambda value: value / 257).convert("L")
    if not image.has_transparency_data:
        return image.convert("RGB")
    image = image.convert("RGBA")
    canvas = Image.new("RGBA", image.size, (*WHITE, 255))
    return Image.alpha_composite(canvas, image).convert("RGB")


def _read_drawing(path: Path) -> str:
    """The text of an SVG file; `ValueError` when it is huge or wants files from outside."""
    with path.open("rb") as file:
        data = file.read(SVG_LIMIT + 1)
    if len(data) > SVG_LIMIT:
        raise ValueError(f"the drawing is larger than {SVG_LIMIT} bytes")
    for element in ElementTree.fromstring(data).iter():
        links = [value for name, value in element.attrib.items() if name.rpartition("}")[2] == "href"]
        if element.tag.rpartition("}")[2] in ("image", "feImage") and not all(v.startswith(("data:", "#")) for v in links):
            raise ValueError("the drawing refers to an external picture")
    return data.decode("utf-8")


def _render(drawing: str, size: int) -> Image.Image:
    try:
        from resvg_py import svg_to_bytes  # only drawings need it, and only the demo extra installs it
    except ImportError as error:
        raise ValueError('rendering SVG needs the package resvg-py; run: pip install "diffalign[demo]"') from error
    # 96 dots per inch is what CSS says of drawings sized in mm, pt or in; resvg-py's own default refuses them
    png = bytes(svg_to_bytes(svg_string=drawing, width=size, height=size, background="white", skip_system_fonts=True, dpi=96))
    with Image.open(io.BytesIO(png)) as file:
        image = file.convert("RGB")
    if image.size == (size, size):
        return image
    canvas = Image.new("RGB", (size, size), WHITE)
    canvas.paste(image, ((size - image.width) // 2, (size - image.height) // 2))
    return canvas
