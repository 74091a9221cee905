"""MoMKE: its prediction, written a second time in NumPy, its router, and what may have a gradient in which phase."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from helpers.method_cases import LABEL_KINDS, cross_entropy, fitted, make_rng, seeded_loss, to_numpy
from scipy.special import ndtr, softmax

from pipeline.methods.momke import ExpertLayer, ExpertMixture
from pipeline.nn.layers import MLP
from pipeline.runtime import plugins
from pipeline.runtime.errors import UserError
from pipeline.training.heads import resolve_head_settings


def linear(layer: Any, x: np.ndarray) -> np.ndarray:
    return x @ to_numpy(layer.weight).T + to_numpy(layer.bias)


def mlp(layer: Any, x: np.ndarray) -> np.ndarray:
    hidden = linear(layer.layers[0], x)
    return linear(layer.layers[1], hidden * ndtr(hidden))  # GELU


def expert_output(expert: Any, x: np.ndarray) -> np.ndarray:
    for layer in expert:
        value = linear(layer.value, x)
        x = x + value + mlp(layer.mlp, value)
    return x


def mixed(method: Any, router: Any, x: np.ndarray) -> np.ndarray:
    outputs = [expert_output(expert, x) for expert in method.mixture.experts]
    return np.einsum("be,ebd->bd", softmax(mlp(router, x), axis=1), outputs)


@pytest.mark.parametrize("kind", LABEL_KINDS)
@pytest.mark.parametrize("condition", ["image", "mixed"])
def test_objectives(kind: str, condition: str) -> None:
    method, batch = fitted("momke", kind, text_width=10, condition=condition, w_ce_text=0.7)
    x_v = linear(method.image_projector, to_numpy(method.image_scale(batch["image"])))
    x_s = linear(method.text_projector, to_numpy(method.text_scale(batch["text"])))
    paired, label = batch["paired"].numpy() > 0, batch["label"]
    ces: list[float] = []
    sides = ((method.image_classifier, x_v, slice(None)), (method.text_classifier, x_s, paired))
    for expert, (classifier, x, rows) in zip(method.mixture.experts, sides, strict=True):
        ces.append(cross_entropy(torch.from_numpy(linear(classifier, expert_output(expert, x))), label, rows))
    assert seeded_loss(method, batch, "experts")["loss"].item() == pytest.approx(ces[0] + 0.7 * ces[1], rel=1e-4)

    torch.manual_seed(0)
    is_there = paired & (torch.rand(len(paired)).numpy() < 0.5) & (condition == "mixed")
    text = mixed(method, method.text_router, x_s) * is_there[:, None] if condition == "mixed" else np.zeros_like(x_v)
    fused = {}
    for name, part in (("loss", text), ("predict", np.zeros_like(text))):
        joint = np.concatenate([mixed(method, method.image_router, x_v), part], axis=1)
        fused[name] = linear(method.classifier, joint + np.maximum(linear(method.fusion, joint), 0))
    ce = cross_entropy(torch.from_numpy(fused["loss"]), label)
    assert seeded_loss(method, batch)["loss"].item() == pytest.approx(ce, rel=1e-4)
    np.testing.assert_allclose(to_numpy(method.predict(batch["image"], make_rng())), fused["predict"], atol=1e-4)


def test_the_router_s_weights_sum_to_1_and_one_expert_is_itself() -> None:
    x = torch.randn(5, 6, generator=torch.Generator().manual_seed(0))
    equal = ExpertMixture(6, 2, num_experts=3)
    for expert in equal.experts:
        expert.load_state_dict(equal.experts[0].state_dict())
    torch.testing.assert_close(equal(x, MLP([6, 6, 3])), equal.experts[0](x))  # a mean with weights of sum 1
    one = ExpertMixture(6, 2, num_experts=1)
    assert torch.equal(one(x, MLP([6, 6, 1])), one.experts[0](x))


def test_an_expert_s_layer_is_attention_among_tokens_of_which_a_vector_is_one() -> None:
    layer, x = ExpertLayer(6, num_heads=2), torch.randn(3, 4, 6, generator=torch.Generator().manual_seed(0))
    query, key = np.split(linear(layer.query_key, to_numpy(x)), 2, axis=2)
    value = linear(layer.value, to_numpy(x))
    heads = []
    for part in (slice(0, 3), slice(3, 6)):
        weight = softmax(query[..., part] @ key[..., part].swapaxes(1, 2) / np.sqrt(3), axis=2)
        heads.append(weight @ value[..., part])
    attended = np.concatenate(heads, axis=2)
    np.testing.assert_allclose(to_numpy(layer(x)), to_numpy(x) + attended + mlp(layer.mlp, attended), atol=1e-5)
    is_token = torch.tensor([[True, True, True, False], [True, False, False, False], [True, True, False, False]])
    masked = layer(x, is_token)
    for row, length in enumerate((3, 1, 2)):  # tokens behind the last word change nothing
        torch.testing.assert_close(masked[row, :length], layer(x[row : row + 1, :length])[0])
    vectors = ExpertLayer(6)
    vectors.load_state_dict(layer.state_dict(), strict=False)
    torch.testing.assert_close(layer(x[:, :1])[:, 0], vectors(x[:, 0]))


def test_an_expert_learns_by_itself_first_and_with_the_other_then() -> None:
    method, batch = fitted("momke")
    parts = seeded_loss(method, batch, "experts")
    image_expert, text_expert = (list(expert.parameters()) for expert in method.mixture.experts)
    for part, own, other in (("ce", image_expert, text_expert), ("ce_text", text_expert, image_expert)):
        gradients = torch.autograd.grad(parts[part], own + other, allow_unused=True, retain_graph=True)
        assert all(gradient is not None and gradient.any() for gradient in gradients[: len(own)])
        assert all(gradient is None for gradient in gradients[len(own) :])
    loss = seeded_loss(method, batch)["loss"]
    assert all(gradient.any() for gradient in torch.autograd.grad(loss, image_expert + text_expert))


def test_the_second_phase_reads_texts_only_if_mixed() -> None:
    for condition, reads in (("image", False), ("mixed", True)):
        method, batch = fitted("momke", condition=condition)
        loss, other = (seeded_loss(method, each)["loss"] for each in (batch, {**batch, "text": batch["text"].flip(0)}))
        assert torch.equal(loss, other) != reads
        assert any(name.startswith("text_projector") for name in method.phases[1].trains) == reads


def test_every_flag_changes_a_loss() -> None:
    flags: list[dict[str, Any]] = [{}, {"condition": "mixed"}, {"depth": 3}, {"dropout": 0.5}, {"w_ce_text": 0.3}]
    losses = []
    for changes in flags:
        method, batch = fitted("momke", **changes)
        losses.append(tuple(seeded_loss(method.train(), batch, phase.name)["loss"].item() for phase in method.phases))
    assert len(set(losses)) == len(losses)


def test_heads_divide_the_width() -> None:
    with pytest.raises(UserError, match="num_heads is 3; choose a divisor of width, 256"):
        plugins.get("methods", "momke").Config(num_heads=3)


def test_the_paper_s_dropout() -> None:
    settings, _ = resolve_head_settings("openmoji", "momke", "paper", {}, {})
    assert (settings.width, settings.depth, settings.dropout) == (256, 4, 0.5)
