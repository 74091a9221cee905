"""The map of samples without a browser: which samples, where they lie, and data that are inert inside of a page."""

from __future__ import annotations

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from helpers.pages import HOSTILE_TEXT
from sklearn.manifold import trustworthiness
from sklearn.neighbors import NearestNeighbors

from pipeline.report import sample_map
from pipeline.report.blocks import MappedMethod, SampleMap
from pipeline.report.explorer import DATA_ID, map_data
from pipeline.report.html import render_html


def make_map(name: str) -> SampleMap:
    """Return a map of ten samples, all of whose texts are a name."""
    predicted = np.arange(10, dtype=np.int32) % 2
    method = MappedMethod(name, predicted, np.full(10, 0.5, np.float32), predicted == 0)
    positions = {"PCA": np.random.default_rng(0).normal(size=(10, 2)).astype(np.float32)}
    texts = {"ids": (name,) * 10, "class_names": (name, f"{name} 2"), "baseline": name, "shown_first": name, "caption": name}
    return SampleMap(pictures=(b"",) * 10, labels=((0,),) * 10, spaces={name: positions}, methods=(method,), **texts)


def test_of_many_samples_those_with_the_lowest_hash_are_on_the_map(monkeypatch: pytest.MonkeyPatch) -> None:
    ids = [f"sample {k}" for k in range(50)]
    assert sample_map.choose_samples(ids).tolist() == list(range(50))
    monkeypatch.setattr(sample_map, "MAX_MAPPED_SAMPLES", 20)
    lowest = sorted(range(50), key=lambda k: hashlib.sha256(ids[k].encode()).hexdigest())[:20]
    assert sample_map.choose_samples(ids).tolist() == sorted(lowest)


def test_positions_are_those_of_the_definitions_and_the_same_every_time() -> None:
    vectors = np.random.default_rng(0).normal(size=(40, 6)).astype(np.float32) * np.array([9, 5, 1, 1, 1, 1], np.float32)
    first, again = sample_map.project(vectors), sample_map.project(vectors)
    assert set(first) >= {"t-SNE", "PCA"}
    assert all(np.array_equal(first[name], again[name]) for name in first)
    centred = vectors - vectors.mean(axis=0)
    u, s, _ = np.linalg.svd(centred / np.abs(centred).max(), full_matrices=False)
    np.testing.assert_allclose(np.abs(first["PCA"]), np.abs(u[:, :2] * s[:2]), atol=1e-5)
    constant = sample_map.project(np.ones((10, 1), np.float32))
    assert all(np.isfinite(each).all() for each in constant.values())


@pytest.mark.exhaustive  # umap-learn, with its compiler, is not among the pinned packages
def test_umap_keeps_neighbours_and_gives_the_same_bits_in_any_thread() -> None:
    pytest.importorskip("umap", reason="needs umap-learn: pip install umap-learn")
    rng = np.random.default_rng(0)
    label = np.arange(90) % 3
    vectors = (rng.normal(size=(90, 20)) + 20 * rng.normal(size=(3, 20))[label]).astype(np.float32)
    with ThreadPoolExecutor(3) as pool:  # as a report computes its maps
        first, *others = (each["UMAP"] for each in pool.map(sample_map.project, [vectors] * 3))
    assert all(np.array_equal(first, each) for each in others)
    assert first.shape == (90, 2)
    neighbours = NearestNeighbors(n_neighbors=6).fit(first).kneighbors(return_distance=False)
    assert (label[neighbours] == label[:, None]).all()
    assert trustworthiness(vectors, first) > 0.8


@pytest.mark.parametrize("projections", [["t-SNE", "PCA"], ["t-SNE", "PCA", "UMAP"]])
def test_the_page_says_how_to_get_umap_where_it_is_missing(projections: list[str]) -> None:
    results: Any = SimpleNamespace(split="test")
    caption = sample_map._caption(results, 10, 10, projections)
    assert " and ".join(projections) in caption
    assert ("UMAP takes pip install umap-learn" in caption) == ("UMAP" not in projections)


def test_equal_maps_are_equal_bytes_and_hostile_names_cannot_leave_the_data() -> None:
    name = f"p1001 </script><!--<script>{HOSTILE_TEXT}"
    data = map_data(make_map(name))
    assert data == map_data(make_map(name))
    assert "<" not in data
    assert name in json.dumps(json.loads(data), ensure_ascii=False).replace('\\"', '"').replace("\\\\", "\\")
    page = render_html("title", [make_map(name)])
    assert page.count("</script>") == 6  # three of the library, its start, ours, and the data
    assert page.count(f'id="{DATA_ID}"') == 1
    assert "script-src 'unsafe-eval' 'sha256-" in page.replace("&#x27;", "'")
