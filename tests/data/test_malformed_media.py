"""Extraction records each file that is not a whole image or clip as a failure; features of good files are unchanged."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from helpers.encoder_cases import write_video
from helpers.fault_cases import cache_content
from helpers.malformed_media import GREYS, NOISE, malformed_clips, malformed_pictures, unreadable_names

from pipeline.cache import open_cache, verify
from pipeline.data.manifest import Manifest
from pipeline.encoders._factory import build_encoder
from pipeline.extraction.extract import ExtractOptions, extract
from pipeline.types import Sample

CLIPS = {"encoder": "random_projection", "settings": "width=8", "num_frames": "3"}


def make_manifest(names: list[str], folder: Path, media_type: str) -> Manifest:
    """Return a manifest with one sample for every file name, in this order."""
    samples = tuple(Sample(f"sample {row}", "train", Path(name), (), (0,), "") for row, name in enumerate(names))
    meta = {"media_type": media_type, "text": {"kind": "", "aggregate": "mean", "sep": ""}}
    return Manifest("hostile", "single", ("only",), samples, meta, folder)


def mix_with_good(bad: list[str], good: str) -> list[str]:
    """Return the names of malformed files, with the good file before every third one."""
    return [name for number, each in enumerate(bad) for name in ([good, each] if number % 3 == 0 else [each])]


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")  # Pillow warns before it fails
@pytest.mark.parametrize(
    ("media_type", "encoder", "settings", "at_least"),
    [("image", "random_projection", {"width": "8"}, 60), ("video", "frames", CLIPS, 30)],
)
def test_malformed_media_are_all_recorded_as_failures(
    media_type: str,
    encoder: str,
    settings: dict[str, str],
    at_least: int,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder, sources = tmp_path / "media", tmp_path / "sources"
    folder.mkdir()
    sources.mkdir()
    bad = malformed_pictures() if media_type == "image" else malformed_clips(sources)
    for name, data in bad.items():
        (folder / name).write_bytes(data)
    good = "good.png" if media_type == "image" else "good.mp4"
    if media_type == "image":
        NOISE.save(folder / good)
    else:
        write_video(folder / good, "libx264", GREYS)
    names = mix_with_good([*bad, *unreadable_names(folder)], good)
    manifest = make_manifest(names, folder, media_type)
    variants = [ExtractOptions(workers=workers, max_failures=1, progress=False) for workers in (0, 2)]
    paths = [extract(manifest, encoder, settings, tmp_path / str(options.workers), options=options) for options in variants]
    assert cache_content(paths[0]) == cache_content(paths[1])
    assert verify(paths[0]) == []
    cache = open_cache(paths[0])
    table = pd.read_parquet(paths[0] / "failures.parquet")
    failed = [row for row, name in enumerate(names) if name != good]
    assert table["id"].tolist() == [f"sample {row}" for row in failed]
    assert set(table["stage"]) == {"prepare"}
    for row, reason in zip(failed, table["error"], strict=True):
        assert names[row] in reason
        assert len(reason) > len(names[row]) + 5
        assert str(tmp_path) not in reason
        assert "\n" not in reason
    features = cache.read(cache.ids)
    assert np.flatnonzero(np.isnan(features).all(axis=1)).tolist() == failed
    built = build_encoder(encoder, settings)
    expected = built(built.prepare(folder / good)[None])[0].detach().numpy()
    whole = np.delete(features, failed, axis=0)
    np.testing.assert_allclose(whole, np.broadcast_to(expected, whole.shape), atol=1e-3)
    assert len(failed) >= at_least
    with capsys.disabled():
        print(f"\n{len(failed)} of {len(failed)} malformed {media_type} files are failures; {len(whole)} good ones unharmed")
