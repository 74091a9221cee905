"""The map of test examples that readers can explore: where features lie, what each method predicts, and small pictures."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import io
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import numpy as np
from PIL import Image
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE
from threadpoolctl import threadpool_limits

from pipeline.data.manifest import Manifest
from pipeline.data.media import open_image
from pipeline.report import figure_data
from pipeline.report.blocks import Block, Heading, MappedMethod, Paragraph, SampleMap
from pipeline.report.figure_blocks import MIN_TSNE_SAMPLES, ShownHeads, read_image_features
from pipeline.report.results import BASELINE, DatasetResults
from pipeline.runtime.errors import UserError
from pipeline.types import Sample

MAX_MAPPED_SAMPLES = 1500
MAP_THUMBNAIL_PIXELS = 72
MAP_DIMENSIONS = 50  # principal components that t-SNE and UMAP see
TSNE_ITERATIONS = 500
UMAP_PACKAGES = "pip install umap-learn"


def sample_map_blocks(results: DatasetResults, manifest: Manifest, shown_heads: ShownHeads) -> list[Block]:
    """Return the section with the map; without evaluated heads on the same examples, a paragraph that says so or nothing."""
    if not shown_heads.rows:
        return []
    heading = Heading("Explore the examples")
    predictions = {row.label: figure_data.read_predictions(row) for row in shown_heads.rows}
    first = next(iter(predictions.values()))
    alike = {name: each for name, each in predictions.items() if each.ids == first.ids}
    chosen = choose_samples(first.ids[: len(first.feature) or None])
    if len(chosen) < MIN_TSNE_SAMPLES:
        return [heading, Paragraph(f"A map takes at least {MIN_TSNE_SAMPLES} examples.")]
    spaces = {name: each.feature[chosen[chosen < len(each.feature)]] for name, each in alike.items()}
    with suppress(UserError):  # the figure of the feature space says why
        image = read_image_features(results, shown_heads.rows[0].head, [first.ids[k] for k in chosen])
        spaces = {"image features": image, **spaces}
    usable = {name: each for name, each in spaces.items() if len(each) == len(chosen) and np.isfinite(each).all()}
    if not usable:
        return [heading, Paragraph("No features of these examples can be read, so there is no map.")]
    samples = {sample.id: sample for sample in manifest.split(results.split)}
    shown = [samples[first.ids[k]] for k in chosen]
    with threadpool_limits(1), ThreadPoolExecutor(os.cpu_count()) as pool:  # one thread per map: the same bits every time
        positions = dict(zip(usable, pool.map(project, usable.values()), strict=True))
        pictures = tuple(pool.map(lambda sample: _small_picture(manifest, sample), shown))
    best = [row.label for row in shown_heads.baseline_and_best if row.head.config.method != BASELINE]
    methods = tuple(_map_method(name, each, chosen) for name, each in alike.items())
    block = SampleMap(
        ids=tuple(sample.id for sample in shown),
        pictures=pictures,
        labels=tuple(sample.labels for sample in shown),
        class_names=manifest.class_names,
        spaces=positions,
        methods=methods,
        baseline=next((row.label for row in shown_heads.rows if row.head.config.method == BASELINE), ""),
        shown_first=(best or list(alike))[0],
        caption=_caption(results, len(shown), len(first.ids), list(next(iter(positions.values())))),
    )
    return [heading, block]


def choose_samples(ids: Sequence[str]) -> np.ndarray:
    """Return the indices of the samples on the map, in ascending order: all, or those with the lowest SHA-256 of their ids."""
    ranked = sorted(range(len(ids)), key=lambda index: hashlib.sha256(ids[index].encode()).digest())
    return np.sort(np.array(ranked[:MAX_MAPPED_SAMPLES], dtype=np.int64))


def project(vectors: np.ndarray) -> dict[str, np.ndarray]:
    """Return positions [n,2] of vectors [n,D] by name of the projection, the same every time; UMAP only if it is installed."""
    vectors = vectors - vectors.mean(axis=0)
    vectors = vectors / max(float(np.abs(vectors).max()), 1e-12)
    reduced = PCA(min(MAP_DIMENSIONS, *vectors.shape), svd_solver="full").fit_transform(vectors)
    plane = np.pad(reduced[:, :2], ((0, 0), (0, max(2 - reduced.shape[1], 0))))
    perplexity = min(30.0, (len(vectors) - 1) / 3)
    tsne = TSNE(
        2, perplexity=perplexity, init=plane / max(plane[:, 0].std(), 1e-12) * 1e-4, max_iter=TSNE_ITERATIONS, random_state=0
    )
    positions = {"t-SNE": tsne.fit_transform(reduced), "PCA": plane}
    if importlib.util.find_spec("umap"):
        umap = importlib.import_module("umap").UMAP(random_state=0, n_jobs=1, n_neighbors=min(15, len(vectors) - 1))
        positions["UMAP"] = umap.fit_transform(reduced)
    return {name: each.astype(np.float32) for name, each in positions.items()}


def _map_method(name: str, predictions: figure_data.SeedPredictions, chosen: np.ndarray) -> MappedMethod:
    logits = predictions.logits[chosen]
    best = logits.argmax(axis=1)
    confidence = np.exp(predictions.log_scores[chosen, best])
    return MappedMethod(name, best.astype(np.int32), confidence.astype(np.float32), predictions.is_right[chosen])


def _small_picture(manifest: Manifest, sample: Sample) -> bytes:
    """A small JPEG of the sample on white; empty when its file cannot be shown."""
    try:
        picture = open_image(manifest.media_path(sample), MAP_THUMBNAIL_PIXELS)
    except UserError:
        return b""
    picture.thumbnail((MAP_THUMBNAIL_PIXELS, MAP_THUMBNAIL_PIXELS))
    page = Image.new("RGBA", picture.size, "white")
    page.alpha_composite(picture.convert("RGBA"))
    buffer = io.BytesIO()
    page.convert("RGB").save(buffer, format="JPEG", quality=75, optimize=True)
    return buffer.getvalue()


def _caption(results: DatasetResults, num_shown: int, num_samples: int, projections: Sequence[str]) -> str:
    which = "All" if num_shown == num_samples else f"{num_shown} of the"
    rule = (
        "" if num_shown == num_samples else " (those with the lowest SHA-256 of their ids among the ones with stored features)"
    )
    no_umap = "" if "UMAP" in projections else f"; UMAP takes {UMAP_PACKAGES}"
    return (
        f"{which} {num_samples} examples of the {results.split} split{rule}, with the predictions of the first seed. "
        f"Positions: {' and '.join(projections)} of what the image encoder gives, or of the vector that a method's classifier "
        f"reads; with a fixed seed, t-SNE of {MAP_DIMENSIONS} principal components in {TSNE_ITERATIONS} iterations{no_umap}. "
        "Blue: the method is right where the baseline is wrong; red: wrong where it is right; grey: both are right; yellow: "
        "both are wrong. Point at a dot for its picture, drag a frame to mark dots in the table below, which shows the same "
        "examples."
    )
