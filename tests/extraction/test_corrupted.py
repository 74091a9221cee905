"""Caches of corrupted copies: their features, their bits, their identity, and that nothing takes them for clean ones."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.command_line import run as run_cli
from helpers.fault_cases import cache_content
from helpers.tiny_heads import caches_by_key
from PIL import Image

from pipeline.cache import find_caches, info, open_cache, verify
from pipeline.cache.reader import find_cache
from pipeline.data.corruptions import Corruption, corrupt
from pipeline.data.manifest import DATASET_NAME, Manifest
from pipeline.data.manifest_files import write_manifest
from pipeline.encoders._encoder import Encoder
from pipeline.encoders.random_projection import Config, RandomProjection
from pipeline.extraction import corrupted
from pipeline.extraction.corrupted import CorruptedCopies
from pipeline.extraction.extract import ExtractionTask, ExtractOptions, extract
from pipeline.runtime.errors import UserError
from pipeline.types import Sample

QUIET = ExtractOptions(workers=0, progress=False)
NOISE = Corruption("noise", 2)


def copies_in(home: Path, manifest: Manifest, key: str = "image") -> CorruptedCopies:
    return CorruptedCopies.of_split(home, manifest, "test", find_cache(home, manifest, caches_by_key(home)[key]))


@pytest.fixture
def copies(tiny_home: Path, tiny_manifest: Manifest, tmp_path: Path) -> CorruptedCopies:
    return copies_in(Path(shutil.copytree(tiny_home, tmp_path / "home")), tiny_manifest)


@pytest.mark.parametrize("kind", ["noise", "jpeg", "occlusion"])
def test_features_are_those_of_corrupted_pictures(kind: str, copies: CorruptedCopies, tiny_manifest: Manifest) -> None:
    corruption = Corruption(kind, 4)
    copies.extract([corruption], QUIET)
    cache = copies.open(corruption)
    samples = [sample for sample in tiny_manifest.samples if sample.split == "test"]
    assert cache.ids == [sample.id for sample in samples]
    encoder = RandomProjection(Config(modality="image", width=32))
    for sample in samples[::4]:
        image = Image.open(tiny_manifest.media_path(sample)).convert("RGB")
        prepared = encoder.prepare_image(corrupt([image], corruption, sample.id)[0])
        with torch.inference_mode():
            expected = encoder(prepared[None])[0].numpy()
        np.testing.assert_allclose(cache.read([sample.id])[0], expected, atol=1e-3)
        assert np.abs(copies.cache.read([sample.id])[0] - expected).max() > 0.01


def test_the_number_of_workers_and_the_batches_change_no_bit(
    copies: CorruptedCopies, tiny_manifest: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks: list[ExtractionTask] = []

    def run(task: ExtractionTask, ignored: frozenset[str]) -> None:
        tasks.append(task)
        run_extraction(task, ignored)

    run_extraction = corrupted.run_extraction
    monkeypatch.setattr(corrupted, "run_extraction", run)
    other = copies_in(Path(shutil.copytree(copies.home, tmp_path / "other")), tiny_manifest)
    for each, workers in ((copies, 0), (other, 2)):
        each.extract([Corruption("occlusion", 1), NOISE], ExtractOptions(workers=workers, batch_size=7, progress=False))
    paths = [each.open(NOISE).path for each in (copies, other)]
    assert cache_content(paths[0]) == cache_content(paths[1])
    assert verify(paths[0]) == []
    inputs = tasks[-1].inputs
    whole = inputs.prepare(np.arange(12)).items
    for rows in ([3], [11, 0, 5], list(range(11, -1, -1))):
        assert np.array_equal(inputs.prepare(np.array(rows)).items, whole[rows])


def test_a_corrupted_cache_has_an_identity_and_a_folder_of_its_own(copies: CorruptedCopies, tiny_manifest: Manifest) -> None:
    home, before = copies.home, find_caches(copies.home, "tiny")
    others = [NOISE, Corruption("noise", 3), Corruption("blur", 2)]
    copies.extract(others, QUIET)
    caches = [copies.open(each) for each in others]
    assert len({cache.fingerprint for cache in [copies.cache, *caches]}) == 4
    assert find_caches(home, "tiny") == before
    assert caches[0].path.parent == home / "caches" / "tiny~test~noise2"
    assert caches[0].identity["encoder"] == copies.cache.identity["encoder"]
    assert caches[0].identity["corruption"] == {"kind": "noise", "strength": 2, "level": 0.1, "recipe": 1}
    assert caches[0].provenance["command"] == "diffalign evaluate RUN --split test --corrupt noise --strengths 2"
    assert info(caches[0].path)["samples"] == 12
    assert not DATASET_NAME.fullmatch(caches[0].path.parent.name)  # so that nobody prepares a dataset whose caches lie there
    for name in (caches[0].path.name, caches[0].fingerprint):
        with pytest.raises(UserError, match=f"no cache of tiny named '{name}'"):
            find_cache(home, tiny_manifest, name)


def test_nothing_is_trained_on_corrupted_copies(
    copies: CorruptedCopies, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    copies.extract([NOISE], QUIET)
    names = caches_by_key(copies.home)
    given = ["train-head", "--method", "baseline", "--home", str(copies.home), "--text", names["text"]]
    assert run_cli([*given, "--dataset", "tiny", "--image", copies.open(NOISE).path.name], monkeypatch) == 2
    assert "no cache of tiny named" in capsys.readouterr().err
    assert run_cli([*given, "--dataset", "tiny~test~noise2"], monkeypatch) == 2
    assert "unknown dataset 'tiny~test~noise2'" in capsys.readouterr().err


def test_no_text_is_read(copies: CorruptedCopies, tiny_manifest: Manifest) -> None:
    """The copies know no text, and other texts make the same cache."""
    assert {sample.texts for sample in copies.manifest.samples} == {()}
    poisoned = replace(tiny_manifest, samples=tuple(replace(sample, texts=("poison", "")) for sample in tiny_manifest.samples))
    other = CorruptedCopies.of_split(copies.home, poisoned, "test", copies.cache)
    assert other.identity(NOISE) == copies.identity(NOISE)


def test_an_interrupted_extraction_goes_on(copies: CorruptedCopies, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = [Corruption("noise", strength) for strength in (1, 2, 3)]
    forward, calls = RandomProjection.forward, []

    def interrupt(self: RandomProjection, prepared: torch.Tensor) -> torch.Tensor:
        calls.append(len(prepared))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return forward(self, prepared)

    monkeypatch.setattr(RandomProjection, "forward", interrupt)
    with pytest.raises(KeyboardInterrupt):
        copies.extract(wanted, QUIET)
    assert [each for each in wanted if copies.find(each)] == wanted[:1]
    first = copies.open(wanted[0]).path
    before = {file: file.stat().st_mtime_ns for file in first.rglob("*/c/*/*")}
    copies.extract(wanted, QUIET)
    assert calls == [12, 12, 12, 12]  # the first cache is not computed again
    assert {file: file.stat().st_mtime_ns for file in first.rglob("*/c/*/*")} == before
    assert [each for each in wanted if copies.find(each)] == wanted


def test_two_encoders_have_two_caches(copies: CorruptedCopies, tiny_manifest: Manifest) -> None:
    """The runs of tuned encoders name their own cache."""
    path = extract(tiny_manifest, "random_projection", {"modality": "image", "width": 5}, copies.home, options=QUIET)
    other = CorruptedCopies.of_split(copies.home, tiny_manifest, "test", open_cache(path))
    for each in (copies, other):
        each.extract([NOISE], QUIET)
    assert other.open(NOISE).feature_shape == (5,)
    assert other.open(NOISE).path.parent == copies.open(NOISE).path.parent
    assert other.open(NOISE).fingerprint != copies.open(NOISE).fingerprint


def test_clips_are_corrupted_frame_by_frame(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (20, 16), (40 * k, 128, 90)) for k in range(4)]
    frames[0].save(tmp_path / "clip.webp", save_all=True, append_images=frames[1:], lossless=True)
    samples = (Sample("clip", "test", Path("clip.webp"), (), (0,), ""),)
    meta = {"media_type": "video", "text": {"kind": "caption", "aggregate": "mean", "sep": " "}}
    manifest = Manifest("clips", "single", ("only",), samples, meta, tmp_path)
    write_manifest(manifest, tmp_path)
    settings = {"encoder": "random_projection", "num_frames": "2"}
    cache = open_cache(extract(manifest, "frames", settings, tmp_path, options=QUIET))
    copies = CorruptedCopies.of_split(tmp_path, manifest, "test", cache)
    copies.extract([NOISE], QUIET)
    encoder = RandomProjection(Config())
    read = corrupt([frames[1], frames[3]], NOISE, "clip")
    expected = encoder(torch.stack([encoder.prepare_image(copy) for copy in read])).mean(dim=0)
    np.testing.assert_allclose(copies.open(NOISE).read(["clip"])[0], expected.detach().numpy(), atol=1e-3)


def test_what_cannot_be_corrupted_is_refused_before_anything_is_written(
    copies: CorruptedCopies, tiny_manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    home, cache = copies.home, copies.cache
    with pytest.raises(UserError, match="has features of texts: there is no picture to corrupt"):
        copies_in(home, tiny_manifest, "text")
    elsewhere = replace(cache, identity={**cache.identity, "encoder": {"name": "theirs"}})
    with pytest.raises(UserError, match="was computed elsewhere"):
        CorruptedCopies.of_split(home, tiny_manifest, "test", elsewhere)
    only_train = replace(tiny_manifest, samples=tuple(each for each in tiny_manifest.samples if each.split == "train"))
    with pytest.raises(UserError, match="tiny has no samples in split 'test'"):
        CorruptedCopies.of_split(home, only_train, "test", cache)
    changed = {**cache.identity, "encoder": {**cache.identity["encoder"], "width": 33}}
    other = replace(copies, cache=replace(cache, identity=changed))
    with pytest.raises(UserError, match=r"was made with encoder\.width = 33, which is 32 now; bring that back"):
        other.extract([NOISE], QUIET)
    monkeypatch.setattr(Encoder, "open_pictures", lambda self, path: [Image.new("RGB", (3, 3))])
    monkeypatch.setattr(RandomProjection, "prepare", lambda self, raw: torch.zeros(768))
    with pytest.raises(UserError, match="random_projection opens media in its own way"):
        copies.extract([NOISE], QUIET)
    assert [path.name for path in (home / "caches").iterdir()] == ["tiny"]
