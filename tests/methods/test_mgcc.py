"""MGCC: its four similarities, written a second time in NumPy pair by pair, their closed forms, and its loss."""

from __future__ import annotations

import weakref
from typing import Any, cast

import numpy as np
import pytest
import torch
from helpers.method_cases import CLASSES, LABEL_KINDS, ROWS, cross_entropy, fitted, make_rng, seeded_loss, to_numpy
from scipy.special import log_softmax, softmax
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pipeline.methods import mgcc
from pipeline.methods.mgcc import GranularSimilarities
from pipeline.nn.losses import info_nce
from pipeline.training.capacity import bytes_per_method

T = 0.3  # of the weights of tokens


def units(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.nn.functional.normalize(torch.randn(*shape, generator=generator), dim=-1)


def weighted(x: np.ndarray, matrix: np.ndarray) -> float:
    return float((softmax(x / T) @ matrix) @ x)


def four(layer: Any, image: np.ndarray, text: np.ndarray, patches: np.ndarray, words: np.ndarray) -> list[float]:
    """Return the four similarities of one image and one text."""
    matrix = {name: to_numpy(value) for name, value in layer.named_parameters()}
    for name in ("image_words.matrix", "words_first.matrix", "words_last.matrix"):
        matrix[name] = matrix[name][: len(words), : len(words)]
    image_words = weighted(np.array([image @ w for w in words]), matrix["image_words.matrix"])
    patches_text = weighted(np.array([p @ text for p in patches]), matrix["patches_text.matrix"])
    tokens = np.array([[p @ matrix["of_tokens"] @ w for w in words] for p in patches])
    of_words = np.array([weighted(column, matrix["patches_first.matrix"]) for column in tokens.T])
    of_patches = np.array([weighted(row, matrix["words_first.matrix"]) for row in tokens])
    both = weighted(of_words, matrix["words_last.matrix"]), weighted(of_patches, matrix["patches_last.matrix"])
    return [float(image @ matrix["of_vectors"] @ text), image_words, patches_text, sum(both) / 2]


@pytest.mark.parametrize("lengths", [(4, 4, 4, 4, 4), (1, 4, 2, 3, 4)])
def test_the_four_similarities(lengths: tuple[int, ...]) -> None:
    """What stands behind the last word of a text changes nothing."""
    layer = GranularSimilarities(6, 3, 4, has_matrices=True)
    with torch.no_grad():
        for number, weight in enumerate(layer.parameters()):
            weight.add_(0.3 * units(*weight.shape, seed=number))
    parts = units(5, 6), units(5, 6, seed=1), units(5, 3, 6, seed=2), units(5, 4, 6, seed=3)
    image, text, patches, words = map(to_numpy, parts)
    of_texts = [each[:length] for each, length in zip(words, lengths, strict=True)]
    expected = [[four(layer, image[i], text[j], patches[i], of_texts[j]) for j in range(5)] for i in range(5)]
    is_word = torch.arange(4) < torch.tensor(lengths).unsqueeze(1)
    found = layer(*parts, T, None if is_word.all() else is_word)
    np.testing.assert_allclose(np.moveaxis(to_numpy(found), 0, 2), expected, atol=1e-5)


@pytest.mark.parametrize("has_matrices", [False, True])
def test_many_pairs_of_tokens_are_compared_in_parts(monkeypatch: pytest.MonkeyPatch, has_matrices: bool) -> None:
    """Values and gradients are those of one piece, alone and in an ensemble, and the gradient needs less memory."""
    layers = [GranularSimilarities(6, 7, 9, has_matrices) for _ in range(2)]
    with torch.no_grad():
        for number, weight in enumerate(weight for layer in layers for weight in layer.parameters()):
            weight.add_(0.3 * units(*weight.shape, seed=number))
    weights = [list(layer.parameters()) for layer in layers]
    stacked = torch.func.stack_module_state(cast(list[nn.Module], layers))[0]
    inputs = [units(*shape, seed=20 + len(shape)).requires_grad_() for shape in ((5, 6), (5, 6), (5, 7, 6), (5, 9, 6))]
    of_models, weight = torch.tensor([[9, 1, 4, 9, 7], [2, 9, 9, 3, 5]]), units(4, 5, 5, seed=30)
    are_words = torch.arange(9) < of_models.unsqueeze(2)  # models of other seeds read other texts
    taus = torch.tensor([T, 0.1])

    def ensemble(own: dict[str, Tensor], tau: Tensor, is_word: Tensor) -> Tensor:
        return torch.func.functional_call(layers[0], own, (*inputs, tau, is_word))

    def outcome() -> tuple[list[Tensor], int]:
        kept: dict[int, int] = {}
        with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.update({x.data_ptr(): x.nbytes}) or x, lambda x: x):
            found = [layer(*inputs, *more) for layer, *more in zip(layers, taus, are_words, strict=True)]
        both = torch.vmap(ensemble)(stacked, taus, are_words)
        torch.testing.assert_close(both, torch.stack(found))
        gradients = [
            torch.autograd.grad((weight * each).sum(), [*inputs, *own]) for each, own in zip(found, weights, strict=True)
        ]
        of_both = torch.autograd.grad((weight * both).sum(), [*inputs, *stacked.values()])
        return [*found, *gradients[0], *gradients[1], *of_both], sum(kept.values())

    expected, bytes_at_once = outcome()
    monkeypatch.setattr(mgcc, "MAX_TOKEN_PAIRS", 2 * 5 * 7 * 9)
    monkeypatch.setattr(mgcc, "PART_TOKEN_PAIRS", 2 * 5 * 7 * 9)  # two images at a time, and then one
    found, num_bytes = outcome()
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert num_bytes < bytes_at_once / 3


