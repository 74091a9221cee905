"""Damaged and hostile files end in the failure list with a reason; whole files, however odd, are read as they are.

What no decoder can tell is in the corpus, too, and opens without an error.
"""

from __future__ import annotations

import io
import itertools
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from sklearn import datasets

from media_corpus.damaged import (
    DamagedFile,
    damaged_clips,
    damaged_pictures,
    encoded,
    flipped,
    overwritten,
    photo,
    png_chunks,
    png_of_chunks,
)
from media_corpus.hostile import HostileFile, hostile_pictures, unreadable_files
from media_corpus.undetectable import undetectable_pictures
from media_corpus.whole import WholeFile, whole_pictures
from pipeline.cache import open_cache
from pipeline.data import pixels, png_damage
from pipeline.data.manifest import Manifest
from pipeline.data.media import open_frames, open_image
from pipeline.extraction.extract import ExtractOptions, extract
from pipeline.types import Sample
from pipeline.workspace import Workspace

DAMAGED, UNDETECTABLE = damaged_pictures(), list(undetectable_pictures())
CLIPS, HOSTILE, WHOLE = list(damaged_clips()), hostile_pictures(), whole_pictures()
MAX_SECONDS = 20  # of a test that could wait for ever

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL")  # of metadata


def random_damage(data: bytes, rng: np.random.Generator) -> bytes:
    """Return the data with one flipped bit, four other bytes, or a part missing."""
    place = int(rng.integers(len(data) - 4))
    return [flipped(data, place, int(rng.integers(8))), overwritten(data, place), data[:place]][rng.integers(3)]


def name_of(file: DamagedFile | HostileFile | WholeFile) -> str:
    return file.name


def read(folder: Path, file: DamagedFile | HostileFile | WholeFile) -> np.ndarray:
    (folder / file.name).write_bytes(file.data)
    return np.asarray(open_image(folder / file.name, 8))


@pytest.fixture
def _alarm() -> Iterator[None]:
    """Let a test fail that waits for ever."""

    def fail(*_: object) -> None:
        raise TimeoutError(f"nothing has happened for {MAX_SECONDS} seconds")

    before = signal.signal(signal.SIGALRM, fail)
    signal.alarm(MAX_SECONDS)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("file", DAMAGED, ids=name_of)
def test_damaged_pictures_are_refused_with_the_reason(file: DamagedFile, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"^{file.name}: .*{file.reason}"):
        read(tmp_path, file)


@pytest.mark.parametrize("file", CLIPS, ids=name_of)
def test_damaged_animations_are_refused_with_the_reason(file: DamagedFile, tmp_path: Path) -> None:
    (tmp_path / file.name).write_bytes(file.data)
    with pytest.raises(ValueError, match=f"^{file.name}: .*{file.reason}"):
        open_frames(tmp_path / file.name, 2)


@pytest.mark.parametrize("file", HOSTILE, ids=name_of)
@pytest.mark.usefixtures("_alarm")
def test_hostile_pictures_are_refused_or_right(file: HostileFile, tmp_path: Path) -> None:
    if file.reason:
        with pytest.raises(ValueError, match=f"^{file.name}: .*{file.reason}"):
            read(tmp_path, file)
    else:
        np.testing.assert_array_equal(read(tmp_path, file), file.pixels)


@pytest.mark.parametrize("file", UNDETECTABLE, ids=name_of)
def test_damage_that_nobody_can_tell_is_in_the_list_of_the_docs(file: DamagedFile, tmp_path: Path) -> None:
    assert read(tmp_path, file).shape == (24, 40, 3)


@pytest.mark.parametrize("file", WHOLE, ids=name_of)
def test_whole_pictures_are_read_as_they_are(file: WholeFile, tmp_path: Path) -> None:
    expected = file.pixels
    if expected is None:
        with Image.open(io.BytesIO(file.data)) as picture:
            expected = np.asarray(picture.convert("RGB"))
    np.testing.assert_array_equal(read(tmp_path, file), expected)


def test_the_corpus_is_large_enough_and_each_name_is_one_file() -> None:
    assert len(WHOLE) >= 150
    assert len(DAMAGED) + len(CLIPS) + len(HOSTILE) >= 150
    for files in (DAMAGED, UNDETECTABLE, CLIPS, HOSTILE, WHOLE):
        assert len({file.name for file in files}) == len(files)


def test_photographs_keep_their_bits(tmp_path: Path) -> None:
    """Photographs and icons that ship with packages are decoded to the same bits as by Pillow alone."""
    package = Path(datasets.__file__).parent / "images"
    icons = Path(str(pytest.importorskip("matplotlib").get_data_path())) / "images"
    paths = [*package.glob("*.jpg"), *icons.glob("*.png")]
    assert len(paths) > 10
    for path in paths:
        with Image.open(path) as file:
            white = Image.new("RGBA", file.size, "white")
            expected = Image.alpha_composite(white, file.convert("RGBA")).convert("RGB")
        np.testing.assert_array_equal(np.asarray(open_image(path, 8)), np.asarray(expected))


