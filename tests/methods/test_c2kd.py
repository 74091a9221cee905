"""C2KD: Kendall's correlation and the masks against SciPy, and what may have a gradient."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from helpers.method_cases import CLASSES, LABEL_KINDS, cross_entropy, fitted, make_batch, seeded_loss, to_numpy
from scipy.special import rel_entr, softmax
from scipy.stats import kendalltau
from torch import Tensor

from pipeline.methods import c2kd
from pipeline.methods.c2kd import distillation, rank_correlation, without_targets


def logits(rows: int, classes: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, classes, generator=torch.Generator().manual_seed(seed))


def divergence(pupil: Tensor, source: Tensor) -> np.ndarray:
    """KL(source || pupil) of each row, with SciPy."""
    return rel_entr(softmax(to_numpy(source), axis=1), softmax(to_numpy(pupil), axis=1)).sum(1)


def kendall(x: Any, y: Any) -> float:
    result: Any = kendalltau(x, y)
    return result.statistic


@pytest.mark.parametrize("has_ties", [False, True])
def test_the_rank_correlation_is_kendall_s(has_ties: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = logits(12, 11), logits(12, 11, seed=1)
    if has_ties:
        a, b = a.round(), b.round()
    expected = [kendall(x, y) for x, y in zip(a.numpy(), b.numpy(), strict=True)]
    for size in (64, 4):  # all classes together, or a few at a time
        monkeypatch.setattr(c2kd, "CLASSES_AT_A_TIME", size)
        np.testing.assert_allclose(rank_correlation(a, b).numpy(), expected, atol=1e-6)
    assert torch.equal(rank_correlation(a, torch.ones_like(a)), torch.zeros(12))


@pytest.mark.parametrize("kind", LABEL_KINDS)
def test_equal_and_opposite_proxies(kind: str) -> None:
    method, batch = fitted("c2kd", kind)
    p, paired = logits(len(batch["key"]), CLASSES), batch["paired"]
    nt, kept = method.between_proxies(p, p.clone(), batch["label"], paired)
    assert (rank_correlation(p, p) == 1).all()
    assert (nt.item(), kept.item()) == (pytest.approx(0.0, abs=1e-7), pytest.approx(1.0))
    assert (rank_correlation(p, -p) == -1).all()
    assert [value.item() for value in method.between_proxies(p, -p, batch["label"], paired)] == [0.0, 0.0]


@pytest.mark.parametrize("kind", LABEL_KINDS)
def test_the_target_logit_does_not_count_and_the_rest_equals_scipy(kind: str) -> None:
    label = make_batch(kind, rows=9)["label"]
    target = torch.eye(CLASSES)[label] if kind == "single" else label
    target[-1] = 1.0  # all classes are targets: nothing is left to distil
    a, b = logits(9, CLASSES), logits(9, CLASSES, seed=1)
    found = distillation(without_targets(a, target, False), without_targets(b, target, False))
    moved = distillation(without_targets(a + 5 * target, target, False), without_targets(b - 3 * target, target, False))
    assert torch.equal(found, moved)
    for row in range(8):
        rest = target[row] == 0
        if rest.any():
            assert found[row].item() == pytest.approx(divergence(a[row : row + 1, rest], b[row : row + 1, rest])[0], abs=1e-6)
    assert found[-1] == 0
    zeroed = [x * (1 - target) for x in (a, b)]
    repo = distillation(*(without_targets(x, target, True) for x in (a, b)))
    np.testing.assert_allclose(to_numpy(repo), divergence(*zeroed), atol=1e-6)


def test_the_source_of_a_distillation_has_no_gradient() -> None:
    a, b = logits(6, 4).requires_grad_(), logits(6, 4, seed=1).requires_grad_()
    distillation(a, b).sum().backward()
    assert b.grad is None
    assert a.grad is not None
    np.testing.assert_allclose(to_numpy(a.grad), softmax(to_numpy(a), axis=1) - softmax(to_numpy(b), axis=1), atol=1e-6)


@pytest.mark.parametrize("kind", LABEL_KINDS)
def test_objective(kind: str) -> None:
    method, batch = fitted("c2kd", kind, 10, w_proxy=0.7, w_nt=1.3, min_rank=-0.3)
    rows, label = (batch["paired"] > 0).numpy(), batch["label"]
    h_v, h_s = method.common.image(batch["image"]), method.common.text(batch["text"], batch["paired"])
    z_s, z_t = method.classifier(h_v), method.text_classifier(h_s)
    p_s, p_t = method.proxy(h_v, torch.ones(len(h_v))), method.text_proxy(h_s, batch["paired"])
    own = (divergence(p_s, z_s) + divergence(z_s, p_s)).mean()
    own_text = (divergence(p_t, z_t) + divergence(z_t, p_t))[rows].mean()
    target = torch.eye(CLASSES)[label] if kind == "single" else label
    a, b = (p.masked_fill(target > 0, -1e9) for p in (p_s, p_t))
    kept = np.array([kendall(x, y) > -0.3 for x, y in zip(to_numpy(p_t), to_numpy(p_s), strict=True)])
    nt = (kept * (divergence(b, a) + divergence(a, b)))[rows].mean()
    parts = seeded_loss(method, batch)
    assert 0 < kept[rows].mean() < 1
    assert parts["kept"].item() == pytest.approx(kept[rows].mean())
    assert parts["nt"].item() == pytest.approx(nt, rel=1e-4)
    ce, ce_text = cross_entropy(z_s, label), cross_entropy(z_t, label, rows)
    assert parts["loss"].item() == pytest.approx(ce + ce_text + 0.7 * (own + own_text) + 1.3 * nt, rel=1e-4)


def test_the_proxy_s_normalisation_is_that_of_torch() -> None:
    method, batch = fitted("c2kd")
    h, paired, proxy = method.common.image(batch["image"]), batch["paired"], method.proxy
    normal = torch.nn.BatchNorm1d(h.shape[1])(proxy.layer(h[paired > 0]))
    expected = proxy.classifier(torch.nn.functional.leaky_relu(normal, 0.1))
    torch.testing.assert_close(proxy(h, paired)[paired > 0], expected, atol=1e-5, rtol=1e-4)


def test_every_flag_changes_the_loss() -> None:
    flags: list[dict[str, Any]] = [{}, {"target_logit": "zero"}, {"min_rank": -1.0}, {"w_proxy": 0.5}]
    losses = [seeded_loss(*fitted("c2kd", **changes))["loss"].item() for changes in flags]
    assert len(set(losses)) == len(losses)