def test_the_memory_of_parts_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two parts, one is in memory at a time, and as much again for its gradients: together as much as both at once."""
    method, batch = fitted("mgcc", width=64, num_tokens=16)
    num_pairs = len(batch["key"]) ** 2 * 16 * 16

    def counted(at_once: int, in_part: int) -> int:
        monkeypatch.setattr(mgcc, "MAX_TOKEN_PAIRS", at_once)
        monkeypatch.setattr(mgcc, "PART_TOKEN_PAIRS", in_part)
        return bytes_per_method(method, batch, len(batch["key"]))

    whole = counted(num_pairs, num_pairs)
    assert counted(num_pairs - 1, num_pairs // 2) == pytest.approx(whole, rel=0.05)
    assert counted(num_pairs - 1, num_pairs // 8) < whole / 2


class PeakMemory(TorchDispatchMode):
    """Adds up the storages that are alive, and keeps the largest sum."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[int, int] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for storage in (each.untyped_storage() for each in tree_leaves(result) if isinstance(each, Tensor)):
            if storage.data_ptr() not in self.alive:
                self.alive[storage.data_ptr()] = storage.nbytes()
                weakref.finalize(storage, self.alive.pop, storage.data_ptr(), None)
        self.peak = max(self.peak, sum(self.alive.values()))
        return result


