"""Scores are compared with SciPy, and the confidences of MARNet's log-scores with their definition."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.special import log_expit, log_softmax, softmax

from pipeline.evaluation.scores import log_scores
from pipeline.methods.marnet import fuse_hm, fuse_sum

Z = (8 * np.random.default_rng(0).normal(size=(50, 6))).astype(np.float32)
SINGLE, MULTI = np.arange(50) % 6, np.eye(6)[np.arange(50) % 6]


@pytest.mark.parametrize("label_loss", ["softmax_kl", "softmax_multihot"])
@pytest.mark.parametrize("label", [SINGLE, MULTI], ids=["single", "multi"])
def test_scores_of_a_softmax_are_its_log(label: np.ndarray, label_loss: str) -> None:
    np.testing.assert_allclose(log_scores(Z, label, label_loss), log_softmax(Z.astype(float), axis=1), rtol=1e-12)


def test_scores_of_bce_are_the_log_of_the_sigmoid_for_multi_label_data_alone() -> None:
    np.testing.assert_allclose(log_scores(Z, MULTI, "bce"), log_expit(Z.astype(float)), rtol=1e-12)
    np.testing.assert_allclose(log_scores(Z, SINGLE, "bce"), log_softmax(Z.astype(float), axis=1), rtol=1e-12)


def test_large_logits_neither_overflow_nor_become_equal() -> None:
    z = np.array([[900.0, -900.0, 60.0, 61.0]], np.float32)
    for label in (SINGLE[:1], np.array([[1, 0, 0, 0]])):
        scores = log_scores(z, label, "bce")
        assert np.isfinite(scores).all()
        assert scores[0, 1] < scores[0, 2] < scores[0, 3] < scores[0, 0] or scores[0, 0] == 0


@pytest.mark.parametrize("label", [SINGLE, MULTI], ids=["single", "multi"])
@pytest.mark.parametrize("label_loss", ["softmax_kl", "bce"])
def test_scores_rank_the_classes_of_a_sample_as_logits_do(label: np.ndarray, label_loss: str) -> None:
    z = Z + np.float32(30.0)  # log_softmax in float32 would lose digits
    np.testing.assert_array_equal(np.argsort(log_scores(z, label, label_loss), axis=1), np.argsort(z, axis=1))


def test_the_fusions_sum_and_hm_become_a_distribution_over_classes() -> None:
    z_e, z_c = torch.from_numpy(Z), torch.from_numpy(Z[::-1].copy())
    both = (z_e + z_c).double().sigmoid()
    product = z_e.double().sigmoid() * z_c.double().sigmoid()
    for fused, weight in ((fuse_sum(z_e, z_c), both), (fuse_hm(z_e, z_c), product / (1 + product))):
        confidence = np.exp(log_scores(fused.numpy(), SINGLE, "softmax_kl"))
        np.testing.assert_allclose(confidence, (weight / weight.sum(dim=1, keepdim=True)).numpy(), rtol=1e-4)
        np.testing.assert_allclose(confidence.sum(axis=1), 1.0)
        assert np.exp(fused.numpy()).sum(axis=1).std() > 0.1  # they were none before
    np.testing.assert_allclose(softmax(Z, axis=1), np.exp(log_scores(Z, SINGLE, "softmax_kl")), rtol=1e-4)
