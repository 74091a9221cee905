"""Losses, compared with brute force, torch's own losses, closed forms and finite differences."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import get_args

import pytest
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from pipeline.nn import losses
from pipeline.nn.losses import LabelLoss, StructuralReduction

KINDS = get_args(LabelLoss)
CLASSES = 5
SINGLE = torch.tensor([0, 3, 3, 1, 0, 3, 4, 1])  # class 2 is absent
MULTI = torch.tensor([[1, 0, 0, 1, 0], [0, 1, 0, 0, 0], [1, 1, 0, 1, 0], [0, 0, 0, 0, 1]] * 2, dtype=torch.float32)
labels = pytest.mark.parametrize("label", [SINGLE, MULTI], ids=["single", "multi"])
reductions = pytest.mark.parametrize("reduction", ["mean", "literal"])


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def has_label(label: Tensor, i: int, c: int) -> bool:
    return bool(label[i] == c) if label.ndim == 1 else bool(label[i, c])


class TestClassification:
    @pytest.mark.parametrize("kind", KINDS)
    def test_one_label_is_cross_entropy(self, kind: LabelLoss) -> None:
        logits = normal(8, CLASSES)
        torch.testing.assert_close(losses.classification_loss(logits, SINGLE, kind), F.cross_entropy(logits, SINGLE))

    def test_several_labels_by_hand(self) -> None:
        logits = torch.tensor(
            [[0.0, math.log(3.0)], [0.0, 0.0]]
        )  # softmax [1/4, 3/4], [1/2, 1/2]; sigmoid [1/2, 3/4], [1/2, 1/2]
        label = torch.tensor([[1.0, 1.0], [0.0, 1.0]])
        log2, log4 = math.log(2), math.log(4)
        by_hand = {
            "softmax_kl": ((log4 + log4 - math.log(3)) / 2 + log2) / 2,
            "softmax_multihot": (log4 + log4 - math.log(3) + log2) / 2,
            "bce": ((log2 + log4 - math.log(3)) / 2 + log2) / 2,
        }
        for kind in KINDS:
            assert float(losses.classification_loss(logits, label, kind)) == pytest.approx(by_hand[kind], rel=1e-6)

    def test_softmax_kl_is_the_kl_divergence_from_the_normalised_labels_plus_their_entropy(self) -> None:
        logits, target = normal(8, CLASSES), MULTI / MULTI.sum(1, keepdim=True)
        entropy = torch.special.entr(target).sum(1).mean()
        expected = F.kl_div(F.log_softmax(logits, dim=1), target, reduction="batchmean") + entropy
        torch.testing.assert_close(losses.classification_loss(logits, MULTI, "softmax_kl"), expected)

    @pytest.mark.parametrize("kind", ["softmax_kl", "softmax_multihot"])
    def test_one_hot_rows_give_cross_entropy(self, kind: LabelLoss) -> None:
        logits, label = normal(8, CLASSES), F.one_hot(SINGLE, CLASSES).float()
        torch.testing.assert_close(losses.classification_loss(logits, label, kind), F.cross_entropy(logits, SINGLE))

    @labels
    @pytest.mark.parametrize("kind", KINDS)
    def test_rows_of_weight_0_are_ignored(self, kind: LabelLoss, label: Tensor) -> None:
        logits, weight = normal(8, CLASSES), torch.tensor([1.0, 1, 0, 1, 0, 0, 1, 1])
        rows = weight > 0
        expected = losses.classification_loss(logits[rows], label[rows], kind)
        torch.testing.assert_close(losses.classification_loss(logits, label, kind, weight), expected)

    def test_a_row_without_labels_has_gradient_0(self) -> None:
        logits = normal(2, CLASSES).requires_grad_()
        losses.classification_loss(logits, torch.zeros(2, CLASSES), "softmax_kl").backward()
        assert logits.grad is not None
        assert float(logits.grad.abs().max()) == 0.0


def test_weighted_mean() -> None:
    values = torch.tensor([1.0, 2.0, 6.0])
    assert float(losses.weighted_mean(values, torch.tensor([1.0, 1.0, 0.0]))) == 1.5
    assert float(losses.weighted_mean(values, torch.tensor([0.25, 0.25, 0.0]))) == 1.5
    assert float(losses.weighted_mean(values, torch.zeros(3))) == 0.0


class TestInfoNCE:
    def test_equals_the_sum_in_the_paper(self) -> None:
        a, b, tau = normal(6, 4), normal(6, 4, seed=1), 0.3
        cosine = [[math.exp(float(F.cosine_similarity(a[i], b[j], dim=0)) / tau) for j in range(6)] for i in range(6)]
        a2b = -sum(math.log(cosine[i][i] / sum(cosine[i])) for i in range(6)) / 6
        b2a = -sum(math.log(cosine[i][i] / sum(row[i] for row in cosine)) for i in range(6)) / 6
        ours = losses.info_nce(a, b, tau)
        assert (float(ours[0]), float(ours[1])) == (pytest.approx(a2b, rel=1e-5), pytest.approx(b2a, rel=1e-5))

    @pytest.mark.parametrize("rows", [1, 2, 64])
    def test_equal_rows_give_log_of_the_batch_size(self, rows: int) -> None:
        x = torch.ones(rows, 8)
        for loss in losses.info_nce(x, x, torch.tensor(0.07)):
            assert float(loss) == pytest.approx(math.log(rows), abs=1e-5)

    def test_a_single_pair_has_loss_0(self) -> None:
        assert [float(loss) for loss in losses.info_nce(normal(1, 8), normal(1, 8, seed=1), 0.07)] == [0.0, 0.0]

    def test_swapping_the_arguments_swaps_the_losses_and_lengths_do_not_matter(self) -> None:
        a, b = normal(6, 4), normal(6, 4, seed=1)
        a2b, b2a = losses.info_nce(a, b, 0.2)
        torch.testing.assert_close(losses.info_nce(b, a, 0.2), (b2a, a2b))
        lengths = torch.arange(1.0, 7.0).unsqueeze(1)
        torch.testing.assert_close(losses.info_nce(a * lengths, b * 9.0, 0.2), (a2b, b2a))

    def test_aligned_pairs_have_a_lower_loss_than_shuffled_ones(self) -> None:
        a = normal(16, 32)
        b = a + 0.1 * normal(16, 32, seed=1)
        assert sum(losses.info_nce(a, b, 0.07)) < 0.01 < 1.0 < sum(losses.info_nce(a, b.roll(1, 0), 0.07))

    def test_rows_of_weight_0_are_neither_anchors_nor_negatives(self) -> None:
        a, b, weight = normal(6, 4), normal(6, 4, seed=1), torch.tensor([1.0, 0, 1, 1, 0, 1])
        rows = weight > 0
        torch.testing.assert_close(losses.info_nce(a, b, 0.2, weight), losses.info_nce(a[rows], b[rows], 0.2))

    def test_without_a_pair_loss_and_gradient_are_0(self) -> None:
        a, b = normal(6, 4).requires_grad_(), torch.zeros(6, 4, requires_grad=True)
        a2b, b2a = losses.info_nce(a, b, 0.07, torch.zeros(6))
        (a2b + b2a).backward()
        assert (a2b.item(), b2a.item()) == (0.0, 0.0)
        assert a.grad is not None
        assert b.grad is not None
        assert float(a.grad.abs().max()) == float(b.grad.abs().max()) == 0.0


class TestClassSums:
    @labels
    def test_their_quotients_are_the_means_of_the_classes(self, label: Tensor) -> None:
        x = normal(8, 3)
        sums, count = losses.class_sums(x, label, CLASSES)
        for c in range(CLASSES):
            members = [x[i] for i in range(8) if has_label(label, i, c)]
            assert count[c] == len(members)
            torch.testing.assert_close(sums[c], torch.stack(members).sum(0) if members else torch.zeros(3))

    def test_rows_of_weight_0_are_ignored(self) -> None:
        x, weight = normal(8, 3), (SINGLE != 3).float()
        sums, count = losses.class_sums(x, SINGLE, CLASSES, weight)
        expected, expected_count = losses.class_sums(x[SINGLE != 3], SINGLE[SINGLE != 3], CLASSES)
        torch.testing.assert_close(sums, expected)
        assert torch.equal(count, expected_count)
        assert count[3] == 0


class TestStructuralConsistency:
    @labels
    @reductions
    def test_equals_the_sum_in_the_paper(self, label: Tensor, reduction: StructuralReduction) -> None:
        pred, x_v = normal(8, 3), normal(8, 3, seed=1)
        norms = []
        for c in range(CLASSES):
            rows = [i for i in range(8) if has_label(label, i, c)]
            if rows:
                norms.append(float((pred[rows].mean(0) - x_v[rows].mean(0)).norm()))
        absolute = float((pred - x_v).abs().sum())
        mean = sum(norms) / len(norms) / math.sqrt(3) + absolute / (8 * 3)
        expected = mean if reduction == "mean" else (sum(norms) + absolute) / 8
        assert float(losses.structural_consistency_loss(pred, x_v, label, CLASSES, None, reduction)) == pytest.approx(
            expected, rel=1e-5
        )

    def test_centres_of_the_training_split_replace_those_of_the_batch(self) -> None:
        pred, x_v, train_centres = normal(8, 3), normal(8, 3, seed=1), normal(CLASSES, 3, seed=2)
        norms = [float((pred[c == SINGLE].mean(0) - train_centres[c]).norm()) for c in (0, 1, 3, 4)]
        expected = sum(norms) / 4 / math.sqrt(3) + float((pred - x_v).abs().mean())
        assert float(losses.structural_consistency_loss(pred, x_v, SINGLE, CLASSES, train_centres)) == pytest.approx(
            expected, rel=1e-5
        )

    @labels
    @reductions
    def test_rows_of_weight_0_are_ignored(self, label: Tensor, reduction: StructuralReduction) -> None:
        pred, x_v, weight = normal(8, 3), normal(8, 3, seed=1), torch.tensor([1.0, 0, 0, 1, 0, 1, 1, 1])
        rows = weight > 0
        expected = losses.structural_consistency_loss(pred[rows], x_v[rows], label[rows], CLASSES, None, reduction)
        ours = losses.structural_consistency_loss(pred, x_v, label, CLASSES, None, reduction, weight)
        torch.testing.assert_close(ours, expected)
        assert float(losses.structural_consistency_loss(pred, x_v, label, CLASSES, None, reduction, torch.zeros(8))) == 0.0

    @reductions
    def test_the_visual_feature_itself_is_the_minimum_with_a_finite_gradient(self, reduction: StructuralReduction) -> None:
        x_v = normal(8, 3)
        pred = x_v.clone().requires_grad_()
        loss = losses.structural_consistency_loss(pred, x_v, SINGLE, CLASSES, None, reduction)
        loss.backward()
        assert loss.item() == pytest.approx(0.0, abs=2e-6)
        assert pred.grad is not None
        assert float(pred.grad.abs().max()) == 0.0

    def test_only_the_mean_reduction_does_not_depend_on_the_width(self) -> None:
        def loss(width: int, reduction: StructuralReduction) -> float:
            zero, x_v = torch.zeros(64, width), normal(64, width)
            return float(losses.structural_consistency_loss(zero, x_v, torch.arange(64), 64, None, reduction))

        assert loss(768, "mean") == pytest.approx(loss(48, "mean"), rel=0.05)
        assert loss(768, "mean") == pytest.approx(1 + math.sqrt(2 / math.pi), rel=0.02)
        assert loss(768, "literal") == pytest.approx(768 * math.sqrt(2 / math.pi) + math.sqrt(768), rel=0.02)


class TestMSE:
    def test_mean_equals_torch_and_sum_dim_is_d_times_that(self) -> None:
        pred, target = normal(8, 3), normal(8, 3, seed=1)
        torch.testing.assert_close(losses.mse_loss(pred, target), F.mse_loss(pred, target))
        torch.testing.assert_close(losses.mse_loss(pred, target, "sum_dim"), 3 * F.mse_loss(pred, target))

    def test_rows_of_weight_0_are_ignored(self) -> None:
        pred, target, weight = normal(8, 3), normal(8, 3, seed=1), torch.tensor([1.0, 0, 0, 1, 0, 1, 1, 1])
        rows = weight > 0
        torch.testing.assert_close(losses.mse_loss(pred, target, "mean", weight), F.mse_loss(pred[rows], target[rows]))


WEIGHT = torch.tensor([1.0, 0, 0.5, 1, 0, 1, 2, 1])
LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    **{f"single {kind}": lambda a, b, kind=kind: losses.classification_loss(a, SINGLE, kind, WEIGHT) for kind in KINDS[:1]},
    **{f"multi {kind}": lambda a, b, kind=kind: losses.classification_loss(a, MULTI, kind, WEIGHT) for kind in KINDS},
    "info_nce": lambda a, b: torch.stack(losses.info_nce(a, b, 0.2, WEIGHT)).sum(),
    "sc mean": lambda a, b: losses.structural_consistency_loss(a, b, SINGLE, CLASSES, None, "mean", WEIGHT),
    "sc literal": lambda a, b: losses.structural_consistency_loss(a, b, MULTI, CLASSES, None, "literal", WEIGHT),
    "sc given centres": lambda a, b: losses.structural_consistency_loss(a, b, SINGLE, CLASSES, b[:CLASSES]),
    "mse": lambda a, b: losses.mse_loss(a, b, "sum_dim", WEIGHT),
}


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_equal_finite_differences(name: str) -> None:
    a, b = (normal(8, CLASSES, seed=seed, dtype=torch.float64).requires_grad_() for seed in (0, 1))
    assert torch.autograd.gradcheck(LOSSES[name], (a, b))


@pytest.mark.parametrize("name", LOSSES)
def test_vmapped_losses_and_gradients_equal_a_loop(name: str) -> None:
    a, b = normal(3, 8, CLASSES), normal(3, 8, CLASSES, seed=1)
    run = torch.func.grad_and_value(LOSSES[name])
    gradients, values = torch.func.vmap(run)(a, b)
    for i in range(3):
        gradient, value = run(a[i], b[i])
        torch.testing.assert_close(values[i], value)
        torch.testing.assert_close(gradients[i], gradient, atol=1e-7, rtol=1e-4)


class TestSlicedWasserstein:
    """Closed forms; `directions` are normalised inside."""

    def test_order_does_not_count(self) -> None:
        x, directions = normal(20, 6), normal(6, 32, seed=1)
        assert losses.sliced_wasserstein(x, x, directions).item() == 0.0
        shuffled = x[torch.randperm(20, generator=torch.Generator().manual_seed(2))]
        assert losses.sliced_wasserstein(x, shuffled, directions).item() == pytest.approx(0.0, abs=1e-12)

    def test_a_shift_is_seen_through_its_projections(self) -> None:
        x, shift, directions = (
            normal(20, 6, dtype=torch.float64),
            normal(6, seed=1, dtype=torch.float64),
            normal(6, 128 * 50, seed=2, dtype=torch.float64),
        )
        units = directions / directions.norm(dim=0)
        found = losses.sliced_wasserstein(x, x + shift, directions)
        torch.testing.assert_close(found, (shift @ units).square().mean())
        assert found.item() == pytest.approx(shift.square().sum().item() / 6, rel=0.05)  # its expectation

    def test_on_a_line_it_is_the_squared_distance_of_sorted_values(self) -> None:
        x, y, direction = normal(20, 1), normal(20, 1, seed=1), torch.tensor([[-2.0]])
        torch.testing.assert_close(losses.sliced_wasserstein(x, x + 3.0, direction), torch.tensor(9.0))
        torch.testing.assert_close(losses.sliced_wasserstein(x, y, direction), (x.sort(0)[0] - y.sort(0)[0]).square().mean())

    def test_it_is_symmetric_and_scales_as_a_square(self) -> None:
        x, y, directions = normal(20, 6), normal(20, 6, seed=1), normal(6, 32, seed=2)
        found = losses.sliced_wasserstein(x, y, directions)
        torch.testing.assert_close(losses.sliced_wasserstein(y, x, directions), found)
        torch.testing.assert_close(losses.sliced_wasserstein(3.0 * x, 3.0 * y, directions), 9.0 * found)
        torch.testing.assert_close(losses.sliced_wasserstein(x, y, directions * torch.arange(1.0, 33.0)), found)

    def test_it_is_the_cheapest_assignment_on_each_direction(self) -> None:
        x, y, directions = normal(9, 4), normal(9, 4, seed=1), normal(4, 5, seed=2)
        expected = 0.0
        for direction in (directions / directions.norm(dim=0)).T:
            cost = ((x @ direction)[:, None] - (y @ direction)[None]).square().numpy()
            expected += cost[linear_sum_assignment(cost)].mean() / 5
        assert losses.sliced_wasserstein(x, y, directions).item() == pytest.approx(expected, rel=1e-5)

    def test_rows_of_weight_0_are_ignored(self) -> None:
        x, y, directions = normal(8, 4), normal(8, 4, seed=1), normal(4, 5, seed=2)
        weight = torch.tensor([1.0, 0, 1, 1, 0, 1, 1, 1])
        expected = losses.sliced_wasserstein(x[weight > 0], y[weight > 0], directions)
        y = torch.where(weight[:, None] > 0, y, 1e3).requires_grad_()
        found = losses.sliced_wasserstein(x, y, directions, weight)
        torch.testing.assert_close(found, expected)
        found.backward()
        assert y.grad is not None
        assert (y.grad.abs().sum(1) > 0).tolist() == (weight > 0).tolist()
        assert losses.sliced_wasserstein(x, y, directions, torch.zeros(8)).item() == 0.0


@labels
def test_the_same_labels_by_brute_force(label: Tensor) -> None:
    expected = [[torch.equal(first, second) for second in label] for first in label]
    assert losses.same_labels(label).tolist() == expected
