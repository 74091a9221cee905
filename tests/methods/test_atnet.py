"""ATNet: its closed forms, what may have a gradient, and the whole objective against NumPy and SciPy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers.method_cases import (
    LABEL_KINDS,
    ROWS,
    WIDTH,
    batches_of,
    cross_entropy,
    fitted,
    make_batch,
    make_rng,
    seeded_loss,
    settings,
    shapes,
    to_numpy,
)
from scipy.special import rel_entr, softmax
from torch import Tensor, nn

from pipeline.methods.atnet import Config, CrossNetwork
from pipeline.nn.losses import distillation
from pipeline.runtime import plugins

TEXT_BRANCH = ("text_encoder.", "text_alignment.", "text_decoder.")


def linear(x: np.ndarray, layer: nn.Linear) -> np.ndarray:
    return x @ to_numpy(layer.weight).T + to_numpy(layer.bias)


def relu(x: np.ndarray) -> np.ndarray:
    return np.maximum(x, 0)


def standardised(x: Tensor, rows: np.ndarray | slice = slice(None)) -> np.ndarray:
    raw = to_numpy(x)
    return (raw - raw[rows].mean(0)) / raw[rows].std(0)


def aligned(network: nn.Module, latent: np.ndarray) -> list[np.ndarray]:
    outputs = []
    for step in network.steps:  # type: ignore[union-attr]
        latent = relu(linear(relu(linear(latent, step[0])), step[2]))
        outputs.append(latent)
    return outputs


@pytest.mark.parametrize("kind", LABEL_KINDS)
def test_objective(kind: str) -> None:
    method, batch = fitted("atnet", kind, 10, w_ce_text=0.3, w_kl=1.3, w_mse=0.7, w_rec=0.2, w_cross=0.4)
    rows, label = (batch["paired"] > 0).numpy(), batch["label"]
    x_v, x_s = standardised(batch["image"]), standardised(batch["text"], rows)
    v = linear(x_v, method.image_encoder)
    t = linear(relu(linear(x_s, method.text_encoder[0])), method.text_encoder[2])
    assert method.block == 6  # 3/8 of 16
    (v_1, v_2), (t_1, t_2) = aligned(method.image_alignment, v[:, :6]), aligned(method.text_alignment, t[:, :6])
    cross = v
    for layer in method.cross.layers[:-1]:
        cross = linear(cross, layer)
        cross = relu((cross - cross[rows].mean(0)) / np.sqrt(cross[rows].var(0) + 1e-5))
    cross = linear(cross, method.cross.layers[-1])
    expected = {
        "ce": cross_entropy(torch.from_numpy(linear(v_2, method.classifier)), label),
        "ce_text": cross_entropy(torch.from_numpy(linear(t_2, method.classifier)), label, rows),
        "kl": rel_entr(softmax(t_1, axis=1), softmax(v_1, axis=1)).sum(1)[rows].mean(),
        "mse": ((v_2 - t_2) ** 2)[rows].mean(),
        "rec": ((linear(v, method.image_decoder) - x_v) ** 2).mean(),
        "rec_text": ((linear(t, method.text_decoder) - x_s) ** 2)[rows].mean(),
        "cross": ((cross - t) ** 2)[rows].mean(),
        "zeros": (v_2 == 0).mean(),
    }
    parts = seeded_loss(method, batch)
    for name, value in expected.items():
        assert parts[name].item() == pytest.approx(value, rel=1e-3), name
    warm = 0.2 * (expected["rec"] + expected["rec_text"]) + 0.3 * expected["ce_text"]
    total = warm + expected["ce"] + 1.3 * expected["kl"] + 0.7 * expected["mse"] + 0.4 * expected["cross"]
    assert parts["loss"].item() == pytest.approx(total, rel=1e-4)
    assert seeded_loss(method, batch, "warm_up")["loss"].item() == pytest.approx(warm, rel=1e-4)
    assert 0 < expected["zeros"] < 1
    np.testing.assert_allclose(to_numpy(method.feature(batch["image"], make_rng())), v_2, atol=1e-4)


def test_words_are_reconstructed_and_predicted() -> None:
    """Written a second time, word by word; what stands behind the last word of a text is not read."""
    torch.manual_seed(0)
    method: Any = plugins.get("methods", "atnet")(settings("atnet", w_rec=0.2, w_cross=0.4), {**shapes(), "text": (4, 9)})
    batch, generator = make_batch(), torch.Generator().manual_seed(1)
    words, lengths = 2.0 * torch.randn(ROWS, 4, 9, generator=generator) + 1.0, torch.arange(ROWS) % 4 + 1
    batch["text"] = words.masked_fill((torch.arange(4) >= lengths.unsqueeze(1)).unsqueeze(-1), 0.0)
    method.begin("warm_up", batches_of(batch))
    parts = seeded_loss(method.train(False), batch)
    rows = np.flatnonzero(batch["paired"].numpy())
    of_texts = [to_numpy(words[row, : lengths[row]]) for row in rows]
    every = np.concatenate(of_texts)
    first, _, last = method.text_encoder
    decoder, errors = method.text_decoder, {"rec_text": [], "words": []}
    v = method.image_encoder(method.image_scale(batch["image"]))
    crossed = to_numpy(method.cross(v, batch["paired"]))
    for row, own in zip(rows, of_texts, strict=True):
        x = (own - every.mean(0)) / every.std(0)
        latent = linear(relu(linear(x, first)).mean(0), last)
        for name, source in (("rec_text", latent), ("words", crossed[row])):
            found = [linear(relu(linear(source, decoder.first) + place), decoder.last) for place in to_numpy(decoder.places)]
            errors[name].append(np.mean([(a - b) ** 2 for a, b in zip(found, x, strict=False)]))
    for name, values in errors.items():
        assert parts[name].item() == pytest.approx(np.mean(values), rel=1e-4), name
    warm = 0.2 * (parts["rec"] + parts["rec_text"]) + 0.25 * parts["ce_text"]
    total = warm + parts["ce"] + 0.65 * parts["kl"] + 0.5 * parts["mse"] + 0.4 * (parts["cross"] + 2 * parts["words"])
    torch.testing.assert_close(parts["loss"], total)


def test_equal_branches_have_no_divergence_and_no_distance() -> None:
    """Where both latents are one, and both alignments, v_1 = t_1 and v_2 = t_2."""
    method, batch = fitted("atnet")
    method.image_alignment.load_state_dict(method.text_alignment.state_dict())
    method.image_encoder, method.text_encoder = nn.Identity(), nn.Identity()
    batch["text"] = batch["image"]
    method.text_scale.load_state_dict(method.image_scale.state_dict())
    parts = seeded_loss(method, batch)
    assert [parts["kl"].item(), parts["mse"].item()] == [pytest.approx(0.0, abs=1e-7), 0.0]


@pytest.mark.parametrize("part", ["kl", "mse", "cross"])
def test_the_text_is_a_teacher(part: str) -> None:
    method, batch = fitted("atnet")
    names = [name for name, _ in method.named_parameters()]
    gradients = torch.autograd.grad(seeded_loss(method, batch)[part], list(method.parameters()), allow_unused=True)
    moved = {name for name, gradient in zip(names, gradients, strict=True) if gradient is not None and gradient.any()}
    assert not any(name.startswith((*TEXT_BRANCH, "classifier.")) for name in moved)
    learner = "cross." if part == "cross" else "image_alignment."
    assert {name.split(".")[0] + "." for name in moved} == {"image_encoder.", learner}


def test_the_weight_of_the_divergence_is_the_published_one() -> None:
    """The published weight 1e4 belongs to a mean over the entries of 768 columns, ours to a mean over samples: /768, /20."""
    v, t = torch.randn(2, 9, 768, generator=torch.Generator().manual_seed(0))
    published = 1e4 * F.kl_div(v.log_softmax(1), t.softmax(1), reduction="none").mean()
    torch.testing.assert_close(published, 1e4 / 768 * distillation(v, t).mean())
    assert Config(width=2048).block == 768
    assert Config().w_kl == pytest.approx(1e4 / 768 / 20, rel=2e-3)


def test_the_cross_network_is_that_of_torch() -> None:
    torch.manual_seed(0)
    cross, x = CrossNetwork(6), torch.randn(12, 6)
    paired = (torch.arange(12) % 4 > 0).float()
    with torch.no_grad():
        for each in (*cross.gains, *cross.shifts):
            each.uniform_(0.5, 1.5)
    expected = x[paired > 0]
    for layer, gain, shift in zip(cross.layers, cross.gains, cross.shifts, strict=False):
        norm = nn.BatchNorm1d(6)
        norm.load_state_dict({**norm.state_dict(), "weight": gain, "bias": shift})
        expected = F.relu(norm(layer(expected)))
    torch.testing.assert_close(cross(x, paired)[paired > 0], cross.layers[-1](expected), atol=1e-5, rtol=1e-4)
    assert len(cross.layers) == 8


def test_a_prediction_reads_the_aligned_part_of_the_latent_alone() -> None:
    method, batch = fitted("atnet")
    before = method.predict(batch["image"], make_rng())
    with torch.no_grad():
        method.image_encoder.bias[method.block :] += 7.0
    assert torch.equal(method.predict(batch["image"], make_rng()), before)
    assert before.shape[0] == ROWS
    assert method.image_encoder.weight.shape == (16, WIDTH)
