"""Baseline, EMA, CDR and MARNet, compared with the papers' equations computed by hand in NumPy."""

from __future__ import annotations

import math
from dataclasses import fields
from typing import Any

import numpy as np
import pytest
import torch
from helpers.equation_cases import build, fitted, settings
from helpers.method_cases import (
    CLASSES,
    LABEL_KINDS,
    ROWS,
    WIDTH,
    cross_entropy,
    make_batch,
    make_rng,
    noise_levels,
    seeded_loss,
    to_numpy,
    value_of,
)
from scipy import special, stats
from torch import Tensor, nn

from pipeline.methods import cdr, ema, marnet
from pipeline.nn.layers import ConcatLinear
from pipeline.runtime import plugins
from pipeline.runtime.rng import KeyedRNG

for_all_label_kinds = pytest.mark.parametrize("kind", LABEL_KINDS)


def standardised(x: Tensor, rows: Tensor | slice = slice(None)) -> np.ndarray:
    return (to_numpy(x) - to_numpy(x)[rows].mean(0)) / to_numpy(x)[rows].std(0)


def linear(layer: nn.Module, x: np.ndarray) -> np.ndarray:
    weight, bias = layer.parameters()
    return x @ to_numpy(weight).T + to_numpy(bias)


def leaky_relu(x: np.ndarray) -> np.ndarray:
    return np.where(x >= 0, x, 0.01 * x)


def gradient_descent(method: Any, batch: dict[str, Tensor], lr: float, steps: int) -> None:
    """Train all parameters on the whole batch with plain gradient descent."""
    for _ in range(steps):
        gradients = torch.autograd.grad(seeded_loss(method, batch)["loss"], list(method.parameters()))
        with torch.no_grad():
            for parameter, gradient in zip(method.parameters(), gradients, strict=True):
                parameter -= lr * gradient


class TestBaseline:
    def test_it_is_one_linear_layer(self) -> None:
        method = build("baseline")
        assert sum(parameter.numel() for parameter in method.parameters()) == WIDTH * CLASSES + CLASSES

    @for_all_label_kinds
    def test_objective(self, kind: str) -> None:
        method, batch = fitted("baseline", kind)
        logits = linear(method.classifier, standardised(batch["image"]))
        np.testing.assert_allclose(to_numpy(method.predict(batch["image"], make_rng())), logits, atol=1e-5)
        expected = cross_entropy(torch.from_numpy(logits), batch["label"])
        assert seeded_loss(method, batch)["loss"].item() == pytest.approx(expected, rel=1e-5)

    def test_separable_classes_are_separated(self) -> None:
        method, batch = fitted("baseline")
        batch["image"] = torch.eye(WIDTH)[batch["label"]] * 10 + batch["image"] * 0.1
        gradient_descent(method, batch, lr=0.5, steps=60)
        assert (method.predict(batch["image"], make_rng()).argmax(1) == batch["label"]).all()


class TestEMA:
    @for_all_label_kinds
    def test_objective(self, kind: str) -> None:
        method, batch = fitted("ema", kind, text_width=10, tau=0.2, w_ce=0.7, w_ita=1.3)
        paired = batch["paired"] > 0
        x_v = leaky_relu(linear(method.image_projector, standardised(batch["image"])))
        x_s = leaky_relu(linear(method.text_projector, standardised(batch["text"], paired)))
        a, b = (x[paired.numpy()] / np.linalg.norm(x[paired.numpy()], axis=1, keepdims=True) for x in (x_v, x_s))
        similarity = a @ b.T / 0.2
        v2s = -np.diag(special.log_softmax(similarity, axis=1)).mean()
        s2v = -np.diag(special.log_softmax(similarity, axis=0)).mean()
        ce = cross_entropy(torch.from_numpy(linear(method.classifier, x_v)), batch["label"])
        parts = seeded_loss(method, batch)
        assert parts["ita"].item() == pytest.approx(v2s + s2v, rel=1e-4)
        assert parts["loss"].item() == pytest.approx(0.7 * ce + 1.3 * (v2s + s2v), rel=1e-4)

    def test_prediction_uses_the_image_projector_only(self) -> None:
        method, batch = fitted("ema")
        x_v = leaky_relu(linear(method.image_projector, standardised(batch["image"])))
        np.testing.assert_allclose(to_numpy(method.feature(batch["image"], make_rng())), x_v, atol=1e-5)
        np.testing.assert_allclose(
            to_numpy(method.predict(batch["image"], make_rng())), linear(method.classifier, x_v), atol=1e-5
        )

    def test_a_learned_temperature_falls_but_not_below_0_01(self) -> None:
        method, batch = fitted("ema", learn_tau=True, tau=0.2)
        method.text_projector.load_state_dict(method.image_projector.state_dict())
        method.text_scale.load_state_dict(method.image_scale.state_dict())
        batch["text"] = batch["image"]  # already aligned: only the temperature can lower the loss
        assert method.temperature().item() == pytest.approx(0.2)
        gradient_descent(method, batch, lr=0.1, steps=20)
        assert 0.01 < method.temperature().item() < 0.19
        for log_scale in (4.0, 4.6, 5.0, 50.0):
            with torch.no_grad():
                method.log_scale.fill_(log_scale)
            assert 1 / method.temperature().item() == pytest.approx(min(math.exp(log_scale), 100.0))
        with pytest.raises(ValueError, match="tau"):
            settings("ema", learn_tau=True, tau=0.005)


