"""SDM: its closed forms, its flags, and the whole objective against NumPy and SciPy."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from helpers.method_cases import LABEL_KINDS, ROWS, cross_entropy, fitted, make_rng, seeded_loss, to_numpy
from scipy.spatial.distance import cdist
from scipy.special import log_softmax, rel_entr

from pipeline.methods.sdm import label_overlap, matching_loss

EYE = torch.eye(8, dtype=torch.float64)


def test_aligned_embeddings_cost_nothing() -> None:
    assert abs(matching_loss(EYE, 3 * EYE, EYE, 0.02).item()) < 1e-6
    label = torch.tensor([0, 1, 2, 0, 1, 0])
    assert abs(matching_loss(EYE[label], EYE[label], label_overlap(label).double(), 0.02).item()) < 1e-6


def test_equal_embeddings_cost_what_the_closed_form_says() -> None:
    ones = torch.ones(4, 3, dtype=torch.float64)
    expected = 2 * (math.log(0.25) - 0.25 * math.log(1 + 1e-8) - 0.75 * math.log(1e-8))
    assert expected == pytest.approx(24.858, abs=1e-3)
    assert matching_loss(ones, ones, EYE[:4, :4], 0.02).item() == pytest.approx(expected, rel=1e-9)


def test_it_is_symmetric_and_ignores_lengths() -> None:
    f, g = torch.randn(2, 8, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    match = label_overlap(torch.tensor([0, 1, 2, 0, 1, 0, 3, 3])).double()
    loss = matching_loss(f, g, match, 0.1)
    torch.testing.assert_close(matching_loss(g, f, match.T, 0.1), loss)
    torch.testing.assert_close(matching_loss(2 * f, g / 3, match, 0.1), loss)


def test_the_overlap_of_labels_is_the_jaccard_index() -> None:
    label = (torch.rand(20, 6, generator=torch.Generator().manual_seed(0)) < 0.4).float()
    label[3] = 0  # a sample without labels matches itself alone
    expected = 1 - cdist(label.numpy().astype(bool), label.numpy().astype(bool), "jaccard")
    expected[3], expected[:, 3] = 0, 0
    np.fill_diagonal(expected, 1)
    np.testing.assert_allclose(label_overlap(label).numpy(), expected, atol=1e-6)


@pytest.mark.parametrize("kind", LABEL_KINDS)
@pytest.mark.parametrize("identity", ["class", "instance"])
def test_objective(identity: str, kind: str) -> None:
    method, batch = fitted("sdm", kind, 10, w_sdm=0.7, w_ce_text=0.3, tau=0.1, identity=identity)
    rows = (batch["paired"] > 0).numpy()
    h_v, h_s = to_numpy(method.common.image(batch["image"])), to_numpy(method.common.text(batch["text"], batch["paired"]))
    cosine = 1 - cdist(h_v[rows], h_s[rows], "cosine")
    match = to_numpy(label_overlap(batch["label"] if identity == "class" else torch.arange(ROWS)))[rows][:, rows]

    def divergence(logits: np.ndarray, match: np.ndarray) -> float:
        q = match / match.sum(1, keepdims=True) + 1e-8
        return float(rel_entr(np.exp(log_softmax(logits, axis=1)), q).sum(1).mean())

    sdm = divergence(cosine / 0.1, match) + divergence(cosine.T / 0.1, match.T)
    logits = [method.classifier(torch.from_numpy(h).float()) for h in (h_v, h_s)]
    ce, ce_text = cross_entropy(logits[0], batch["label"]), cross_entropy(logits[1], batch["label"], rows)
    parts = seeded_loss(method, batch)
    assert parts["sdm"].item() == pytest.approx(sdm, rel=1e-4)
    assert parts["loss"].item() == pytest.approx(ce + 0.3 * ce_text + 0.7 * sdm, rel=1e-4)
    torch.testing.assert_close(method.predict(batch["image"], make_rng()), logits[0])


def test_every_flag_changes_the_loss() -> None:
    flags: list[dict[str, Any]] = [{}, {"identity": "instance"}, {"activation": "none"}, {"tau": 0.1}]
    losses = [seeded_loss(*fitted("sdm", **changes))["loss"].item() for changes in flags]
    assert len(set(losses)) == len(losses)
