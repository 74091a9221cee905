"""k nearest neighbours against scikit-learn, and what keeps them the same in every batch."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from helpers.method_cases import CLASSES, ROWS, WIDTH, batches_of, build, fitted, make_batch, make_rng, to_numpy
from helpers.tiny_heads import train_tiny
from safetensors.torch import load_file
from scipy.special import expit, softmax
from sklearn.neighbors import KNeighborsClassifier, KNeighborsRegressor
from torch import Tensor

from pipeline.evaluation.evaluate import evaluate
from pipeline.methods.knn import NEIGHBOURS, SEARCHED_ROWS, UNIFORM_SHARE
from pipeline.runtime.rng import KeyedRNG


def weights_of(tau: float) -> Any:
    """The weight of neighbours by their cosine distance, as scikit-learn takes it."""
    return lambda distance: np.exp(-distance / tau)


def other_images(rows: int = 300) -> Tensor:
    return 3.0 * torch.randn(rows, WIDTH, generator=torch.Generator().manual_seed(5)) + 1.0


def predicted(model: Any, image: Tensor) -> np.ndarray:
    return to_numpy(model.predict(image, make_rng(samples=torch.arange(len(image)))))


@pytest.mark.parametrize("scale", ["per_dim", "global", "l2sqrtd"])
@pytest.mark.parametrize("tau", [0.07, 1.0])
def test_the_vote_is_scikit_learns(tau: float, scale: str) -> None:
    model, batch = fitted("knn", tau=tau, scale=scale)
    x, image = to_numpy(model.scale(batch["image"])), other_images()
    for candidate, k in enumerate(NEIGHBOURS):
        model.choose(candidate)
        oracle = KNeighborsClassifier(min(k, ROWS), metric="cosine", weights=weights_of(tau)).fit(x, batch["label"])
        expected = oracle.predict_proba(to_numpy(model.scale(image)))
        scores = np.exp(predicted(model, image))
        np.testing.assert_allclose(scores, expected * (1 - UNIFORM_SHARE) + UNIFORM_SHARE / CLASSES, atol=1e-5)
        np.testing.assert_allclose(scores.sum(axis=1), 1.0, atol=1e-5)


@pytest.mark.parametrize("label_loss", ["softmax_kl", "bce"])
def test_several_labels_are_the_weighted_mean_of_the_neighbours(label_loss: str) -> None:
    model, batch = fitted("knn", "multi", label_loss=label_loss)
    x, image = to_numpy(model.scale(batch["image"])), other_images()
    for candidate, k in enumerate(NEIGHBOURS):
        model.choose(candidate)
        oracle = KNeighborsRegressor(min(k, ROWS), metric="cosine", weights=weights_of(0.07)).fit(x, batch["label"])
        expected = oracle.predict(to_numpy(model.scale(image)))
        logits = predicted(model, image)
        if label_loss == "bce":  # what the scores of multi-label data are, see `scores.log_scores`
            np.testing.assert_allclose(expit(logits), expected * (1 - UNIFORM_SHARE) + UNIFORM_SHARE / 2, atol=1e-5)
        else:
            shares = expected / expected.sum(axis=1, keepdims=True)
            np.testing.assert_allclose(
                softmax(logits, axis=1), shares * (1 - UNIFORM_SHARE) + UNIFORM_SHARE / CLASSES, atol=1e-5
            )


def many_rows(rows: int) -> dict[str, Tensor]:
    """A training split of more than one block of the search, in which every image is there three times with other labels."""
    batch = make_batch(rows=rows)
    image = batch["image"][: rows // 3].repeat(3, 1)
    return {**batch, "image": image, "label": torch.arange(rows) // (rows // 3)}


@torch.no_grad()
def test_equal_training_samples_are_found_in_the_same_order_in_every_batch() -> None:
    rows = 3 * SEARCHED_ROWS
    model, batch = build("knn"), many_rows(rows)
    model.begin("neighbours", batches_of(batch, 1000))
    image = batch["image"][:200] + 0.1 * other_images(200)
    for candidate in range(4):
        model.choose(candidate)
        together = predicted(model, image)
        for size in (1, 7, 64):
            parts = [model.predict(part, KeyedRNG.seeded(0, torch.arange(len(part)))) for part in image.split(size)]
            np.testing.assert_allclose(to_numpy(torch.cat(parts)), together, atol=1e-5)
    model.choose(0)
    nearest = predicted(model, batch["image"][:50])
    assert set(nearest.argmax(axis=1)) == {0}  # of three equal samples, the first


def test_a_search_in_blocks_finds_the_same_neighbours() -> None:
    rows = 2 * SEARCHED_ROWS + 100
    model, batch = build("knn", scale="l2sqrtd"), make_batch(rows=rows)
    model.begin("neighbours", batches_of(batch, 500))
    image = other_images(100)
    cosine, number = model._nearest(model.feature(image, make_rng()))
    x, y = (to_numpy(each) / np.linalg.norm(to_numpy(each), axis=1, keepdims=True) for each in (image, batch["image"]))
    order = np.argsort(-(x @ y.T), axis=1)[:, : NEIGHBOURS[-1]]
    np.testing.assert_array_equal(number.numpy(), order)
    np.testing.assert_allclose(cosine, np.take_along_axis(x @ y.T, order, axis=1), atol=1e-6)


def test_a_checkpoint_brings_its_own_number_of_samples_and_not_another_width() -> None:
    model, batch = fitted("knn")
    other = build("knn")
    other.load_state_dict(model.state_dict())
    np.testing.assert_array_equal(predicted(other.train(False), batch["image"]), predicted(model, batch["image"]))
    narrow = {**model.state_dict(), "rows.feature": model.rows.feature[:, :-1]}
    with pytest.raises(RuntimeError, match=r"size mismatch for rows\.feature"):
        build("knn").load_state_dict(narrow)


def test_the_run_keeps_the_best_k_and_its_training_split(tiny_home: Path, tmp_path: Path) -> None:
    home = Path(shutil.copytree(tiny_home, tmp_path / "home"))
    run = train_tiny(home, "knn")
    history = pd.read_csv(run.path / "history.csv")
    assert history["candidate"].tolist() == list(range(len(NEIGHBOURS)))
    best = history.sort_values(["val_metric", "val_loss", "epoch"], ascending=[False, True, True]).iloc[0]
    weights = load_file(run.path / "checkpoint.safetensors")
    assert weights["k"].item() == NEIGHBOURS[int(best["candidate"])]
    assert len(weights["rows.feature"]) == len(weights["rows.label"]) == 24
    assert evaluate(home, run, "val", {})["metrics"]["acc1"] == best["val_metric"]
