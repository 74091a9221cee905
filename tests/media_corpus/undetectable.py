"""Damaged pictures without any sign of it; docs/media.md lists these kinds."""

from __future__ import annotations

from collections.abc import Iterator

from media_corpus.damaged import HEIGHT, PIXELS, DamagedFile, encoded, flipped, gif, gif_frame, lzw, lzw_codes, photo, tiff


def undetectable_pictures() -> Iterator[DamagedFile]:
    """Yield files whose pixels are wrong without any sign; docs/media.md lists these kinds."""
    for seed in range(3):
        picture = photo(seed)
        bitmap, raw = encoded(picture, "BMP"), encoded(picture, "TIFF")
        lossy, quantized = encoded(picture, "WEBP", quality=80), encoded(picture, "JPEG")
        pixels = list(range(200)) * (PIXELS // 200) + list(range(PIXELS % 200))
        codes = lzw_codes(pixels)
        codes[20 + seed] = 255
        other_codes = lzw(codes, "lowest")
        avif, wavelets = encoded(picture, "AVIF"), encoded(picture, "JPEG2000")
        zstandard = encoded(picture, "TIFF", compression="zstd")
        fax = encoded(picture.convert("1"), "TIFF", compression="group4")
        table = quantized.index(b"\xff\xdb") + 6
        yield DamagedFile(f"raw-{seed}.bmp", flipped(bitmap, len(bitmap) - 100 - seed, 7), "")
        yield DamagedFile(f"raw-{seed}.tif", flipped(raw, raw.index(picture.tobytes()) + seed, 7), "")
        yield DamagedFile(f"lossy-{seed}.webp", flipped(lossy, len(lossy) * 3 // 4 + seed, 3), "")
        yield DamagedFile(f"code-{seed}.gif", gif(gif_frame(other_codes)), "")
        yield DamagedFile(f"code-{seed}.tif", tiff([lzw(codes, "highest")], 5, HEIGHT), "")
        yield DamagedFile(f"lossy-{seed}.avif", flipped(avif, len(avif) - 40 - seed, 3), "")
        yield DamagedFile(f"wavelets-{seed}.jp2", flipped(wavelets, len(wavelets) - 200 - seed, 3), "")
        yield DamagedFile(f"zstandard-{seed}.tif", flipped(zstandard, 300 + seed, 3), "")
        yield DamagedFile(f"fax-{seed}.tif", flipped(fax, 60 + seed, 3), "")
        yield DamagedFile(f"table-{seed}.jpg", quantized[:table] + bytes([99 - seed]) + quantized[table + 1 :], "")