class TestCDR:
    @for_all_label_kinds
    @pytest.mark.parametrize("reduction", ["mean", "sum_dim"])
    def test_objective(self, reduction: str, kind: str) -> None:
        method, batch = fitted("cdr", kind, 10, mse_reduction=reduction, ce_min_step=0.5, w_ce=0.7, w_mse=1.3)
        paired = (batch["paired"] > 0).numpy()
        x_v, x_s = standardised(batch["image"]), standardised(batch["text"], batch["paired"] > 0)
        torch.manual_seed(0)
        n = np.floor(to_numpy(torch.rand(ROWS)) * 12).astype(int)
        abar = noise_levels(12)[n][:, None]
        x_n = np.sqrt(abar) * x_s + np.sqrt(1 - abar) * to_numpy(torch.randn(ROWS, 10))
        context = method.denoiser.image_context(torch.from_numpy(x_v).float())
        x_0 = method.denoiser(torch.from_numpy(x_n).float(), method.denoiser.embed_step(torch.from_numpy(n)), context)
        error = ((to_numpy(x_0) - x_s)[paired] ** 2).mean() * (10 if reduction == "sum_dim" else 1)
        assert 0 < (n >= 6).sum() < ROWS
        ce = cross_entropy(method.classifier(x_0), batch["label"], n >= 6)
        parts = seeded_loss(method, batch)
        assert parts["mse"].item() == pytest.approx(error, rel=1e-4)
        assert parts["loss"].item() == pytest.approx(0.7 * ce + 1.3 * error, rel=1e-4)

    @pytest.mark.parametrize(("fraction", "first"), [(0.0, 0), (0.5, 6)])
    def test_steps_are_uniform(self, fraction: float, first: int) -> None:
        method, _ = fitted("cdr", train_min_step=fraction)
        batch = make_batch(rows=6000)
        n = method.predict_one_step(batch)[2].numpy()
        assert n.min() == first
        assert n.max() == 11
        assert stats.chisquare(np.bincount(n, minlength=12)[first:]).pvalue > 0.001

    def test_a_fraction_of_t_gives_the_exact_step(self) -> None:
        method = build("cdr", num_steps=900, train_min_step=0.53, ce_min_step=0.13)
        assert (float(method.first_step), float(method.first_ce_step)) == (477, 117)

    @pytest.mark.parametrize("denoiser", ["mlp", "regression"])
    def test_the_network_has_four_linear_layers(self, denoiser: str) -> None:
        modules = build("cdr", denoiser=denoiser).denoiser.named_modules()
        linear = (nn.Linear, ConcatLinear)
        layers = [name for name, layer in modules if isinstance(layer, linear) and not name.startswith("embed.")]
        assert len(layers) == 4

    def test_the_regression_reads_no_text_no_noise_and_no_step(self) -> None:
        method, batch = fitted("cdr", denoiser="regression", draws=3, sampler="ancestral", eta=1.0)
        other = {**batch, "text": batch["text"].flip(0)}
        first = method.predict_one_step(batch)[0]
        assert torch.equal(first, method.predict_one_step(other)[0])
        assert torch.equal(first, method.feature(batch["image"], make_rng(2)))
        assert torch.equal(method.classifier(first), method.predict(batch["image"], make_rng(3)))


