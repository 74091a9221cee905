"""TEAM: its token loss, written a second time in NumPy pair by pair, its closed forms, and its draws of negatives."""

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
    cross_entropy,
    fitted,
    make_rng,
    seeded_loss,
    settings,
    shapes,
    to_numpy,
)
from scipy.special import log_softmax, ndtr, softmax
from scipy.stats import chisquare
from torch import Tensor

from pipeline.methods.team import draw_negatives, token_loss
from pipeline.runtime import plugins
from pipeline.runtime.errors import UserError

HEADS = 2


def linear(layer: Any, x: np.ndarray) -> np.ndarray:
    bias = 0.0 if layer.bias is None else to_numpy(layer.bias)
    return x @ to_numpy(layer.weight).T + bias


def layer_norm(layer: Any, x: np.ndarray) -> np.ndarray:
    scaled = (x - x.mean(1, keepdims=True)) / np.sqrt(x.var(1, keepdims=True) + 1e-5)
    return scaled * to_numpy(layer.weight) + to_numpy(layer.bias)


def attention(layer: Any, query: np.ndarray, key: np.ndarray, value: np.ndarray) -> np.ndarray:
    q, k, v = linear(layer.query, query), linear(layer.key, key), linear(layer.value, value)
    size = q.shape[1] // HEADS
    heads = []
    for part in (slice(number * size, (number + 1) * size) for number in range(HEADS)):
        heads.append(softmax(q[:, part] @ k[:, part].T / math.sqrt(size), axis=1) @ v[:, part])
    return linear(layer.out, np.concatenate(heads, axis=1))


def tokens(layer: Any, x: np.ndarray) -> np.ndarray:
    """Return the tokens of a vector, or of words or patches."""
    if x.ndim == 2:
        return linear(layer.layer, (x - to_numpy(layer.scale.mean)) / to_numpy(layer.scale.std))
    chunks = np.split(x, len(layer.weight))
    return np.stack([chunk @ w + b for chunk, w, b in zip(chunks, to_numpy(layer.weight), to_numpy(layer.bias), strict=True)])


def scores_of_a_pair(matching: Any, h_s: np.ndarray, h_v: np.ndarray) -> list[float]:
    """Return the score after each block of one text and one image."""
    text, image = tokens(matching.text_tokens, h_s), tokens(matching.image_tokens, h_v)
    retrieved, scores = np.zeros_like(text), []
    for block in matching.blocks:
        r = layer_norm(block.norms[0], retrieved)
        retrieved = retrieved + attention(block.own, text + r, text + r, r)
        retrieved = retrieved + attention(block.cross, text + layer_norm(block.norms[1], retrieved), image, image)
        hidden = linear(block.mlp.layers[0], layer_norm(block.norms[2], retrieved))
        retrieved = retrieved + linear(block.mlp.layers[1], hidden * ndtr(hidden))  # GELU
        found, wanted = linear(matching.retrieved_layer, retrieved), linear(matching.text_layer, text)
        lengths = np.linalg.norm(found, axis=1) * np.linalg.norm(wanted, axis=1)
        scores.append(float(((found * wanted).sum(1) / lengths).mean()))
    return scores


@pytest.mark.parametrize("kind", LABEL_KINDS)
def test_objective(kind: str) -> None:
    method, batch = fitted("team", kind, text_width=10, tau=0.2, w_team=1.3, num_blocks=2)
    with torch.no_grad():
        for name, weight in method.matching.named_parameters():
            weight.add_(0.3 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(len(name))))
    h_v = to_numpy(method.common.image(batch["image"]))
    h_s = to_numpy(method.common.text(batch["text"], batch["paired"]))
    a, b = (h / np.linalg.norm(h, axis=1, keepdims=True) for h in (h_s, h_v))
    similarity, paired = a @ b.T / 0.2, batch["paired"].numpy() > 0
    torch.manual_seed(0)
    gumbel = [-np.log(-np.log(torch.rand(ROWS, ROWS).double().numpy())) for _ in range(2)]
    label = batch["label"].numpy().reshape(ROWS, -1)
    losses = []
    for i in np.flatnonzero(paired):
        others = [j for j in np.flatnonzero(paired) if (label[i] != label[j]).any()]
        image = max(others, key=lambda j: similarity[i, j] + gumbel[0][i, j])
        text = max(others, key=lambda j: similarity[j, i] + gumbel[1][i, j])
        pairs = [scores_of_a_pair(method.matching, h_s[t], h_v[v]) for t, v in ((i, i), (i, image), (text, i))]
        losses.append(-log_softmax(np.array(pairs) / 0.2, axis=0)[0].mean())
    expected = np.mean(losses)
    contrast = -sum(np.diag(log_softmax(similarity[paired][:, paired], axis=axis)).mean() for axis in (0, 1)) / 2
    parts = seeded_loss(method, batch)
    assert parts["tokens"].item() == pytest.approx(expected, rel=1e-4)
    assert parts["clip"].item() == pytest.approx(contrast, rel=1e-4)
    ce = cross_entropy(method.predict(batch["image"], make_rng()), batch["label"])
    assert parts["loss"].item() == pytest.approx(ce + 1.3 * (contrast + expected), rel=1e-4)


