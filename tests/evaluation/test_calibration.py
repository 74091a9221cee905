"""Temperatures against a search of the whole range and scikit-learn's logistic regression."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from scipy.special import expit, log_softmax, softmax
from sklearn.linear_model import LogisticRegression

from pipeline.evaluation.calibration import LOG_TEMPERATURES, Calibration, calibrate, plain_calibration

RNG = np.random.default_rng(0)


def drawn_classes(logits: np.ndarray) -> np.ndarray:
    """Draw a class of each row from the softmax of its logits."""
    return (softmax(logits, axis=1).cumsum(axis=1) > RNG.random((len(logits), 1))).argmax(axis=1)


@pytest.mark.parametrize("factor", [0.25, 1.0, 7.0])
def test_the_temperature_has_the_least_nll_of_the_whole_range(factor: float) -> None:
    true = RNG.normal(0, 2, (400, 5))
    label = drawn_classes(true)
    found = calibrate((factor * true).astype(np.float32), label, "softmax_kl")

    def nll(temperature: float) -> float:
        return float(-log_softmax(factor * true / temperature, axis=1)[np.arange(400), label].mean())

    searched = min(np.exp(np.linspace(*LOG_TEMPERATURES, 1_501)), key=nll)
    assert found.temperature == pytest.approx(searched, rel=1e-2)
    assert found.temperature == pytest.approx(factor, rel=0.25)  # of which the labels were drawn
    assert found.nll == pytest.approx(nll(found.temperature))
    assert found.nll_before == pytest.approx(nll(1.0), rel=1e-5)
    assert found.num_samples == 400
    logits = RNG.normal(0, 3, (7, 5))
    np.testing.assert_allclose(found.probabilities(logits), softmax(logits / found.temperature, axis=1), rtol=1e-9)
    assert f"temperature {found.temperature:.3g}, chosen on 400 validation samples" in found.describe()


def test_classes_of_their_own_have_a_sigmoid_with_a_temperature() -> None:
    true = RNG.normal(-1, 2, (500, 6))
    label = (RNG.random((500, 6)) < expit(true)).astype(np.float32)
    found = calibrate(3 * true, label, "bce")
    oracle = LogisticRegression(C=np.inf, fit_intercept=False, tol=1e-8).fit(3 * true.reshape(-1, 1), label.ravel())
    assert 1 / found.temperature == pytest.approx(oracle.coef_.item(), rel=1e-3)
    assert (found.kind, found.bias) == ("sigmoid", 0.0)
    np.testing.assert_allclose(found.probabilities(true), expit(true / found.temperature))


def test_shares_of_a_softmax_become_presences() -> None:
    logits = RNG.normal(0, 2, (500, 6))
    label = (RNG.random((500, 6)) < expit(0.7 * log_softmax(logits, axis=1) + 1.2)).astype(np.float32)
    found = calibrate(logits, label, "softmax_kl")
    scores = log_softmax(logits, axis=1)
    oracle = LogisticRegression(C=np.inf, tol=1e-8).fit(scores.reshape(-1, 1), label.ravel())
    assert 1 / found.temperature == pytest.approx(oracle.coef_.item(), rel=1e-3)
    assert found.bias == pytest.approx(oracle.intercept_.item(), abs=1e-3)
    expected = oracle.predict_proba(scores.reshape(-1, 1))[:, 1].reshape(500, 6)
    np.testing.assert_allclose(found.probabilities(logits), expected, atol=1e-4)


def test_a_head_without_a_mistake_keeps_its_temperature_and_a_useless_one_becomes_unsure() -> None:
    label = RNG.integers(0, 3, 50)
    for labels, loss in ((label, "softmax_kl"), (np.eye(3)[label], "bce"), (np.eye(3)[label], "softmax_kl")):
        assert calibrate(10 * np.eye(3)[label] - 5, labels, loss) == plain_calibration(labels.ndim == 2, loss)
    useless = calibrate(-4 * np.eye(3)[label], label, "softmax_kl")
    np.testing.assert_allclose(useless.probabilities(np.eye(3)), 1 / 3, atol=1e-3)


@pytest.mark.parametrize(
    "changed",
    [
        *({"kind": "\x1b[2J"}, {"temperature": 0.0}, {"temperature": float("nan")}, {"temperature": "1"}, {"temperature": -1}),
        *({"bias": float("inf")}, {"num_samples": "\x1b"}, {"nll": None}, {"other": 1}),
    ],
)
def test_what_others_recorded_is_checked(changed: dict[str, Any]) -> None:
    recorded: dict[str, Any] = {"kind": "sigmoid", "temperature": 2, "bias": -0.5}
    assert Calibration.of(recorded) == Calibration("sigmoid", temperature=2.0, bias=-0.5)
    with pytest.raises((ValueError, TypeError)):
        Calibration.of(recorded | changed)


def test_of_many_logits_some_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.evaluation.calibration.MAX_LOGITS", 180)
    logits = RNG.normal(0, 1, (40, 9)).astype(np.float32)
    assert calibrate(logits, RNG.integers(0, 9, 40), "softmax_kl").num_samples == 20


def test_without_validation_the_head_s_own_probabilities_are_left() -> None:
    logits = RNG.normal(0, 1, (3, 4))
    plain = [plain_calibration(True, "bce"), plain_calibration(True, "softmax_kl"), plain_calibration(False, "softmax_kl")]
    for each, expected in zip(plain, [expit(logits), softmax(logits, axis=1), softmax(logits, axis=1)], strict=True):
        np.testing.assert_allclose(each.probabilities(logits), expected)
        assert "without a temperature" in each.describe()