class TestFusionOperators:
    def test_values_at_zero(self) -> None:
        zero = torch.zeros(1, 3)
        assert marnet.fuse_sum(zero, zero)[0].tolist() == pytest.approx([-0.693147] * 3, abs=1e-6)
        assert marnet.fuse_hm(zero, zero)[0].tolist() == pytest.approx([-1.609438] * 3, abs=1e-6)

    def test_they_equal_the_formulas_of_cf_vqa(self) -> None:
        z_e, z_c = 3 * torch.randn(2, 50, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        z = special.expit(to_numpy(z_e)) * special.expit(to_numpy(z_c))
        expected_sum = np.log(special.expit(to_numpy(z_e + z_c)) + 1e-12)
        np.testing.assert_allclose(to_numpy(marnet.fuse_sum(z_e, z_c)), expected_sum, atol=1e-6)
        np.testing.assert_allclose(to_numpy(marnet.fuse_hm(z_e, z_c)), np.log(z + 1e-12) - np.log1p(z), atol=1e-6)
        assert torch.equal(marnet.fuse_sum(z_e, z_c).argmax(1), (z_e + z_c).argmax(1))
        assert torch.equal(marnet.fuse_hm(z_e, z_c).argmax(1), (z_e.sigmoid() * z_c.sigmoid()).argmax(1))

    def test_very_low_logits_stay_distinct(self) -> None:
        z = torch.tensor([[-40.0, -41.0, -60.0]])
        for fuse in (marnet.fuse_sum, marnet.fuse_hm):
            assert fuse(z, z)[0].diff().max() < -1

    @pytest.mark.parametrize(("kind", "join"), [("concat", np.hstack), ("add", sum), ("mul", lambda pair: pair[0] * pair[1])])
    def test_features_are_joined_at_the_same_length(self, kind: str, join: Any) -> None:
        fusion = marnet.FeatureFusion(kind, 12, WIDTH, CLASSES)
        f_e, f_c = torch.randn(ROWS, 12), 50 * torch.randn(ROWS, WIDTH)
        pair = [to_numpy(f_e), linear(fusion.project, to_numpy(f_c))]
        joined = join([math.sqrt(12) * x / np.linalg.norm(x, axis=1, keepdims=True) for x in pair])
        np.testing.assert_allclose(to_numpy(fusion(f_e, f_c)), linear(fusion.classifier, joined), atol=1e-4)
        np.testing.assert_allclose(to_numpy(fusion.join(f_e, f_c)), joined, atol=1e-5)


class TestMARNet:
    def test_every_setting_reaches_a_branch(self) -> None:
        changed = {float: 0.5, int: 9, bool: True}
        default = settings("marnet")
        reached: set[tuple[str, str]] = set()
        for alias in marnet.Config.aliases:
            value = value_of(default, alias)
            choice = {
                "schedule": "cosine",
                "mse_reduction": "sum_dim",
                "sampler": "ancestral",
                "scale": "global",
                "label_loss": "bce",
            }
            other = settings("marnet", **{alias: choice.get(alias, changed.get(type(value)))})
            for name, before, after in (("ema", default.ema, other.ema), ("cdr", default.cdr, other.cdr)):
                reached |= {
                    (name, each.name) for each in fields(before) if getattr(before, each.name) != getattr(after, each.name)
                }
        assert reached >= {("ema", each.name) for each in fields(ema.Config)}
        assert {each.name for each in fields(cdr.Config)} - {name for branch, name in reached if branch == "cdr"} == {
            "denoiser",
            "adapter",
            "width",
            "chain_steps",  # it is younger than the aliases
        }

    @pytest.mark.parametrize("branch", ["ema", "cdr"])
    def test_a_branch_trains_like_the_method_of_the_same_name(self, branch: str) -> None:
        model, batch = fitted("marnet", seed=1)
        config = getattr(settings("marnet"), branch)
        alone = plugins.get("methods", branch)(
            config, {"image": (WIDTH,), "text": (WIDTH,), "label": (), "classes": (CLASSES,)}
        )
        alone.load_state_dict(getattr(model, branch).state_dict())
        assert torch.equal(seeded_loss(model, batch, branch)["loss"], seeded_loss(alone, batch)["loss"])
        assert torch.equal(
            getattr(model, branch).feature(batch["image"], make_rng()), alone.train(False).feature(batch["image"], make_rng())
        )

    @for_all_label_kinds
    def test_fusions_learn_from_sampled_features_while_the_branches_are_frozen(self, kind: str) -> None:
        model, batch = fitted("marnet", kind, draws=2)
        batch["text"] = torch.full_like(batch["text"], math.nan)
        parts = seeded_loss(model.train(), batch, "fusion")
        torch.manual_seed(0)
        rng = KeyedRNG.drawn(ROWS, batch["image"].device)
        f_e, f_c = model.ema.feature(batch["image"], rng), model.cdr.feature(batch["image"], rng)
        expected = [cross_entropy(model.fusions[name](f_e, f_c), batch["label"]) for name in ("concat", "add", "mul")]
        assert [parts[name].item() for name in ("concat", "add", "mul")] == pytest.approx(expected, rel=1e-5)
        assert parts["loss"].item() == pytest.approx(sum(expected), rel=1e-5)
        parts["loss"].backward()
        for name, parameter in model.named_parameters():
            assert (parameter.grad is not None) == name.startswith("fusions."), name

    @pytest.mark.parametrize("fusion", [*marnet.FEATURE_FUSIONS, "sum", "hm"])
    def test_the_joint_loss_is_the_sum_of_three_losses(self, fusion: str) -> None:
        model, batch = fitted("marnet", regime="joint", fusion=fusion)
        parts = seeded_loss(model, batch, "joint")
        ema_loss = seeded_loss(model.ema, batch)["loss"]
        torch.manual_seed(0)
        x_0, *rest = model.cdr.predict_one_step(batch)
        cdr_loss = model.cdr.objective(x_0, *rest, batch)["loss"]
        f_e = model.ema.feature(batch["image"], make_rng())
        fused = cross_entropy(model.fuse(fusion, f_e, x_0), batch["label"])
        assert parts["loss"].item() == pytest.approx((ema_loss + cdr_loss).item() + fused, rel=1e-5)
        assert list(model.fusions) == ([fusion] if fusion in marnet.FEATURE_FUSIONS else [])

    @pytest.mark.parametrize("fusion", ["sum", "hm"])
    def test_logit_fusions_use_the_predictions_of_the_branches(self, fusion: str) -> None:
        model, batch = fitted("marnet", fusion=fusion)
        z_e, z_c = model.ema.predict(batch["image"], make_rng()), model.cdr.predict(batch["image"], make_rng())
        joint = z_e + z_c if fusion == "sum" else z_e.sigmoid() * z_c.sigmoid()
        assert torch.equal(model.predict(batch["image"], make_rng()).argmax(1), joint.argmax(1))

    def test_the_fusion_may_change_after_training(self) -> None:
        trained, batch = fitted("marnet", fusion="concat")
        for fusion in ("add", "mul", "sum", "hm"):
            other = build("marnet", seed=1, fusion=fusion)
            other.load_state_dict(trained.state_dict())
            f_e, f_c = trained.ema.feature(batch["image"], make_rng()), trained.cdr.feature(batch["image"], make_rng())
            expected = trained.fuse(fusion, f_e, f_c)
            torch.testing.assert_close(other.train(False).predict(batch["image"], make_rng()), expected)


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("baseline", {"dropout": 1.0}),
        ("ema", {"tau": 0.0}),
        ("ema", {"w_ita": -1.0}),
        ("cdr", {"num_steps": 0, "sampler": "ancestral"}),
        ("cdr", {"sample_steps": 13}),
        ("cdr", {"sample_steps": 0}),
        ("cdr", {"draws": 0}),
        ("cdr", {"eta": 1.5}),
        ("cdr", {"train_min_step": 1.01}),
        ("cdr", {"ce_min_step": -0.01}),
        ("cdr", {"denoiser": "regression", "ce_min_step": 0.5}),
        ("marnet", {"tau": -1.0}),
        ("marnet", {"draws": 0}),
        ("seda", {"stage_step": 12}),
        ("seda", {"stage_step": -1}),
        ("seda", {"draws": 0}),
        ("seda", {"sample_steps": 13}),
        ("seda", {"train_min_step": -1.0}),
        ("seda", {"w_sc": -0.1}),
        ("seda", {"dropout": -0.1}),
    ],
)
def test_impossible_settings_are_refused(name: str, wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="|".join(wrong)):
        settings(name, **wrong)


@pytest.mark.parametrize(
    ("name", "wrong"), [("seda", {"adapter": "none"}), ("cdr", {"denoiser": "unet"}), ("cdr", {"adapter": "pca"})]
)
def test_unsuitable_widths_are_refused(name: str, wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="width"):
        build(name, text_width=10, **wrong)