@pytest.mark.parametrize("form", ["JPEG", "PNG", "GIF", "TIFF", "WEBP", "BMP"])
def test_chance_damage_never_crashes(form: str, tmp_path: Path) -> None:
    """Each of many damaged files gives a picture or a `UserError`; a PNG gives its own pixels or the error."""
    rng, data, path = np.random.default_rng(0), encoded(photo(0), form), tmp_path / f"x.{form.lower()}"
    refused = 0
    for _ in range(80):
        path.write_bytes(random_damage(data, rng))
        try:
            pixels = np.asarray(open_image(path, 8))
        except ValueError:
            refused += 1
        else:
            assert form != "PNG" or np.array_equal(pixels, np.asarray(photo(0)))
    assert refused >= 20  # the files that are cut short


def test_a_flood_of_chunks_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(png_damage, "MAX_CHUNKS", 50)
    *chunks, end = png_chunks(encoded(photo(0), "PNG"))
    (tmp_path / "x.png").write_bytes(png_of_chunks([*chunks, *[(b"IDAT", b"")] * 50, end]))
    with pytest.raises(ValueError, match=r"^x\.png: more than 50 chunks, could be a bomb$"):
        open_image(tmp_path / "x.png", 8)


@pytest.mark.usefixtures("_alarm")
def test_pipes_sockets_devices_and_folders_are_never_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # the address of a socket must be short
    names = unreadable_files(tmp_path)
    for name, reader in itertools.product(names, (open_image, open_frames)):
        with pytest.raises(ValueError, match=f"^{name}: not a regular file$"):
            reader(tmp_path / name, 2)
    assert len(names) >= 12


@pytest.mark.usefixtures("_alarm")
def test_extraction_lists_every_damaged_file_and_stores_no_zeros(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    bad, good = [*DAMAGED, *(file for file in HOSTILE if file.reason)], [*WHOLE, *UNDETECTABLE]
    for group, files in (("bad", bad), ("good", good)):
        (tmp_path / group).mkdir()
        for file in files:
            (tmp_path / group / file.name).write_bytes(file.data)
    unreadable = unreadable_files(tmp_path / "bad")
    media = [f"bad/{name}" for name in [*(file.name for file in bad), *unreadable]] + [f"good/{file.name}" for file in good]
    samples = tuple(Sample(name, "train", Path(name), (), (0,), "") for name in media)
    meta = {"media_type": "image", "text": {"kind": "", "aggregate": "mean", "sep": ""}}
    manifest = Manifest("corpus", "single", ("only",), samples, meta, tmp_path)
    options = ExtractOptions(workers=2, max_failures=1, progress=False)
    path = extract(manifest, "random_projection", {"width": "8"}, tmp_path / "caches", options=options)
    failures = pd.read_parquet(path / "failures.parquet")
    links = {f"bad/{name}" for name in unreadable}
    assert failures["id"].tolist() == [name for name in media if name.startswith("bad/")]
    for name, error in zip(failures["id"], failures["error"], strict=True):
        reason = next((file.reason for file in bad if f"bad/{file.name}" == name), "")
        assert name in links or reason in error, error
    features = open_cache(path).read(media)
    assert np.isnan(features[: len(failures)]).all()
    assert np.isfinite(features[len(failures) :]).all()
    assert (np.abs(features[len(failures) :]).max(axis=1) > 0).all()


def test_prepare_verifies_media_by_the_same_check(tmp_path: Path) -> None:
    root = tmp_path / "photos"
    for name in ("cat", "dog"):
        (root / name).mkdir(parents=True)
        for seed in range(6):
            photo(seed).save(root / name / f"{seed}.png")
    damaged = next(file for file in DAMAGED if file.name == "bit-rgb.png")
    (root / "dog" / "3.png").write_bytes(damaged.data)
    (line,) = Workspace(tmp_path / "home").prepare("table", str(root), verify_media=True).undecodable
    assert "3.png: damaged: the checksum of the chunk at byte" in line


@pytest.mark.parametrize("form", ["GIF", "PNG"])
def test_animations_of_very_many_pixels_are_refused(form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    frames = [photo(seed) for seed in range(4)]
    path = tmp_path / f"long.{form.lower()}"
    path.write_bytes(encoded(frames[0], form, save_all=True, append_images=frames[1:]))
    monkeypatch.setattr(pixels, "MAX_CLIP_PIXELS", 2 * 24 * 40)
    with pytest.raises(ValueError, match="more than 1920 pixels together, could be a bomb"):
        open_frames(path, 2)
