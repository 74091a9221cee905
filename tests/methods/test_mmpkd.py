"""MM-PKD: the teacher's formula, the student's closed forms, and what may have a gradient."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from helpers.method_cases import LABEL_KINDS, cross_entropy, fitted, make_rng, seeded_loss, to_numpy
from scipy.spatial.distance import cosine
from torch import Tensor

from pipeline.methods.mmpkd import cosine_distance
from pipeline.training.heads import resolve_head_settings


def with_embedding(method: Any, batch: dict[str, Tensor], sign: float) -> None:
    """Let the teacher's embedding be that of the student, times a sign, and let the student learn from all of it."""
    e_s = method.embed(batch["image"]).detach()
    method.teach = lambda _: (sign * e_s, torch.zeros(len(e_s)))


@pytest.mark.parametrize("kind", LABEL_KINDS)
@pytest.mark.parametrize("flag", ["sample", "flat"])
def test_the_loss_at_the_teacher_and_opposite_to_it(flag: str, kind: str) -> None:
    method, batch = fitted("mmpkd", kind, w_kd=0.3, cosine=flag)
    ce = cross_entropy(method.predict(batch["image"], make_rng()), batch["label"])
    for sign, distance in ((1.0, 0.0), (-1.0, 2.0)):
        with_embedding(method, batch, sign)
        parts = seeded_loss(method, batch)
        assert parts["kd"].item() == pytest.approx(distance, abs=1e-5)
        assert parts["loss"].item() == pytest.approx(0.7 * ce + 0.3 * distance, rel=1e-5)


def test_the_distance_equals_scipy_s() -> None:
    a, b = torch.randn(2, 6, 5, generator=torch.Generator().manual_seed(0))
    share, weight = torch.tensor([1.0, 0, 1, 1, 0, 1]), torch.tensor([1.0, 1, 0, 1, 1, 1])
    used = [0, 3, 5]
    expected = sum(cosine(a[i].numpy(), b[i].numpy()) for i in used) / 5
    assert cosine_distance(a, b, share, weight, False).item() == pytest.approx(expected, rel=1e-5)
    flat = cosine(a[used].flatten().numpy(), b[used].flatten().numpy()) * 3 / 5
    assert cosine_distance(a, b, share, weight, True).item() == pytest.approx(flat, rel=1e-5)
    assert cosine_distance(a, b, 0 * share, weight, True).item() == 0


def test_no_gradient_reaches_the_teacher_and_the_guard_is_per_sample() -> None:
    method, batch = fitted("mmpkd")
    parts = seeded_loss(method, batch)
    gradients = torch.autograd.grad(parts["loss"], list(method.teacher.parameters()), allow_unused=True)
    assert all(gradient is None for gradient in gradients)
    paired = batch["paired"] > 0
    with torch.no_grad():
        e_t, ce_t = method.teach(batch)
        e_s = method.embed(batch["image"])
        ce_s = torch.nn.functional.cross_entropy(method.classifier(e_s), batch["label"], reduction="none")
    learns = (ce_t < ce_s) & paired
    assert 0 < learns.sum() < paired.sum()
    expected = sum(cosine(to_numpy(e_t[i]), to_numpy(e_s[i])) for i in learns.nonzero()[:, 0].tolist()) / float(paired.sum())
    assert parts["kd"].item() == pytest.approx(expected, rel=1e-4)


def test_joint_cross_attention_equals_its_formula() -> None:
    method, _ = fitted("mmpkd")
    attend = method.teacher.attentions[0]
    h, other = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0))
    joint = torch.cat([h, other], dim=1)
    with torch.no_grad():
        attend.affinity.fill_(0.7)
    weights = (attend.own.weight, attend.correlated.weight, attend.out.weight)
    own, correlated, out = (to_numpy(weight) for weight in weights)
    for row in range(3):
        h_i, j_i = to_numpy(h[row]), to_numpy(joint[row])
        c = np.tanh(0.7 * np.outer(h_i, j_i) / 4)
        expected = np.maximum(np.outer(h_i, own[:, 0]) + c @ correlated.T, 0) @ out[0] + h_i
        np.testing.assert_allclose(to_numpy(attend(h, joint))[row], expected, atol=1e-5)


def test_every_flag_changes_the_loss() -> None:
    flags: list[dict[str, Any]] = [{}, {"teacher": "concat"}, {"cosine": "flat"}, {"guard": False}]
    losses = [seeded_loss(*fitted("mmpkd", **changes))["loss"].item() for changes in flags]
    assert len(set(losses)) == len(losses)


def test_the_paper_s_width() -> None:
    settings, _ = resolve_head_settings("openmoji", "mmpkd", "paper", {}, {})
    assert (settings.width, settings.teacher_width) == (128, 128)
