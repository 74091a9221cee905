"""SSAN: its closed forms, its reversed gradient, and the whole objective against a computation class by class in NumPy."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from helpers.method_cases import (
    CLASSES,
    LABEL_KINDS,
    ROWS,
    batches_of,
    build,
    cross_entropy,
    fitted,
    make_batch,
    make_rng,
    seeded_loss,
    to_numpy,
)
from scipy.special import expit, softmax
from torch import Tensor, nn

from pipeline.methods.ssan import centre_distance, reversal_strength, reverse_gradient, soft_label_loss
from pipeline.nn.losses import class_sums

for_all_label_kinds = pytest.mark.parametrize("kind", LABEL_KINDS)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_the_gradient_is_reversed_and_the_value_is_not() -> None:
    x, weight = random(6, 4).requires_grad_(), random(6, 4, seed=1)
    y = reverse_gradient(x, torch.tensor(0.3))
    assert torch.equal(y, x)
    (y * weight).sum().backward()
    torch.testing.assert_close(x.grad, -0.3 * weight)


def test_the_strength_of_the_reversal_is_that_of_the_formula() -> None:
    p = np.linspace(0, 1, 11)
    np.testing.assert_allclose(
        reversal_strength(torch.from_numpy(p)).numpy(), 2 / (1 + np.exp(-10 * p)) - 1, rtol=1e-12, atol=1e-12
    )


def test_equal_centres_have_no_distance_and_pairs_make_three_half_as_much_again() -> None:
    n = torch.tensor([3.0, 1.0, 0.0, 2.0])
    m_s, m_v = random(4, 5), random(4, 5, seed=1)
    assert [centre_distance(m_s, m_s, n, n, has_three).item() for has_three in (True, False)] == [0.0, 0.0]
    two, three = (centre_distance(m_s, m_v, n, n, has_three) for has_three in (False, True))
    torch.testing.assert_close(three, 1.5 * two)
    torch.testing.assert_close(two, (m_s - m_v).square().sum(1)[n > 0].mean())
    none = torch.zeros(4)
    assert centre_distance(m_s, m_v, none, n, True).item() == 0.0


def test_soft_labels_cost_least_where_they_are_predicted() -> None:
    q = torch.eye(CLASSES) * 0.5 + 0.1
    label, known = torch.arange(10) % CLASSES, torch.ones(CLASSES, dtype=torch.bool)
    least = soft_label_loss(q.log()[label], label, q, known).item()
    assert least == pytest.approx(-(q * q.log()).sum(1).mean().item(), abs=2e-4)
    assert soft_label_loss(random(10, CLASSES), label, q, known).item() > least
    assert soft_label_loss(q.log()[label], label, q, ~known).item() == 0.0


def by_hand(method: Any, batch: dict[str, Tensor], native: bool) -> dict[str, float]:
    """The parts of the loss, with one loop over the classes, in float64."""
    paired, label = batch["paired"].numpy() > 0, batch["label"]
    member = np.eye(CLASSES)[label.numpy()] if label.ndim == 1 else label.numpy()
    h_v, h_s = (to_numpy(h) for h in method.embeddings(batch))
    weight, bias = to_numpy(method.classifier.weight), to_numpy(method.classifier.bias)

    def logits(h: np.ndarray) -> np.ndarray:
        z = h @ weight.T + bias
        return np.where(z > 0, z, 0.2 * z) if native else z

    def units(h: np.ndarray) -> np.ndarray:
        return h / np.linalg.norm(h, axis=1, keepdims=True)

    log_p, p_s = np.log(softmax(logits(h_v), axis=1) + 1e-5), softmax(logits(h_s) / float(method.tau), axis=1)
    soft, esa = [], []
    for k in range(CLASSES):
        images, texts = member[:, k] > 0, (member[:, k] > 0) & paired
        if images.any() and texts.any():
            soft.append(-(p_s[texts].mean(0) * log_p[images]).sum(1).mean())
            both = np.concatenate([units(h_s)[texts], units(h_v)[images]]).mean(0)
            m_s, m_v = units(h_s)[texts].mean(0), units(h_v)[images].mean(0)
            distances = [m_s - m_v, m_s - both, m_v - both]
            esa.append(sum(d @ d for d in (distances if method.has_three else distances[:1])))
    d_v, d_s = (
        units(h) @ to_numpy(method.discriminator.weight)[0] + method.discriminator.bias.item() for h in (h_v, h_s[paired])
    )
    return {
        "ce": cross_entropy(torch.from_numpy(logits(h_v)), label),
        "ce_text": cross_entropy(torch.from_numpy(logits(h_s)), label, paired),
        "soft": float(np.mean(soft)),
        "esa": float(np.mean(esa)),
        "domain": float(-0.5 * (np.log(expit(-d_v)).mean() + np.log(expit(d_s)).mean())),
    }


@for_all_label_kinds
@pytest.mark.parametrize("changes", [{}, {"native": True}, {"centres": "two", "tau": 2.0}], ids=str)
def test_objective(changes: dict[str, Any], kind: str) -> None:
    method, batch = fitted("ssan", kind, 10, w_ce_text=0.6, w_soft=2.0, w_esa=0.3, w_domain=0.2, **changes)
    if changes.get("native"):  # the original's initial weights are so small that all logits are alike
        for parameter in method.parameters():
            nn.init.uniform_(parameter, -0.5, 0.5)
    unseen = batch["label"] == 1 if kind == "single" else batch["label"][:, 1] > 0
    batch["paired"] = torch.where(unseen, 0.0, batch["paired"])  # class 1 has no text
    expected = by_hand(method, batch, "native" in changes)
    parts = seeded_loss(method, batch)
    for name, value in expected.items():
        assert parts[name].item() == pytest.approx(value, rel=1e-4), name
    total = 0.6 * expected["ce_text"] + 0.8 * expected["ce"]
    total += 2.0 * expected["soft"] + 0.3 * expected["esa"] + 0.2 * expected["domain"]
    assert parts["loss"].item() == pytest.approx(total, rel=1e-4)


@for_all_label_kinds
def test_without_its_alignments_it_has_two_cross_entropies(kind: str) -> None:
    method, batch = fitted("ssan", kind, w_soft=0.0, w_esa=0.0, w_domain=0.0)
    parts = seeded_loss(method, batch)
    torch.testing.assert_close(parts["loss"], parts["ce"] + parts["ce_text"])


def test_soft_labels_do_not_teach_texts() -> None:
    method, batch = fitted("ssan")
    seeded_loss(method, batch)["soft"].backward()
    assert all(weight.grad is None for weight in method.common.text_projector.parameters())
    assert all(weight.grad.any() for weight in method.common.image_projector.parameters())


def test_the_discriminator_learns_what_the_projectors_work_against() -> None:
    """Progress changes the gradient of the projectors alone: none at 0, and at 1 that of the plain loss with the other sign."""
    gradients = {}
    for progress in (0.0, 1.0):
        method, batch = fitted("ssan")
        method.begin_epoch("head", progress, batches_of(batch))
        seeded_loss(method, batch)["domain"].backward()
        gradients[progress] = method.common.image_projector.layer.weight.grad, method.discriminator.weight.grad
    (none, still), (reversed_, same) = gradients.values()
    assert not none.any()
    assert torch.equal(still, same)
    method, batch = fitted("ssan")
    h_v, h_s = method.embeddings(batch)
    units = [nn.functional.normalize(h, dim=1) for h in (h_v, h_s[batch["paired"] > 0])]
    told = [nn.functional.logsigmoid(sign * method.discriminator(h)).mean() for sign, h in zip((-1, 1), units, strict=True)]
    (-0.5 * torch.stack(told).sum()).backward()
    torch.testing.assert_close(reversed_, -math.tanh(5) * method.common.image_projector.layer.weight.grad, atol=1e-7, rtol=1e-4)


def test_a_native_embedding_has_unit_length_and_small_initial_weights() -> None:
    method, batch = fitted("ssan", native=True)
    torch.testing.assert_close(method.feature(batch["image"], make_rng()).norm(dim=1), torch.ones(ROWS))
    first = method.common.image_projector.first
    assert first.weight.shape == (16, 16)
    assert build("ssan", native=True, width=256).classifier.weight.std().item() == pytest.approx(0.01, rel=0.1)
    assert not first.bias.any()


@for_all_label_kinds
def test_classes_of_all_texts_are_those_of_a_batch_of_all(kind: str) -> None:
    batch = make_batch(kind)
    losses, gradients = [], []
    for text_classes in ("split", "batch"):
        method = build("ssan", kind, centres="two", text_classes=text_classes)
        method.begin("head", batches_of(batch))
        losses.append(seeded_loss(method, batch))
        gradients.append(torch.autograd.grad(losses[-1]["soft"], [method.classifier.weight])[0])
    torch.testing.assert_close(losses[0], losses[1])
    torch.testing.assert_close(*gradients)


def test_classes_of_all_texts_follow_the_weights_and_hold_in_a_small_batch() -> None:
    method, batch = fitted("ssan", text_classes="split")
    before = method.text_soft.clone()
    assert not any(buffer.requires_grad for buffer in method.buffers())
    with torch.no_grad():
        method.classifier.bias += torch.arange(float(CLASSES))
    method.begin_epoch("head", 0.5, batches_of(batch))
    assert not torch.equal(method.text_soft, before)
    z_s = method.logits(method.common.text(batch["text"], batch["paired"]))
    sums, count = class_sums((z_s / 5.0).softmax(1), batch["label"], CLASSES, batch["paired"])
    torch.testing.assert_close(method.text_soft, sums / count.unsqueeze(1))
    one = {key: column[:1] for key, column in batch.items()} | {"paired": torch.zeros(1)}
    parts = seeded_loss(method, one)
    distance = method.text_centres[0] - nn.functional.normalize(method.common.image(one["image"]), dim=1)[0]
    torch.testing.assert_close(parts["esa"], 1.5 * distance.square().sum())
    assert parts["soft"] > 0


def test_every_flag_changes_the_loss() -> None:
    flags: list[dict[str, Any]] = [{}, {"native": True}, {"centres": "two"}, {"tau": 1.0}]
    losses = [seeded_loss(*fitted("ssan", **changes))["loss"].item() for changes in flags]
    assert len(set(losses)) == len(losses)
    small = {key: column[:20] for key, column in make_batch().items()}
    split, batch = (seeded_loss(fitted("ssan", text_classes=each)[0], small)["loss"] for each in ("split", "batch"))
    assert split != batch