def test_parts_need_less_memory_than_one_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step of 64 images of 49 patches and texts of 32 words."""
    layer = GranularSimilarities(64, 49, 32, has_matrices=True)
    inputs = [units(64, *shape, 64, seed=number).requires_grad_() for number, shape in enumerate([(), (), (49,), (32,)])]

    def peak() -> int:
        with PeakMemory() as memory:
            layer(*inputs, T).square().sum().backward()
        return memory.peak

    in_parts = peak()
    monkeypatch.setattr(mgcc, "MAX_TOKEN_PAIRS", 2**30)
    assert in_parts < peak() / 2


@pytest.mark.parametrize("kind", LABEL_KINDS)
def test_objective(kind: str) -> None:
    method, batch = fitted("mgcc", kind, text_width=10, tau=0.2, tau_tokens=T, w_mgcc=1.3)
    batch = {key: column[:16] for key, column in batch.items()}
    h_v = to_numpy(method.common.image(batch["image"]))
    h_s = to_numpy(method.common.text(batch["text"], batch["paired"]))
    pairs = np.flatnonzero(batch["paired"].numpy())

    def tokens(chunks: Any, h: np.ndarray) -> list[np.ndarray]:
        rows = zip(np.split(h, 4), to_numpy(chunks.weight), to_numpy(chunks.bias), strict=True)
        return [h, *(chunk @ weight + bias for chunk, weight, bias in rows)]

    sides = ((method.image_tokens, h_v), (method.text_tokens, h_s))
    image, text = ([[t / np.linalg.norm(t) for t in tokens(chunks, h[i])] for i in pairs] for chunks, h in sides)
    mean = [[np.mean(four(method.similarities, v[0], s[0], np.array(v[1:]), np.array(s[1:]))) for s in text] for v in image]
    contrast = -sum(np.diag(log_softmax(np.array(mean) / 0.2, axis=axis)).mean() for axis in (0, 1)) / 2
    parts = seeded_loss(method, batch)
    assert parts["mgcc"].item() == pytest.approx(contrast, rel=1e-4)
    ce = cross_entropy(method.predict(batch["image"], make_rng()), batch["label"])
    assert parts["loss"].item() == pytest.approx(ce + 1.3 * contrast, rel=1e-4)


def test_with_one_token_it_is_clip() -> None:
    method, batch = fitted("mgcc", num_tokens=1, tau=0.2)
    with torch.no_grad():
        for chunks in (method.image_tokens, method.text_tokens):
            chunks.weight.copy_(torch.eye(16))
            chunks.bias.zero_()
    h_v, h_s = method.common.image(batch["image"]), method.common.text(batch["text"], batch["paired"])
    expected = sum(info_nce(h_v, h_s, 0.2, batch["paired"])) / 2
    torch.testing.assert_close(seeded_loss(method, batch)["mgcc"], expected)


@pytest.mark.parametrize(("twice", "tau"), [([0, 0, 1, 1, 2, 2], T), ([0, 1, 2, 2], 0.01)])
def test_a_duplicated_token_changes_nothing(twice: list[int], tau: float) -> None:
    """All tokens twice: never; the nearest one twice: not at a small temperature, which gives it all the weight."""
    image, text = units(1, 6), units(1, 6, seed=1)
    patches, words = (torch.stack([units(6, seed=2), -near[0], near[0]])[None] for near in (text, image))
    layers = [GranularSimilarities(6, number, number, has_matrices=False) for number in (3, len(twice))]
    once, again = layers[0](image, text, patches, words, tau), layers[1](image, text, patches[:, twice], words[:, twice], tau)
    torch.testing.assert_close(again[:3], once[:3], atol=1e-6, rtol=0)


@pytest.mark.parametrize("has_matrices", [False, True])
def test_equal_unit_tokens_have_similarity_1(has_matrices: bool) -> None:
    u = units(1, 6)
    found = GranularSimilarities(6, 3, 4, has_matrices)(
        u.expand(2, 6), u.expand(2, 6), u.expand(2, 3, 6), u.expand(2, 4, 6), 0.01
    )
    torch.testing.assert_close(found, torch.ones(4, 2, 2))


def test_every_flag_changes_the_loss() -> None:
    """The matrices are identities at first; so they count after a step."""
    flags: list[dict[str, Any]] = [{}, {"matrices": False}, {"tau_tokens": 0.1}, {"tau": 0.2}, {"num_tokens": 2}, {"w_mgcc": 2}]
    losses = []
    for changes in flags:
        method, batch = fitted("mgcc", **changes)
        with torch.no_grad():
            for name, weight in method.similarities.named_parameters():
                weight.add_(0.3 * units(*weight.shape, seed=len(name)))
        losses.append(seeded_loss(method, batch)["loss"].item())
    assert len(set(losses)) == len(losses)
    plain = [seeded_loss(*fitted("mgcc", matrices=flag))["loss"] for flag in (False, True)]
    torch.testing.assert_close(*plain)


def test_prediction_needs_no_tokens() -> None:
    method, batch = fitted("mgcc")
    logits: Tensor = method.predict(batch["image"], make_rng())
    logits.sum().backward()
    assert logits.shape == (ROWS, CLASSES)
    read = {name.rpartition(".")[0] for name, weight in method.named_parameters() if weight.grad is not None}
    assert read == {"common.image_projector.layer", "classifier"}
