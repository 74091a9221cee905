"""Extraction can be killed at any moment: the same command ends in the same bytes, and no item is lost without a record."""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from helpers.fault_cases import cache_content
from PIL import Image

from pipeline.cache import info, layout, open_cache, verify
from pipeline.data.manifest import Manifest
from pipeline.data.manifest_files import write_manifest
from pipeline.encoders import random_projection
from pipeline.extraction.extract import ExtractOptions, extract
from pipeline.extraction.inputs import texts_to_encode
from pipeline.runtime.files import lock
from pipeline.types import Sample

QUIET = ExtractOptions(progress=False)
TEXT = {"modality": "text", "width": 8}


@pytest.fixture
def texts(tmp_path: Path) -> Manifest:
    """700 samples with up to two texts each."""
    samples = [
        Sample(f"s{row}", "train", Path(f"{row}.png"), tuple(f"text {row} {n}" for n in range(row % 3)), (0,), "")
        for row in range(700)
    ]
    meta = {"media_type": "image", "text": {"kind": "caption", "aggregate": "mean", "sep": " "}}
    return Manifest("texts", "single", ("only",), tuple(samples), meta, tmp_path)


def test_features_equal_the_encoder(tiny_manifest: Manifest, tiny_home: Path) -> None:
    encoder = random_projection.RandomProjection(random_projection.Config(modality="image", width=32))
    (path,) = [p for p in (tiny_home / "caches" / "tiny").iterdir() if open_cache(p).kind == "dense"]
    cache = open_cache(path)
    for sample in tiny_manifest.samples[::7]:
        with torch.inference_mode():
            expected = encoder(encoder.prepare(tiny_manifest.media_path(sample))[None])[0].numpy()
        np.testing.assert_allclose(cache.read([sample.id])[0], expected, atol=1e-3)


def test_the_identity_contains_no_path(tiny_manifest: Manifest, tiny_home: Path) -> None:
    for path in (tiny_home / "caches" / "tiny").iterdir():
        identity = open_cache(path, {"manifest": tiny_manifest.fingerprint(), "store_dtype": "float16"}).identity
        assert identity["encoder"]["name"] == "random_projection"
        assert "/" not in str(identity)


@pytest.mark.parametrize("settings", [TEXT, {"modality": "image", "width": 8}])
def test_the_number_of_workers_does_not_change_the_bytes(
    tiny_manifest: Manifest, tmp_path: Path, settings: dict[str, Any]
) -> None:
    paths = [
        extract(
            tiny_manifest,
            "random_projection",
            settings,
            tmp_path / str(workers),
            options=ExtractOptions(batch_size=7, workers=workers, progress=False),
        )
        for workers in (0, 2)
    ]
    assert cache_content(paths[0]) == cache_content(paths[1])
    assert verify(paths[0]) == []


