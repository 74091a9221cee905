"""CDD: its kernels against a second implementation, its invariances, its flags, and the whole objective."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from helpers.method_cases import CLASSES, LABEL_KINDS, cross_entropy, fitted, make_batch, make_rng, seeded_loss, to_numpy
from scipy.spatial.distance import cdist
from torch import Tensor

from pipeline.methods.cdd import class_discrepancies, class_memberships, intra_inter
from pipeline.types import Batch, ClassStream

LABEL = torch.tensor([0, 0, 1, 1, 1, 2, 2])
MEMBER = torch.eye(3, dtype=torch.float64)[LABEL]


def normal(rows: int, width: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, width, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def discrepancy_by_hand(source: np.ndarray, target: np.ndarray) -> float:
    """The discrepancy of two sets of samples, one class each, pair by pair."""
    everything = np.concatenate([source, target])
    distances = cdist(everything, everything, "sqeuclidean")
    scale = distances.sum() / (len(everything) ** 2 - len(everything))

    def mean_kernel(first: np.ndarray, second: np.ndarray) -> float:
        ratio = cdist(first, second, "sqeuclidean")[..., None] / np.maximum(scale * 2.0 ** np.arange(-2, 3), 1e-5)
        return float(np.exp(-np.clip(ratio, 1e-5, 1e5)).sum(-1).mean())

    return mean_kernel(source, source) + mean_kernel(target, target) - 2 * mean_kernel(source, target)


def all_by_hand(source: np.ndarray, target: np.ndarray, label: np.ndarray, divisor: int | None = None) -> tuple[float, float]:
    """intra and inter of samples with these classes; classes with one sample are left out."""
    classes = [c for c in np.unique(label) if (label == c).sum() > 1]
    m = np.array([[discrepancy_by_hand(source[label == g], target[label == h]) for h in classes] for g in classes])
    count = divisor or len(classes)
    return float(np.trace(m)) / count, float(m.sum() - np.trace(m)) / (count * (count - 1))


def test_the_discrepancies_equal_a_second_implementation() -> None:
    source, target = normal(7, 4), normal(9, 4, seed=1) + 0.5
    target_label = torch.tensor([2, 1, 0, 0, 1, 2, 1, 0, 0])
    found = class_discrepancies(source, target, MEMBER, torch.eye(3, dtype=torch.float64)[target_label])
    for g in range(3):
        for h in range(3):
            expected = discrepancy_by_hand(to_numpy(source[g == LABEL]), to_numpy(target[target_label == h]))
            assert found[g, h].item() == pytest.approx(expected, abs=1e-10)


def test_equal_domains_have_no_distance_within_classes() -> None:
    x = normal(7, 4)
    m = class_discrepancies(x, x, MEMBER, MEMBER)
    intra, inter = intra_inter(m, torch.ones(3, dtype=torch.float64))
    assert (m > -1e-12).all()
    assert intra.item() == pytest.approx(0.0, abs=1e-12)
    assert inter > 0


def test_points_far_from_the_origin_are_compared_as_exactly_as_near_it() -> None:
    """Probabilities lie close together, far from the origin; |a|^2 + |b|^2 - 2ab alone would round their distances away."""
    source, target, member = 0.01 * normal(7, 16), 0.01 * normal(7, 16, 1), MEMBER.float()
    expected = class_discrepancies(source, target, MEMBER, MEMBER)
    found = class_discrepancies(10 + source.float(), 10 + target.float(), member, member)
    torch.testing.assert_close(found.double(), expected, atol=1e-3, rtol=0)


def test_a_derangement_of_well_separated_classes_is_seen() -> None:
    x = normal(7, 4) + 20.0 * torch.eye(4, dtype=torch.float64)[LABEL]
    deranged = MEMBER.roll(1, 1)  # the samples of a class have the name of another in the target
    intra, inter = intra_inter(class_discrepancies(x, x, MEMBER, deranged), torch.ones(3, dtype=torch.float64))
    assert intra > inter + 0.5


def test_a_common_factor_and_the_order_do_not_count() -> None:
    source, target, order = normal(7, 4), normal(7, 4, seed=1), torch.tensor([3, 1, 6, 0, 2, 5, 4])
    m = class_discrepancies(source, target, MEMBER, MEMBER)
    torch.testing.assert_close(class_discrepancies(30 * source, 30 * target, MEMBER, MEMBER), m)
    torch.testing.assert_close(class_discrepancies(source[order], target, MEMBER[order], MEMBER), m)


def test_single_samples_have_one_discrepancy_whatever_they_are_and_are_left_out() -> None:
    eye = torch.eye(3, dtype=torch.float64)
    m = class_discrepancies(normal(3, 4), normal(3, 4, seed=1), eye, eye)
    torch.testing.assert_close(m, torch.full_like(m, 6.186), atol=1e-3, rtol=0)
    member = class_memberships(torch.tensor([4, 7, 4, 9, 7, 7]), torch.tensor([1.0, 1, 1, 1, 1, 0]))
    assert member.T.tolist() == [[1, 0, 1, 0, 0, 0], [0, 1, 0, 0, 1, 0], [0, 0, 0, 0, 0, 0]]


def with_stream(batch: Batch) -> Batch:
    """Add a class stream: three classes, four samples each."""
    rows = torch.tensor([row for label in (0, 1, 4) for row in (batch["label"] == label).nonzero()[:4, 0].tolist()])
    drawn = {f"class_{key}": batch[key][rows] for key in ("image", "text", "label")}
    return {**batch, **drawn}


@pytest.mark.parametrize("has_stream", [True, False])
@pytest.mark.parametrize("normaliser", ["present", "all"])
def test_objective(normaliser: str, has_stream: bool) -> None:
    method, batch = fitted("cdd", text_width=10, w_cdd=0.7, w_ce_text=0.4, normaliser=normaliser)
    batch = with_stream(batch) if has_stream else batch
    label, rows = batch["label"], (batch["paired"] > 0).numpy()
    z_v = method.predict(batch["image"], make_rng())
    z_s = method.classifier(method.common.text(batch["text"], batch["paired"]))
    if has_stream:
        image, text, drawn = batch["class_image"], batch["class_text"], batch["class_label"].numpy()
    else:
        image, text, drawn = batch["image"][rows], batch["text"][rows], label.numpy()[rows]
    h = [method.common.text(text, torch.ones(len(text))), method.common.image(image)]
    layers = [[to_numpy(each) for each in pair] for pair in (h, [method.classifier(each).softmax(1) for each in h])]
    divisor = CLASSES if normaliser == "all" else None
    sides = [all_by_hand(source, target, drawn, divisor) for source, target in layers]
    cdd = sum(intra - inter for intra, inter in sides)
    parts = seeded_loss(method, batch)
    assert parts["cdd"].item() == pytest.approx(cdd, rel=1e-3, abs=1e-4)
    ce, ce_text = cross_entropy(z_v, label), cross_entropy(z_s, label, rows)
    assert parts["loss"].item() == pytest.approx(ce + 0.4 * ce_text + 0.7 * cdd, rel=1e-3)


def test_a_sample_with_several_labels_stands_for_one_of_them() -> None:
    method, batch = fitted("cdd", "multi")
    assert len({seeded_loss(method, batch, seed=seed)["cdd"].item() for seed in range(3)}) == 3
    single = (make_batch("single")["label"].unsqueeze(1) == torch.arange(CLASSES)).float()
    drawn = [seeded_loss(method, {**batch, "label": single}, seed=seed)["cdd"].item() for seed in range(2)]
    assert drawn[0] == drawn[1]  # nothing to choose from


@pytest.mark.parametrize("kind", LABEL_KINDS)
def test_the_discrepancy_reaches_both_projectors(kind: str) -> None:
    method, batch = fitted("cdd", kind)
    projectors = (method.common.image_projector, method.common.text_projector)
    for projector in projectors:
        (gradient, _) = torch.autograd.grad(seeded_loss(method, batch)["cdd"], list(projector.parameters()))
        assert gradient.abs().max() > 1e-5


def test_every_flag_changes_the_loss() -> None:
    flags: list[dict[str, Any]] = [{}, {"normaliser": "all"}, {"w_cdd": 0.6}]
    losses = []
    for changes in flags:
        method, batch = fitted("cdd", **changes)
        losses.append(seeded_loss(method, with_stream(batch))["loss"].item())
    assert len(set(losses)) == len(losses)


def test_the_stream_is_asked_for_alone_and_stacked() -> None:
    assert fitted("cdd", step_classes=4, class_samples=5)[0].class_stream == ClassStream(4, 5)
    stacked, _ = fitted("stacked", head="cdd", head_settings="width=16 step_classes=4")
    assert stacked.class_stream == ClassStream(4, 3)
    assert fitted("ema")[0].class_stream is None
