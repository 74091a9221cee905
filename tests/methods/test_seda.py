"""SeDA, compared with its equations computed by hand, and its draws of stages and steps, compared with the sum of eq. 12."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from helpers.equation_cases import build, fitted
from helpers.method_cases import (
    CLASSES,
    LABEL_KINDS,
    ROWS,
    WIDTH,
    StubDenoiser,
    cross_entropy,
    make_batch,
    make_rng,
    noise_levels,
    seeded_loss,
    to_numpy,
)
from scipy import stats
from torch import Tensor
from torch.func import vmap

from pipeline.types import Batch

T, STEP = 12, 4  # T and t of the tiny settings
WEIGHTS: dict[str, Any] = {"w_sc": 0.3, "w_ce_dsl": 0.7, "w_mse": 1.3, "w_ce_dst": 1.9}
for_all_label_kinds = pytest.mark.parametrize("kind", LABEL_KINDS)


def draw_many(method: Any, num_draws: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw the step and the stage of one sample in many independent batches."""
    torch.manual_seed(7)
    n, is_dsl = vmap(lambda x_s: method.draw_steps(x_s), randomness="different")(torch.zeros(num_draws, 1, WIDTH))
    return n[:, 0].numpy(), is_dsl.reshape(num_draws).numpy()


class TestDrawing:
    @pytest.mark.parametrize("order", ["literal", "reverse"])
    @pytest.mark.parametrize("per_sample", [False, True])
    @pytest.mark.parametrize(("fraction", "first"), [(0.0, 0), (0.25, 3), (0.6, 7)])
    def test_steps_are_uniform_and_the_stage_is_a_function_of_the_step(
        self, order: str, per_sample: bool, fraction: float, first: int
    ) -> None:
        method = build("seda", stage_order=order, per_sample_stage=per_sample, train_min_step=fraction)
        n, is_dsl = draw_many(method, 12_000)
        dsl_steps = np.array([step <= STEP if order == "literal" else step >= T - STEP for step in range(T)])
        trained = dsl_steps | (np.arange(T) >= first)  # only the translator has a lowest step
        counts = np.bincount(n, minlength=T)
        assert (counts[~trained] == 0).all()
        assert stats.chisquare(counts[trained]).pvalue > 0.001
        np.testing.assert_array_equal(is_dsl == 1, dsl_steps[n])

    def test_a_lowest_step_that_leaves_the_translator_no_step_is_refused(self) -> None:
        with pytest.raises(ValueError, match="leaves the translator no step"):
            build("seda", stage_order="reverse", train_min_step=0.8)
        assert set(draw_many(build("seda", stages="dst", train_min_step=0.8), 500)[0]) == {10, 11}

    @pytest.mark.parametrize(("order", "dsl_steps"), [("literal", {0}), ("reverse", set())])
    def test_t_0_leaves_the_learner_one_step_or_none(self, order: str, dsl_steps: set[int]) -> None:
        n, is_dsl = draw_many(build("seda", stage_order=order, stage_step=0), 2000)
        assert set(n) == set(range(T))
        assert set(n[is_dsl == 1]) == dsl_steps

    @pytest.mark.parametrize(("order", "dst_steps"), [("literal", set()), ("reverse", {0})])
    def test_the_largest_t_leaves_the_translator_none_or_one(self, order: str, dst_steps: set[int]) -> None:
        n, is_dsl = draw_many(build("seda", stage_order=order, stage_step=T - 1), 2000)
        assert set(n) == set(range(T))
        assert set(n[is_dsl == 0]) == dst_steps

    @pytest.mark.parametrize(("stages", "stage"), [("dsl", 1), ("dst", 0)])
    def test_a_single_stage_has_every_step(self, stages: str, stage: int) -> None:
        n, is_dsl = draw_many(build("seda", stages=stages), 6000)
        assert stats.chisquare(np.bincount(n, minlength=T)).pvalue > 0.001
        assert set(is_dsl) == {stage}

    @pytest.mark.parametrize("order", ["literal", "reverse"])
    def test_a_batch_has_one_stage_unless_each_sample_draws_its_own(self, order: str) -> None:
        def mixed(**how: Any) -> list[bool]:
            method = build("seda", stage_order=order, **how)
            torch.manual_seed(0)
            return [0 < float(method.draw_steps(torch.zeros(ROWS, WIDTH))[1].float().mean()) < 1 for _ in range(20)]

        assert not any(mixed())
        assert all(mixed(per_sample_stage=True))

    def test_all_steps_of_the_default_t_are_reached(self) -> None:
        n, _ = draw_many(build("seda", num_steps=1500, stage_step=300), 40_000)
        assert (n.min(), n.max(), len(set(n))) == (0, 1499, 1500)