def test_words_and_patches_are_scored_without_the_padding() -> None:
    changes, generator = {"text": (5, 6), "image": (3, 7)}, torch.Generator().manual_seed(0)
    method: Any = plugins.get("methods", "team")(settings("team", num_blocks=2), {**shapes(), **changes})
    matching = method.matching.train(False)
    words, patches = torch.randn(4, 5, 6, generator=generator), torch.randn(4, 3, 7, generator=generator)
    lengths = (1, 5, 3, 4)
    for each, length in zip(words, lengths, strict=True):
        each[length:] = 0.0
    for layer, tensor in ((matching.text_tokens, words), (matching.image_tokens, patches)):
        layer.fit([tensor])
    pairs = zip(to_numpy(words), to_numpy(patches), lengths, strict=True)
    expected = [scores_of_a_pair(matching, text[:length], image) for text, image, length in pairs]
    np.testing.assert_allclose(to_numpy(matching(words, patches)).T, expected, atol=1e-5)


@pytest.mark.parametrize(("scale", "gap"), [(1.0, 0.0), (50.0, 0.0), (14.3, 0.1), (100.0, 0.5), (3.0, -0.7)])
def test_the_token_loss_is_that_of_a_gap(scale: float, gap: float) -> None:
    scores = torch.full((3, 2, 4), 0.2)
    scores[0] += gap
    expected = math.log1p(2 * math.exp(-scale * gap))
    assert token_loss(scores, scale).item() == pytest.approx(expected, rel=1e-4, abs=1e-6)
    if gap == 0:
        assert expected == pytest.approx(math.log(3))
    assert token_loss(scores, scale, torch.zeros(4)).item() == 0.0


def test_pairs_are_scored_by_themselves() -> None:
    method, batch = fitted("team")
    h_v, h_s = method.common.image(batch["image"]), method.common.text(batch["text"], batch["paired"])
    order = torch.randperm(ROWS, generator=torch.Generator().manual_seed(1))
    scores = method.matching(h_s, h_v)
    torch.testing.assert_close(method.matching(h_s[order], h_v[order]), scores[:, order])
    torch.testing.assert_close(method.matching(h_s[:1], h_v[:1]), scores[:, :1])
    assert scores.abs().max() <= 1.0
    assert (method.matching(h_s, h_v.flip(0)) - scores).abs().max() > 1e-4  # an image counts


def test_negatives_are_drawn_with_the_probabilities_of_a_softmax() -> None:
    logits = torch.tensor([0.0, 2.0, 1.0, -1.0, 5.0])
    allowed = torch.tensor([True, True, True, True, False])
    torch.manual_seed(0)
    drawn = draw_negatives(logits.expand(20_000, 5), allowed.expand(20_000, 5))
    counts = np.bincount(drawn.numpy(), minlength=5)
    assert counts[4] == 0
    assert chisquare(counts[:4], 20_000 * softmax(logits.numpy()[:4].astype(float))).pvalue > 0.01


def test_a_batch_of_one_class_has_no_token_loss() -> None:
    method, batch = fitted("team")
    batch["label"] = torch.zeros(ROWS, dtype=torch.int64)
    parts = seeded_loss(method.train(), batch)
    assert parts["tokens"].item() == 0.0
    parts["loss"].backward()
    assert all(weight.grad.isfinite().all() for weight in method.parameters())
    assert not any(weight.grad.any() for weight in method.matching.parameters())


def test_samples_without_a_negative_do_not_count() -> None:
    """Only the first sample has another class, and it has no text: nobody may be its negative, nor it that of others."""
    method, batch = fitted("team")
    batch["label"], batch["paired"] = (torch.arange(ROWS) == 0).long(), (torch.arange(ROWS) > 0).float()
    assert seeded_loss(method, batch)["tokens"].item() == 0.0
    batch["paired"][0] = 1.0
    assert seeded_loss(method, batch)["tokens"].item() > 0.0


def test_more_blocks_change_the_loss_and_heads_divide_a_token() -> None:
    losses = [seeded_loss(*fitted("team", num_blocks=number))["tokens"].item() for number in (1, 2)]
    assert abs(losses[0] - losses[1]) > 1e-5
    plugin = plugins.get("methods", "team")
    with pytest.raises(UserError, match="num_heads is 3; choose a divisor of token_width, 256"):
        plugin.Config(num_heads=3)


def test_prediction_needs_no_tokens() -> None:
    method, batch = fitted("team")
    logits: Tensor = method.predict(batch["image"], make_rng())
    logits.sum().backward()
    assert logits.shape == (ROWS, CLASSES)
    read = {name.partition(".")[0] for name, weight in method.named_parameters() if weight.grad is not None}
    assert read == {"common", "classifier"}
    assert method.common.text_projector.layer.weight.grad is None