def test_finished_extraction_does_nothing(texts: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = extract(texts, "random_projection", TEXT, tmp_path, options=QUIET)
    before = {file: file.stat().st_mtime_ns for file in path.rglob("*/c/*/*")}
    monkeypatch.setattr(random_projection.RandomProjection, "forward", None)
    assert extract(texts, "random_projection", TEXT, tmp_path, options=QUIET) == path
    assert {file: file.stat().st_mtime_ns for file in path.rglob("*/c/*/*")} == before


def test_killed_at_every_rename_it_resumes_to_the_same_bytes(
    texts: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files appear by renames only, so a copy before and after each rename is all that a kill can leave; two shards."""
    monkeypatch.setattr(layout, "SHARD_ROWS", 512)
    options = ExtractOptions(workers=0, progress=False)
    copies: list[Path] = []
    one_by_one = Lock()  # two shards are written at once

    def rename(source: Any, target: Any) -> None:
        with one_by_one:
            copies.append(Path(shutil.copytree(tmp_path / "whole", tmp_path / str(len(copies)))))
            replace(source, target)
            copies.append(Path(shutil.copytree(tmp_path / "whole", tmp_path / str(len(copies)))))

    replace = os.replace
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", rename)
        path = extract(texts, "random_projection", TEXT, tmp_path / "whole", options=options)
    expected = cache_content(path)
    assert info(path)["shards"] == {"committed": 2, "total": 2}
    assert len(copies) == 2 * len(expected)
    for home in copies:
        killed = home / path.relative_to(tmp_path / "whole")
        if info_or_none(killed) != {"committed": 2, "total": 2}:
            with pytest.raises(ValueError, match="diffalign extract"):
                open_cache(killed)
        assert cache_content(extract(texts, "random_projection", TEXT, home, options=options)) == expected


def info_or_none(path: Path) -> Any:
    try:
        return info(path)["shards"]
    except ValueError:
        return None


def test_damaged_shards_are_redone(texts: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layout, "SHARD_ROWS", 512)
    path = extract(texts, "random_projection", TEXT, tmp_path, options=QUIET)
    expected = cache_content(path)
    shard = path / "features" / "c" / "1" / "0"
    data = bytearray(shard.read_bytes())
    data[100] ^= 4
    shard.write_bytes(data)
    (path / "features" / "c" / "0" / "0").unlink()
    extract(texts, "random_projection", TEXT, tmp_path, options=QUIET)
    assert cache_content(path) == expected


@pytest.fixture
def flawed(tiny_manifest: Manifest, tmp_path: Path) -> Manifest:
    """`tiny` with a truncated image, a missing one, and a link that leads out of the media folder."""
    root = tmp_path / "flawed"
    root.mkdir()
    for sample in tiny_manifest.samples:
        (root / sample.media).write_bytes(tiny_manifest.media_path(sample).read_bytes())
    (root / "red-1.png").write_bytes((root / "red-1.png").read_bytes()[:300])
    (root / "blue-2.png").unlink()
    (root / "grey-3.png").unlink()
    (root / "grey-3.png").symlink_to(tiny_manifest.media_root / "grey-3.png")
    return dataclasses.replace(tiny_manifest, media_root=root)


@pytest.mark.parametrize("workers", [0, 1])
def test_undecodable_images_are_recorded_never_zeros(flawed: Manifest, tmp_path: Path, workers: int) -> None:
    path = extract(
        flawed, "random_projection", {}, tmp_path, options=ExtractOptions(max_failures=0.1, workers=workers, progress=False)
    )
    cache = open_cache(path)
    failed = {"red-1", "blue-2", "grey-3"}
    assert cache.failed_ids == failed
    for sample_id, vector in zip(cache.ids, cache.read(cache.ids), strict=True):
        assert np.isnan(vector).all() if sample_id in failed else np.isfinite(vector).all()
    table = pd.read_parquet(path / "failures.parquet").set_index("id")
    assert set(table["stage"]) == {"prepare"}
    assert table["error"]["blue-2"] == "blue-2.png: no such file"
    assert "red-1.png: " in table["error"]["red-1"]
    assert "leads out of the media folder" in table["error"]["grey-3"]
    assert str(tmp_path) not in str(table)


def test_too_many_failures_stop(flawed: Manifest, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"3 of 40 items failed, more than --max-failures 0\.05 allows; .*'grey-3'"):
        extract(flawed, "random_projection", {}, tmp_path, options=QUIET)
    extract(flawed, "random_projection", {}, tmp_path, options=ExtractOptions(max_failures=3 / 40, progress=False))


def test_failed_items_can_be_tried_again(flawed: Manifest, tiny_manifest: Manifest, tmp_path: Path) -> None:
    path = extract(flawed, "random_projection", {}, tmp_path, options=ExtractOptions(max_failures=1, progress=False))
    (flawed.media_root / "grey-3.png").unlink()
    for name in ("red-1.png", "blue-2.png", "grey-3.png"):
        (flawed.media_root / name).write_bytes((tiny_manifest.media_root / name).read_bytes())
    extract(flawed, "random_projection", {}, tmp_path, options=QUIET)
    assert len(open_cache(path).failed_ids) == 3
    extract(flawed, "random_projection", {}, tmp_path, options=ExtractOptions(retry_failed=True, progress=False))
    assert open_cache(path).failed_ids == frozenset()
    assert cache_content(path) == cache_content(
        extract(tiny_manifest, "random_projection", {}, tmp_path / "good", options=QUIET)
    )


def test_features_beyond_float16_are_failures(texts: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forward = random_projection.RandomProjection.forward

    def overflowing(self: random_projection.RandomProjection, prepared: torch.Tensor) -> torch.Tensor:
        features = forward(self, prepared)
        features[0, 0] = 1e6
        return features

    monkeypatch.setattr(random_projection.RandomProjection, "forward", overflowing)
    path = extract(texts, "random_projection", TEXT, tmp_path, options=ExtractOptions(batch_size=100, progress=False))
    table = pd.read_parquet(path / "failures.parquet")
    assert len(table) == 7
    assert set(table["error"]) == {"a feature is not finite as float16"}
    wide = extract(
        texts,
        "random_projection",
        TEXT,
        tmp_path,
        store_dtype="float32",
        options=ExtractOptions(batch_size=100, progress=False),
    )
    assert open_cache(wide).failed_ids == frozenset()


def test_progress_goes_to_standard_error(tiny_manifest: Manifest, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    extract(tiny_manifest, "random_projection", {}, tmp_path)
    output = capsys.readouterr()
    assert output.out == ""
    assert "40/40" in output.err
    assert "items/s" in output.err


@pytest.mark.parametrize(
    ("aggregate", "units", "expected"),
    [
        ("join", ("a", " ", "b"), ("a, b",)),
        ("mean", ("a", "", "b"), ("a", "b")),
        ("join", ("", " "), ()),
        ("mean", (), ()),
    ],
)
def test_texts_are_joined_or_kept(aggregate: str, units: tuple[str, ...], expected: tuple[str, ...]) -> None:
    assert texts_to_encode(Sample("x", "train", Path("x"), units, (0,), ""), {"aggregate": aggregate, "sep": ", "}) == expected


def test_samples_without_text_are_nan_but_no_failures(texts: Manifest, tmp_path: Path) -> None:
    cache = open_cache(extract(texts, "random_projection", TEXT, tmp_path, options=QUIET))
    vectors = cache.read(["s0", "s1", "s2"])
    assert np.isnan(vectors).all(axis=1).tolist() == [True, False, False]
    assert cache.failed_ids == frozenset()


def test_user_errors_are_one_line(tiny_manifest: Manifest, tmp_path: Path) -> None:
    gone = dataclasses.replace(tiny_manifest, media_root=tmp_path / "gone")
    video = dataclasses.replace(tiny_manifest, meta={**tiny_manifest.meta, "media_type": "video"})
    silent = dataclasses.replace(tiny_manifest, samples=(dataclasses.replace(tiny_manifest.samples[0], texts=()),))
    attempts: list[tuple[Callable[[], Path], str]] = [
        (lambda: extract(gone, "random_projection", {}, tmp_path), "is gone; run: diffalign prepare tiny"),
        (lambda: extract(video, "random_projection", {}, tmp_path), "has video media, the encoder reads image"),
        (lambda: extract(silent, "random_projection", TEXT, tmp_path), "has no texts to encode"),
        (lambda: extract(tiny_manifest, "nonsense", {}, tmp_path), "unknown encoder 'nonsense'; choose one of: efficientnet"),
        (lambda: extract(tiny_manifest, "random_projection", {"size": 1}, tmp_path), "unknown setting 'size'; choose one of"),
        (
            lambda: extract(tiny_manifest, "random_projection", {}, tmp_path, options=ExtractOptions(max_failures=2)),
            "share of the items",
        ),
        (
            lambda: extract(tiny_manifest, "random_projection", {}, tmp_path, options=ExtractOptions(batch_size=-1)),
            "batch size",
        ),
    ]
    for attempt, message in attempts:
        with pytest.raises(ValueError, match=message) as raised:
            attempt()
        assert "\n" not in str(raised.value)


def test_interrupt_leaves_nothing_behind(tmp_path: Path) -> None:
    """Ctrl-C with workers: the command ends at once, no process stays, and the lock is free."""
    root = tmp_path / "media"
    root.mkdir()
    Image.new("RGB", (64, 64)).save(root / "x.png")
    samples = tuple(Sample(str(row), "train", Path("x.png"), (), (0,), "") for row in range(20_000))
    meta = {"media_type": "image", "text": {"kind": "", "aggregate": "mean", "sep": ""}}
    write_manifest(Manifest("many", "single", ("only",), samples, meta, root), tmp_path)
    script = f"""
import signal
from pathlib import Path
from pipeline.extraction.extract import ExtractOptions, extract
from pipeline.data.manifest_files import read_manifest
from pipeline.runtime import logs
logs.SPARSE_SECONDS = 0.1
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell ignores it for tests in the background
home = Path({str(tmp_path)!r})
extract(read_manifest(home, "many"), "random_projection", {{}}, home, options=ExtractOptions(workers=2))
"""
    process = subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.PIPE, start_new_session=True)
    assert process.stderr is not None
    while not re.search(rb"\b[1-9]\d*/20000", os.read(process.stderr.fileno(), 4096)):
        assert process.poll() is None
    os.killpg(process.pid, signal.SIGINT)
    errors = process.communicate(timeout=30)[1]
    assert process.returncode == -signal.SIGINT
    assert errors.count(b"Traceback") == 1  # of the main process: the workers print none
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)
    (path,) = (tmp_path / "caches" / "many").iterdir()
    with lock(path):
        assert info(path)["shards"]["total"] == 3
