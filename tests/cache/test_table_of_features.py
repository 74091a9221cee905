"""Tables of cached features: joined by id, also when features are missing. An empty split is refused with the remedy."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.cache import Cache
from pipeline.cache.reader import find_cache
from pipeline.cache.table import load_split
from pipeline.data.manifest import Manifest
from pipeline.extraction.extract import ExtractOptions, extract
from pipeline.types import Split

CPU = torch.device("cpu")


def extract_caches(manifest: Manifest, home: Path) -> dict[str, Cache]:
    """Extract the image and text features of a manifest, and return the caches by modality."""
    for modality in ("image", "text"):
        extract(manifest, "random_projection", {"modality": modality, "width": 8}, home, options=ExtractOptions(progress=False))
    folders = sorted((home / "caches" / manifest.dataset).iterdir())
    caches = [find_cache(home, manifest, folder.name) for folder in folders]
    return {cache.identity["encoder"]["modality"]: cache for cache in caches}


def with_changed_sample(manifest: Manifest, sample_id: str, **fields: object) -> Manifest:
    """Return the manifest with some fields of one sample changed."""
    samples = tuple(replace(sample, **fields) if sample.id == sample_id else sample for sample in manifest.samples)
    return replace(manifest, samples=samples)


@pytest.mark.parametrize(
    ("split", "remedy", "message"),
    [
        ("val", "--set val_percent=10", "the val split of tiny is empty; run: diffalign prepare tiny --set val_percent=10"),
        ("val", "", "the val split of tiny is empty; prepare it with samples in every split"),
        ("train", "--set val_percent=10", "the train split of tiny is empty; prepare it with samples in every split"),
    ],
)
def test_an_empty_split_is_refused_with_its_remedy(
    split: Split, remedy: str, message: str, tiny_manifest: Manifest, tmp_path: Path
) -> None:
    samples = tuple(sample for sample in tiny_manifest.samples if sample.split != split)
    manifest = replace(tiny_manifest, samples=samples, meta={**tiny_manifest.meta, "val_remedy": remedy})
    with pytest.raises(ValueError, match="empty") as refusal:
        load_split(manifest, extract_caches(manifest, tmp_path), split, CPU, "mean")
    assert str(refusal.value) == message


def test_a_sample_without_text_keeps_its_image_and_gets_the_mean_text(tiny_manifest: Manifest, tmp_path: Path) -> None:
    manifest = with_changed_sample(tiny_manifest, "red-0", texts=())
    caches = extract_caches(manifest, tmp_path)
    table = load_split(manifest, caches, "train", CPU, "mean")
    row, others = table.ids.index("red-0"), [id for id in table.ids if id != "red-0"]
    assert len(table) == 24
    assert table.columns["paired"].tolist() == [float(id != "red-0") for id in table.ids]
    expected = caches["text"].read(others).mean(axis=0)
    np.testing.assert_allclose(table.columns["text"][row].numpy(), expected, rtol=1e-5)
    np.testing.assert_array_equal(table.columns["image"].numpy(), caches["image"].read(list(table.ids)))


def test_a_sample_without_image_feature_is_left_out_by_name(tiny_manifest: Manifest, tmp_path: Path) -> None:
    (tmp_path / "media").mkdir()
    for file in tiny_manifest.media_root.iterdir():
        (tmp_path / "media" / file.name).write_bytes(file.read_bytes() if file.stem != "blue-2" else b"")
    manifest = replace(tiny_manifest, media_root=tmp_path / "media")
    table = load_split(manifest, extract_caches(manifest, tmp_path), "train", CPU, "mean")
    assert table.excluded == ("blue-2",)
    assert len(table) == 23
    assert "blue-2" not in table.ids


def test_labels_of_many_classes_are_indicators(tiny_manifest: Manifest, tmp_path: Path) -> None:
    manifest = replace(with_changed_sample(tiny_manifest, "red-0", labels=(0, 2)), label_kind="multi")
    table = load_split(manifest, extract_caches(manifest, tmp_path), "train", CPU, "mean")
    assert table.columns["label"][table.ids.index("red-0")].tolist() == [1.0, 0.0, 1.0, 0.0]
    assert table.columns["label"].sum().item() == 25