def predict_one_step(method: Any, batch: Batch, seed: int = 0) -> tuple[Tensor, np.ndarray, np.ndarray, np.ndarray]:
    """Return the prediction, x_v, x_s and the steps of a loss, with eq. 1 computed by hand."""
    torch.manual_seed(seed)
    x_v, x_s = to_numpy(method.space.image(batch["image"])), to_numpy(method.space.text(batch["text"]))
    n = method.draw_steps(batch["text"])[0].numpy()
    abar = noise_levels(T)[n][:, None]
    x_n = np.sqrt(abar) * x_s + np.sqrt(1 - abar) * to_numpy(torch.randn(len(n), WIDTH))
    context = method.denoiser.image_context(method.condition(batch["image"]))
    e = method.denoiser.embed_step(torch.from_numpy(n))
    return method.denoiser(torch.from_numpy(x_n).float(), e, context), x_v, x_s, n


def structural_consistency(
    x_r: np.ndarray, x_v: np.ndarray, label: Tensor, reduction: str, centres: np.ndarray | None
) -> float:
    """Compute eq. 5-6 with a loop over classes."""
    member = np.eye(CLASSES)[label.numpy()] if label.ndim == 1 else to_numpy(label)
    norms = []
    for c in range(CLASSES):
        rows = member[:, c] > 0
        if rows.any():
            mu = x_v[rows].mean(0) if centres is None else centres[c]
            norms.append(np.linalg.norm(x_r[rows].mean(0) - mu))
    if reduction == "literal":
        return (sum(norms) + np.abs(x_r - x_v).sum()) / len(x_r)
    return float(np.mean(norms)) / np.sqrt(x_r.shape[1]) + np.abs(x_r - x_v).mean()


