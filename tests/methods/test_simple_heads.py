"""Heads without text that every claim is measured against, with scikit-learn and SciPy as oracles."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from helpers.method_cases import CLASSES, batches_of, build, cross_entropy, fitted, make_batch, make_rng, seeded_loss, to_numpy
from helpers.tiny_heads import caches_by_key, train_tiny
from safetensors.torch import load_file
from scipy.special import ndtr
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import NearestCentroid

from pipeline.runtime import plugins
from pipeline.runtime.settings import configure
from pipeline.training.features import open_features


def test_the_mlp_is_its_layers() -> None:
    model, batch = fitted("mlp", num_hidden=3)
    x = (to_numpy(batch["image"]) - to_numpy(batch["image"]).mean(axis=0)) / to_numpy(batch["image"]).std(axis=0)
    for layer in model.layers.layers:
        x = x @ to_numpy(layer.weight).T + to_numpy(layer.bias)
        x = x * ndtr(x)  # GELU
    np.testing.assert_allclose(to_numpy(model.feature(batch["image"], make_rng())), x, atol=1e-4)
    logits = x @ to_numpy(model.classifier.weight).T + to_numpy(model.classifier.bias)
    np.testing.assert_allclose(to_numpy(model.predict(batch["image"], make_rng())), logits, atol=1e-4)
    expected = cross_entropy(torch.from_numpy(logits), batch["label"])
    np.testing.assert_allclose(seeded_loss(model, batch)["loss"].item(), expected, rtol=1e-4)


def test_the_mlp_has_about_the_size_of_seda() -> None:
    shapes = {"image": (1280,), "text": (384,), "label": (), "classes": (150,)}
    sizes = {}
    for name in ("mlp", "seda"):
        plugin = plugins.get("methods", name)
        model = plugin(configure(plugin.Config, {}), shapes)
        parts = [part for key, part in model.named_children() if key != "space"]  # frozen adapters are no hidden layers
        sizes[name] = sum(weight.numel() for part in parts for weight in part.parameters())
    assert 0.8 < sizes["mlp"] / sizes["seda"] < 1.25


@pytest.mark.parametrize("num_hidden", [1, 3])
def test_dropout_acts_in_training_only(num_hidden: int) -> None:
    model, batch = fitted("mlp", dropout=0.5, num_hidden=num_hidden)
    losses = {
        mode: [seeded_loss(model.train(mode), batch, seed=seed)["loss"].item() for seed in (0, 1)] for mode in (True, False)
    }
    assert losses[True][0] != losses[True][1]
    assert losses[False][0] == losses[False][1]


@pytest.mark.parametrize("scale", ["per_dim", "global", "l2sqrtd"])
def test_the_nearest_class_mean_is_scikit_learns(scale: str) -> None:
    model, batch = fitted("class_mean", scale=scale)
    x = to_numpy(model.feature(batch["image"], make_rng()))
    oracle = NearestCentroid().fit(x, batch["label"].numpy())
    other = 2.0 * torch.randn(200, x.shape[1], generator=torch.Generator().manual_seed(5)) + batch["image"].mean(dim=0)
    for log_scale in (0.0, -2.0, 3.0):  # the temperature changes no predicted class
        model.log_scale.data.fill_(log_scale)
        logits = to_numpy(model.predict(other, make_rng()))
        found = to_numpy(model.feature(other, make_rng()))
        np.testing.assert_array_equal(logits.argmax(axis=1), oracle.predict(found))
        expected = -np.exp(log_scale) * ((found[:, None] - oracle.centroids_[None]) ** 2).mean(axis=2)
        np.testing.assert_allclose(logits, expected, rtol=1e-3, atol=1e-4)


def test_shrinkage_is_that_many_samples_at_the_origin() -> None:
    plain, batch = fitted("class_mean")
    shrunk = fitted("class_mean", shrinkage=3.0)[0]
    count = np.bincount(batch["label"])[:, None]
    np.testing.assert_allclose(to_numpy(shrunk.means), to_numpy(plain.means) * count / (count + 3.0), rtol=1e-5)


def test_a_class_without_training_samples_is_never_nearest() -> None:
    model, batch = build("class_mean"), make_batch()
    model.begin("head", batches_of({**batch, "label": batch["label"].clamp(max=CLASSES - 2)}))
    assert model.predict(batch["image"], make_rng()).argmax(dim=1).max() == CLASSES - 2


def test_a_sample_counts_in_the_means_of_all_its_classes() -> None:
    model, batch = fitted("class_mean", kind="multi")
    x, label = to_numpy(model.feature(batch["image"], make_rng())), batch["label"].numpy().astype(bool)
    expected = np.stack([x[label[:, number]].mean(axis=0) for number in range(CLASSES)])
    np.testing.assert_allclose(to_numpy(model.means), expected, atol=1e-5)


@pytest.mark.parametrize("inverse_l2", [1e-3, 1.0, 100.0])
def test_logistic_regression_is_scikit_learns(inverse_l2: float) -> None:
    model, batch = fitted("logreg", inverse_l2=inverse_l2)
    x, label = to_numpy(model.feature(batch["image"], make_rng())), batch["label"].numpy()
    oracle = LogisticRegression(C=inverse_l2, tol=1e-10, max_iter=10_000).fit(x, label)
    np.testing.assert_allclose(to_numpy(model.classifier.weight), oracle.coef_, atol=2e-4)
    scores = to_numpy(model.predict(batch["image"], make_rng()).softmax(dim=1))
    np.testing.assert_allclose(scores, oracle.predict_proba(x), atol=1e-4)


@pytest.mark.parametrize("kind", ["single", "multi"])
@pytest.mark.parametrize("label_loss", ["softmax_kl", "bce"])
def test_logistic_regression_is_at_its_minimum(kind: str, label_loss: str) -> None:
    model, batch = fitted("logreg", kind, label_loss=label_loss, inverse_l2=0.1)
    parts = seeded_loss(model, batch)
    gradients = torch.autograd.grad(parts["loss"], list(model.parameters()))
    assert max(gradient.abs().max() for gradient in gradients) < 1e-5
    penalty = model.classifier.weight.square().sum() / (2 * 0.1 * len(batch["label"]))
    torch.testing.assert_close(parts["loss"] - parts["ce"], penalty)


def test_training_leaves_the_minimum_as_it_is(tiny_home: Path, tmp_path: Path) -> None:
    home = Path(shutil.copytree(tiny_home, tmp_path / "home"))
    run = train_tiny(home, "logreg", training={"weight_decay": 0.1, "weight_average": 0.9})
    features = open_features(home, "tiny", "logreg", caches_by_key(home))
    plugin = plugins.get("methods", "logreg")
    model = plugin(configure(plugin.Config, {}), features.shapes)
    with torch.no_grad():
        model.begin("head", lambda: iter([features.train.columns]))
    trained = load_file(run.path / "checkpoint.safetensors")
    torch.testing.assert_close(trained["classifier.weight"], model.state_dict()["classifier.weight"], atol=1e-5, rtol=0)
    metrics = {row["val_metric"] for _, row in pd.read_csv(run.path / "history.csv").iterrows()}
    assert len(metrics) == 1
