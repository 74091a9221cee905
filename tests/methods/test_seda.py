"""SeDA computes its equations by hand, and draws its stages and steps as eq. 12 sums over them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from helpers.method_cases import (
    CLASSES,
    KINDS,
    ROWS,
    WIDTH,
    Stub,
    array,
    build,
    cross_entropy,
    data,
    fitted,
    ids,
    noise_levels,
    streams,
)
from scipy import stats
from torch import Tensor
from torch.func import vmap

from pipeline.runtime.rng import KeyedRNG
from pipeline.types import Batch

T, STEP = 12, 4  # T and t of the tiny settings
WEIGHTS: dict[str, Any] = {"w_sc": 0.3, "w_ce_dsl": 0.7, "w_mse": 1.3, "w_ce_dst": 1.9}
over_kinds = pytest.mark.parametrize("kind", KINDS)


def drawn(method: Any, draws: int) -> tuple[np.ndarray, np.ndarray]:
    """Steps and stages of one sample in many batches, each drawn on its own."""
    keys = streams(7, ids(draws)).bits()
    n, learner = vmap(lambda key: method.draw_steps(KeyedRNG(key, ids(1))))(keys)
    return n[:, 0].numpy(), learner[:, 0].numpy()


class TestDrawing:
    @pytest.mark.parametrize("order", ["literal", "reverse"])
    @pytest.mark.parametrize("per_sample", [False, True])
    @pytest.mark.parametrize(("share", "first"), [(0.0, 0), (0.25, 3), (0.6, 7)])
    def test_steps_are_uniform_and_the_stage_is_a_function_of_the_step(
        self, order: str, per_sample: bool, share: float, first: int
    ) -> None:
        method = build("seda", stage_order=order, per_sample_stage=per_sample, train_min_step=share)
        n, learner = drawn(method, 12_000)
        learns = np.array([step <= STEP if order == "literal" else step >= T - STEP for step in range(T)])
        trained = learns | (np.arange(T) >= first)  # the floor is the translator's
        counts = np.bincount(n, minlength=T)
        assert (counts[~trained] == 0).all()
        assert stats.chisquare(counts[trained]).pvalue > 0.001
        np.testing.assert_array_equal(learner == 1, learns[n])

    def test_a_floor_that_leaves_no_translator_is_refused(self) -> None:
        with pytest.raises(ValueError, match="leaves the translator no step"):
            build("seda", stage_order="reverse", train_min_step=0.8)
        assert set(drawn(build("seda", stages="dst", train_min_step=0.8), 500)[0]) == {10, 11}

    @pytest.mark.parametrize(("order", "learns"), [("literal", {0}), ("reverse", set())])
    def test_t_0_leaves_the_learner_one_step_or_none(self, order: str, learns: set[int]) -> None:
        n, learner = drawn(build("seda", stage_order=order, stage_step=0), 2000)
        assert set(n) == set(range(T))
        assert set(n[learner == 1]) == learns

    @pytest.mark.parametrize(("order", "translates"), [("literal", set()), ("reverse", {0})])
    def test_the_largest_t_leaves_the_translator_none_or_one(self, order: str, translates: set[int]) -> None:
        n, learner = drawn(build("seda", stage_order=order, stage_step=T - 1), 2000)
        assert set(n) == set(range(T))
        assert set(n[learner == 0]) == translates

    @pytest.mark.parametrize(("stages", "stage"), [("dsl", 1), ("dst", 0)])
    def test_a_single_stage_has_every_step(self, stages: str, stage: int) -> None:
        n, learner = drawn(build("seda", stages=stages), 6000)
        assert stats.chisquare(np.bincount(n, minlength=T)).pvalue > 0.001
        assert set(learner) == {stage}

    @pytest.mark.parametrize("order", ["literal", "reverse"])
    def test_a_batch_is_of_one_stage_unless_each_sample_draws_its_own(self, order: str) -> None:
        def mixed(**how: Any) -> list[bool]:
            method = build("seda", stage_order=order, **how)
            return [0 < float(method.draw_steps(streams(seed))[1].mean()) < 1 for seed in range(20)]

        assert not any(mixed())
        assert all(mixed(per_sample_stage=True))

    def test_all_steps_of_the_default_t_are_reached(self) -> None:
        n, _ = drawn(build("seda", num_steps=1500, stage_step=300), 40_000)
        assert (n.min(), n.max(), len(set(n))) == (0, 1499, 1500)


def one_step(method: Any, batch: Batch, rng: KeyedRNG) -> tuple[Tensor, np.ndarray, np.ndarray, np.ndarray]:
    """The prediction, x_v, x_s (eq. 1 by hand) and the steps behind a loss."""
    x_v, x_s = array(method.space.image(batch["image"])), array(method.space.text(batch["text"]))
    n = method.draw_steps(rng)[0].numpy()
    abar = noise_levels(T)[n][:, None]
    x_n = np.sqrt(abar) * x_s + np.sqrt(1 - abar) * array(rng.at("noise").normal(WIDTH))
    context = method.denoiser.condition(torch.from_numpy(x_v).float())
    e = method.denoiser.time(torch.from_numpy(n))
    return method.denoiser(torch.from_numpy(x_n).float(), e, context, None, torch.tensor(0.0)), x_v, x_s, n


def consistency(x_r: np.ndarray, x_v: np.ndarray, label: Tensor, reduction: str, centres: np.ndarray | None) -> float:
    """Eq. 5-6, class by class."""
    member = np.eye(CLASSES)[label.numpy()] if label.ndim == 1 else array(label)
    norms = []
    for c in range(CLASSES):
        rows = member[:, c] > 0
        if rows.any():
            mu = x_v[rows].mean(0) if centres is None else centres[c]
            norms.append(np.linalg.norm(x_r[rows].mean(0) - mu))
    if reduction == "literal":
        return (sum(norms) + np.abs(x_r - x_v).sum()) / len(x_r)
    return float(np.mean(norms)) / np.sqrt(WIDTH) + np.abs(x_r - x_v).mean()


class TestObjective:
    @over_kinds
    @pytest.mark.parametrize("reduction", ["mean", "literal"])
    @pytest.mark.parametrize("centres", ["batch", "train"])
    def test_semantic_learner(self, centres: str, reduction: str, kind: str) -> None:
        method, batch = fitted("seda", kind, stages="dsl", sc_reduction=reduction, centres=centres, **WEIGHTS)
        batch = {key: value[5:31] for key, value in batch.items()}  # not the whole training split
        rng = streams(0, batch["key"])
        x_r, x_v, _, _ = one_step(method, batch, rng)
        mu = None
        if centres == "train":
            whole = data(kind)
            features = array(method.space.image(whole["image"]))
            member = np.eye(CLASSES)[whole["label"].numpy()] if kind == "single" else array(whole["label"])
            mu = np.stack([features[member[:, c] > 0].mean(0) for c in range(CLASSES)])
        sc = consistency(array(x_r), x_v, batch["label"], reduction, mu)
        parts = method.loss(batch, rng, "head")
        assert parts["sc"].item() == pytest.approx(sc, rel=1e-4)
        expected = 0.3 * sc + 0.7 * cross_entropy(method.classifier(x_r), batch["label"])
        assert parts["loss"].item() == pytest.approx(expected, rel=1e-4)

    @over_kinds
    def test_semantic_translator(self, kind: str) -> None:
        method, batch = fitted("seda", kind, stages="dst", **WEIGHTS)
        x_r, _, x_s, _ = one_step(method, batch, streams())
        error = ((array(x_r) - x_s) ** 2)[(batch["paired"] > 0).numpy()].mean()
        parts = method.loss(batch, streams(), "head")
        assert parts["mse"].item() == pytest.approx(error, rel=1e-4)
        expected = 1.3 * error + 1.9 * cross_entropy(method.classifier(x_r), batch["label"])
        assert parts["loss"].item() == pytest.approx(expected, rel=1e-4)

    @pytest.mark.parametrize("order", ["literal", "reverse"])
    def test_a_batch_of_one_stage_has_that_stages_loss(self, order: str) -> None:
        seen = set()
        method, batch = fitted("seda", stage_order=order, **WEIGHTS)
        for seed in range(12):
            rng = streams(seed)
            x_r, x_v, x_s, n = one_step(method, batch, rng)
            is_learner = bool(n[0] <= STEP if order == "literal" else n[0] >= T - STEP)
            ce = cross_entropy(method.classifier(x_r), batch["label"])
            if is_learner:
                expected = 0.3 * consistency(array(x_r), x_v, batch["label"], "mean", None) + 0.7 * ce
            else:
                expected = 1.3 * ((array(x_r) - x_s) ** 2)[(batch["paired"] > 0).numpy()].mean() + 1.9 * ce
            assert method.loss(batch, rng, "head")["loss"].item() == pytest.approx(expected, rel=1e-4)
            seen.add(is_learner)
        assert seen == {True, False}

    def test_a_mixed_batch_weighs_the_stages_by_their_samples(self) -> None:
        method, batch = fitted("seda", per_sample_stage=True, **WEIGHTS)
        batch["paired"] = torch.ones(ROWS)
        x_r, x_v, x_s, n = one_step(method, batch, streams())
        low = n <= STEP
        logits = method.classifier(x_r)
        scc = 0.3 * consistency(array(x_r)[low], x_v[low], batch["label"][torch.from_numpy(low)], "mean", None)
        scc += 0.7 * cross_entropy(logits, batch["label"], low)
        ct = 1.3 * ((array(x_r) - x_s)[~low] ** 2).mean() + 1.9 * cross_entropy(logits, batch["label"], ~low)
        expected = low.mean() * scc + (1 - low.mean()) * ct
        assert method.loss(batch, streams(), "head")["loss"].item() == pytest.approx(expected, rel=1e-4)

    def test_t_0_is_the_translator_but_for_the_first_step(self) -> None:
        bi_stage, batch = fitted("seda", stage_step=0, per_sample_stage=True, **WEIGHTS)
        heavy, _ = fitted("seda", stage_step=0, per_sample_stage=True, **{**WEIGHTS, "w_sc": 50.0, "w_ce_dsl": 70.0})
        for seed in range(6):
            rows = bi_stage.draw_steps(streams(seed))[0] > 0
            rng = streams(seed, batch["key"][rows])
            late = {key: value[rows] for key, value in batch.items()}
            first, second = (method.loss(late, rng, "head") for method in (bi_stage, heavy))
            assert first["sc"].item() == 0.0
            torch.testing.assert_close(first["loss"], second["loss"])
            gradients = (
                torch.autograd.grad(each["loss"], list(method.parameters()))
                for each, method in ((first, bi_stage), (second, heavy))
            )
            torch.testing.assert_close(*gradients)

    @over_kinds
    def test_the_visual_feature_itself_is_the_learners_trivial_minimiser(self, kind: str) -> None:
        method, batch = fitted("seda", kind, stages="dsl", w_ce_dsl=0.0)
        assert method.loss(batch, streams(), "head")["sc"].item() > 0.1
        method.denoiser = Stub("image")
        assert method.loss(batch, streams(), "head")["sc"].item() == pytest.approx(0.0, abs=1e-5)