class TestObjective:
    @for_all_label_kinds
    @pytest.mark.parametrize("reduction", ["mean", "literal"])
    @pytest.mark.parametrize("centres", ["batch", "train"])
    def test_semantic_learner(self, centres: str, reduction: str, kind: str) -> None:
        method, batch = fitted("seda", kind, stages="dsl", sc_reduction=reduction, centres=centres, **WEIGHTS)
        batch = {key: value[5:31] for key, value in batch.items()}  # only a part of the training split
        x_r, x_v, _, _ = predict_one_step(method, batch)
        mu = None
        if centres == "train":
            train_split = make_batch(kind)
            features = to_numpy(method.space.image(train_split["image"]))
            member = np.eye(CLASSES)[train_split["label"].numpy()] if kind == "single" else to_numpy(train_split["label"])
            mu = np.stack([features[member[:, c] > 0].mean(0) for c in range(CLASSES)])
        sc = structural_consistency(to_numpy(x_r), x_v, batch["label"], reduction, mu)
        parts = seeded_loss(method, batch)
        assert parts["sc"].item() == pytest.approx(sc, rel=1e-4)
        expected = 0.3 * sc + 0.7 * cross_entropy(method.classifier(x_r), batch["label"])
        assert parts["loss"].item() == pytest.approx(expected, rel=1e-4)

    @for_all_label_kinds
    def test_semantic_translator(self, kind: str) -> None:
        method, batch = fitted("seda", kind, stages="dst", **WEIGHTS)
        x_r, _, x_s, _ = predict_one_step(method, batch)
        error = ((to_numpy(x_r) - x_s) ** 2)[(batch["paired"] > 0).numpy()].mean()
        parts = seeded_loss(method, batch)
        assert parts["mse"].item() == pytest.approx(error, rel=1e-4)
        expected = 1.3 * error + 1.9 * cross_entropy(method.classifier(x_r), batch["label"])
        assert parts["loss"].item() == pytest.approx(expected, rel=1e-4)

    def test_the_sum_over_the_dimensions_is_the_squared_norm(self) -> None:
        mean, batch = fitted("seda", stages="dst")
        total, _ = fitted("seda", stages="dst", mse_reduction="sum_dim")
        first, second = (seeded_loss(method, batch)["mse"].item() for method in (mean, total))
        assert second == pytest.approx(WIDTH * first, rel=1e-5)

    @pytest.mark.parametrize("per_sample", [False, True])
    def test_low_steps_may_have_no_cross_entropy(self, per_sample: bool) -> None:
        method, batch = fitted("seda", stages="dst", ce_min_step=0.5, per_sample_stage=per_sample, **WEIGHTS)
        x_r, _, _, n = predict_one_step(method, batch)
        assert 0 < (n >= T / 2).sum() < ROWS
        expected = cross_entropy(method.classifier(x_r), batch["label"], n >= T / 2)
        parts = seeded_loss(method, batch)
        assert parts["ce"].item() == pytest.approx(expected, rel=1e-4)
        assert parts["loss"].item() == pytest.approx(1.3 * parts["mse"].item() + 1.9 * expected, rel=1e-4)

    def test_on_policy_noises_the_prediction_from_pure_noise(self) -> None:
        method, batch = fitted("seda", stages="dst", on_policy=1.0)
        torch.manual_seed(0)
        x_s, n = method.space.text(batch["text"]), method.draw_steps(batch["text"])[0]
        context = method.denoiser.image_context(method.condition(batch["image"]))
        own = method.denoiser(torch.randn(ROWS, WIDTH), method.denoiser.embed_step(torch.tensor(T - 1)), context)
        torch.rand(ROWS, 1)
        abar = torch.from_numpy(noise_levels(T)[n.numpy()]).float()[:, None]
        x_n = abar.sqrt() * own + (1 - abar).sqrt() * torch.randn(ROWS, WIDTH)
        x_r = method.denoiser(x_n, method.denoiser.embed_step(n), context)
        error = ((x_r - x_s) ** 2)[batch["paired"] > 0].mean()
        assert seeded_loss(method, batch)["mse"].item() == pytest.approx(error.item(), rel=1e-4)

    def test_on_policy_takes_the_given_share_and_no_gradient_goes_through_it(self) -> None:
        method, _ = fitted("seda", on_policy=0.3)
        x_s = torch.full((4000, WIDTH), 7.0)
        context = method.denoiser.image_context(torch.randn(4000, WIDTH))
        mixed = method.mix_own_texts(x_s, context)
        is_own = (mixed != 7.0).any(dim=1)
        assert not mixed.requires_grad
        assert stats.binomtest(int(is_own.sum()), 4000, 0.3).pvalue > 0.001

    @pytest.mark.parametrize("order", ["literal", "reverse"])
    def test_a_batch_of_one_stage_has_that_stages_loss(self, order: str) -> None:
        seen = set()
        method, batch = fitted("seda", stage_order=order, **WEIGHTS)
        for seed in range(12):
            x_r, x_v, x_s, n = predict_one_step(method, batch, seed)
            is_dsl = bool(n[0] <= STEP if order == "literal" else n[0] >= T - STEP)
            ce = cross_entropy(method.classifier(x_r), batch["label"])
            if is_dsl:
                expected = 0.3 * structural_consistency(to_numpy(x_r), x_v, batch["label"], "mean", None) + 0.7 * ce
            else:
                expected = 1.3 * ((to_numpy(x_r) - x_s) ** 2)[(batch["paired"] > 0).numpy()].mean() + 1.9 * ce
            assert seeded_loss(method, batch, seed=seed)["loss"].item() == pytest.approx(expected, rel=1e-4)
            seen.add(is_dsl)
        assert seen == {True, False}

    def test_a_mixed_batch_weights_each_stage_by_its_number_of_samples(self) -> None:
        method, batch = fitted("seda", per_sample_stage=True, **WEIGHTS)
        batch["paired"] = torch.ones(ROWS)
        x_r, x_v, x_s, n = predict_one_step(method, batch)
        low = n <= STEP
        logits = method.classifier(x_r)
        scc = 0.3 * structural_consistency(to_numpy(x_r)[low], x_v[low], batch["label"][torch.from_numpy(low)], "mean", None)
        scc += 0.7 * cross_entropy(logits, batch["label"], low)
        ct = 1.3 * ((to_numpy(x_r) - x_s)[~low] ** 2).mean() + 1.9 * cross_entropy(logits, batch["label"], ~low)
        expected = low.mean() * scc + (1 - low.mean()) * ct
        assert seeded_loss(method, batch)["loss"].item() == pytest.approx(expected, rel=1e-4)

    def test_with_t_0_the_learner_trains_step_0_only(self) -> None:
        bi_stage, batch = fitted("seda", stage_step=0, per_sample_stage=True, **WEIGHTS)
        heavy, _ = fitted("seda", stage_step=0, per_sample_stage=True, **{**WEIGHTS, "w_sc": 50.0, "w_ce_dsl": 70.0})
        batch, compared = {key: value[:6] for key, value in batch.items()}, 0
        for seed in range(12):
            # Learner and translator see the steps {0} and 1..11, whatever the batch: here no sample draws step 0.
            torch.manual_seed(seed)
            late = batch if (bi_stage.draw_steps(batch["text"])[0] > 0).all() else None
            if late is None:
                continue
            compared += 1
            first, second = (seeded_loss(method, late, seed=seed) for method in (bi_stage, heavy))
            assert first["sc"].item() == 0.0
            torch.testing.assert_close(first["loss"], second["loss"])
            gradients = (
                torch.autograd.grad(each["loss"], list(method.parameters()))
                for each, method in ((first, bi_stage), (second, heavy))
            )
            torch.testing.assert_close(*gradients)
        assert compared >= 3

    @for_all_label_kinds
    def test_predicting_the_visual_feature_minimises_the_structural_consistency_loss(self, kind: str) -> None:
        method, batch = fitted("seda", kind, stages="dsl", w_ce_dsl=0.0)
        assert seeded_loss(method, batch)["sc"].item() > 0.1
        method.denoiser = StubDenoiser("image")
        assert seeded_loss(method, batch)["sc"].item() == pytest.approx(0.0, abs=1e-5)


class TestWidths:
    def test_the_denoiser_reads_the_image_at_its_own_width_and_the_learner_has_the_adapted_one_as_target(self) -> None:
        method, batch = fitted("seda", text_width=24, stages="dsl", adapter="pca", condition="raw", w_ce_dsl=0.0)
        assert (method.denoiser.visual.in_features, method.denoiser.visual.out_features) == (WIDTH, 12)
        torch.manual_seed(0)
        x_s, n = method.space.text(batch["text"]), method.draw_steps(batch["text"])[0]
        abar = torch.from_numpy(noise_levels(T)[n.numpy()]).float()[:, None]
        x_n = abar.sqrt() * x_s + (1 - abar).sqrt() * torch.randn_like(x_s)
        context = method.denoiser.image_context((batch["image"] - batch["image"].mean(0)) / batch["image"].std(0, correction=0))
        x_r = to_numpy(method.denoiser(x_n, method.denoiser.embed_step(n), context))
        sc = structural_consistency(x_r, to_numpy(method.space.image(batch["image"])), batch["label"], "mean", None)
        assert seeded_loss(method, batch)["sc"].item() == pytest.approx(sc, rel=1e-3)

    @pytest.mark.parametrize("interaction", ["concat", "cross_attention", "multimodal_transformer"])
    def test_the_translator_alone_needs_no_adapter(self, interaction: str) -> None:
        method, batch = fitted("seda", text_width=24, stages="dst", adapter="none", interaction=interaction)
        assert "sc" not in seeded_loss(method, batch)
        assert method.feature(batch["image"], make_rng()).shape == (ROWS, 24)

    @pytest.mark.parametrize(
        "changes", [{}, {"stages": "dst", "denoiser": "unet"}, {"stages": "dst", "interaction": "self_attention"}]
    )
    def test_where_widths_must_be_equal_others_are_refused(self, changes: dict[str, Any]) -> None:
        with pytest.raises(ValueError, match="width"):
            build("seda", text_width=24, adapter="none", **changes)

    def test_the_mlp_is_the_network_of_cdr(self) -> None:
        ours, cdr = build("seda", stages="dst", denoiser="mlp"), build("cdr")
        assert type(ours.denoiser) is type(cdr.denoiser)
        shapes = [{name: value.shape for name, value in each.denoiser.state_dict().items()} for each in (ours, cdr)]
        assert shapes[0] == shapes[1]
