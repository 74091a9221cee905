"""CLIP, ITA and SWD, compared with EMA, with closed forms and with computations by hand in NumPy."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.method_cases import (
    CLASSES,
    LABEL_KINDS,
    ROWS,
    batches_of,
    cross_entropy,
    fitted,
    freeze,
    make_rng,
    seeded_loss,
    to_numpy,
)
from scipy.special import log_softmax, softmax
from torch import Tensor

from pipeline.nn.common_space import CommonSpace
from pipeline.runtime.runs import RunFolder
from pipeline.training.config import TrainConfig
from pipeline.training.loop import Trainer
from pipeline.training.state import TrainState
from pipeline.types import Phase

for_all_label_kinds = pytest.mark.parametrize("kind", LABEL_KINDS)


class GivenSpace(torch.nn.Module):
    """Stands for a common space: its features are the vectors of the batch as they are."""

    def image(self, x: Tensor) -> Tensor:
        return x

    def text(self, x: Tensor, paired: Tensor) -> Tensor:
        return x


def on_embeddings(name: str, image: Tensor, text: Tensor, **changes: Any) -> dict[str, Tensor]:
    """Return the parts of the loss of a method whose projections would be these vectors [B,16]."""
    method = fitted(name, **changes)[0]
    method.common = GivenSpace()
    label = torch.arange(len(image)) % CLASSES
    return seeded_loss(method, {"image": image, "text": text, "paired": torch.ones(len(image)), "label": label})


def text_kept(space: CommonSpace, batch: dict[str, Tensor]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return h_v and h_s of the samples that have a text, and which these are."""
    paired = batch["paired"].numpy() > 0
    return to_numpy(space.image(batch["image"]))[paired], to_numpy(space.text(batch["text"], batch["paired"]))[paired], paired


def contrast(a: np.ndarray, b: np.ndarray, tau: float) -> tuple[float, float]:
    a, b = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (a, b))
    return tuple(-np.diag(log_softmax(a @ b.T / tau, axis=axis)).mean() for axis in (1, 0))  # type: ignore[return-value]


class TestCLIP:
    @for_all_label_kinds
    def test_objective(self, kind: str) -> None:
        method, batch = fitted("clip", kind, text_width=10, tau=0.2, w_clip=1.3)
        h_v, h_s, _ = text_kept(method.common, batch)
        expected = sum(contrast(h_v, h_s, 0.2)) / 2
        parts = seeded_loss(method, batch)
        assert parts["clip"].item() == pytest.approx(expected, rel=1e-4)
        ce = cross_entropy(method.predict(batch["image"], make_rng()), batch["label"])
        assert parts["loss"].item() == pytest.approx(ce + 1.3 * expected, rel=1e-4)

    def test_a_projection_is_one_matrix(self) -> None:
        method, batch = fitted("clip")
        x = (to_numpy(batch["image"]) - to_numpy(batch["image"]).mean(0)) / to_numpy(batch["image"]).std(0)
        (weight,) = method.common.image_projector.parameters()
        np.testing.assert_allclose(to_numpy(method.feature(batch["image"], make_rng())), x @ to_numpy(weight).T, atol=1e-5)

    def test_equal_vectors_are_told_apart_by_chance_only(self) -> None:
        same = torch.ones(8, 16)
        assert on_embeddings("clip", same, same)["clip"].item() == pytest.approx(math.log(8), rel=1e-6)

    def test_lengths_do_not_count(self) -> None:
        image, text = torch.randn(2, 8, 16, generator=torch.Generator().manual_seed(0))
        lengths = torch.arange(1.0, 9.0).unsqueeze(1)
        losses = [on_embeddings("clip", image * a, text * b)["clip"] for a, b in ((1.0, 1.0), (lengths, lengths.flip(0)))]
        torch.testing.assert_close(*losses)

    def test_one_sample_has_no_negative(self) -> None:
        assert on_embeddings("clip", torch.ones(1, 16), -torch.ones(1, 16))["clip"].item() == 0.0

    def test_training_raises_the_scale_to_100_and_no_further(self, tmp_path: Path) -> None:
        """The pairs are aligned already, so that a higher scale always lowers the loss."""
        method, batch = fitted("clip", tau=0.2)
        method.common.text_projector.load_state_dict(method.common.image_projector.state_dict())
        batch["text"], batch["paired"] = batch["image"], torch.ones(ROWS)
        method.begin("head", batches_of(batch))
        freeze(method, Phase("head", ("similarity_scale",)))
        config = TrainConfig(lr=1.0)
        trainer, scales = Trainer([TrainState(method=method, run=RunFolder(tmp_path / "seed0", 0), config=config)]), [5.0]
        for _ in range(6):
            trainer.step(batch, "head")
            scales.append(method.similarity_scale().item())
        assert scales[0] < scales[1] < scales[2]
        assert max(scales) == pytest.approx(100, rel=1e-5)


class TestITA:
    @for_all_label_kinds
    def test_it_is_ema(self, kind: str) -> None:
        """Also in every gradient; they share no code but the loss."""
        (ita, batch), (ema, _) = (fitted(name, kind, text_width=10, tau=0.2, w_ita=1.3) for name in ("ita", "ema"))
        names = {
            f"{part}_projector.{kind}": f"common.{part}_projector.layer.{kind}"
            for part in ("image", "text")
            for kind in ("weight", "bias")
        }
        weights = {names.get(name, name): weight for name, weight in ema.named_parameters()}
        ita.load_state_dict({**ita.state_dict(), **weights})
        ours, theirs = (seeded_loss(method, batch) for method in (ita, ema))
        torch.testing.assert_close(ours, theirs)
        ours["loss"].backward()
        theirs["loss"].backward()
        for name, weight in ita.named_parameters():
            torch.testing.assert_close(weight.grad, weights[name].grad)
        image = batch["image"]
        torch.testing.assert_close(ita.predict(image, make_rng()), ema.predict(image, make_rng()))

    def test_equal_vectors_are_told_apart_by_chance_only(self) -> None:
        same = torch.ones(8, 16)
        assert on_embeddings("ita", same, same)["ita"].item() == pytest.approx(2 * math.log(8), rel=1e-6)

    def test_orthonormal_pairs(self) -> None:
        units = torch.eye(16)[:8]
        expected = 2 * math.log1p(7 * math.exp(-1 / 0.07))
        assert expected == pytest.approx(8.7e-6, rel=0.01)
        assert on_embeddings("ita", units, units)["ita"].item() == pytest.approx(expected, abs=1e-6)
        warm = on_embeddings("ita", units, units, tau=1.0)["ita"].item()
        assert warm == pytest.approx(2 * math.log1p(7 * math.exp(-1)), rel=1e-5)

    @for_all_label_kinds
    def test_samples_of_one_class_may_be_no_negatives(self, kind: str) -> None:
        method, batch = fitted("ita", kind, mask_same_class=True, tau=0.2)
        h_v, h_s, paired = text_kept(method.common, batch)
        label = batch["label"].numpy()[paired].reshape(len(h_v), -1)
        same = (label[:, None] == label[None]).all(2) & ~np.eye(len(h_v), dtype=bool)
        a, b = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (h_v, h_s))
        similarity = np.where(same, -np.inf, a @ b.T / 0.2)
        expected = -sum(np.diag(log_softmax(similarity, axis=axis)).mean() for axis in (0, 1))
        assert same.any()
        assert seeded_loss(method, batch)["ita"].item() == pytest.approx(expected, rel=1e-4)

    def test_the_native_projector_by_hand(self) -> None:
        """Training has the statistics of the batch, prediction those of the training split: the same rows here."""
        method, batch = fitted("ita", native=True)
        projector, paired = method.common.image_projector, batch["paired"].numpy() > 0
        with torch.no_grad():
            projector.gain.uniform_(0.5, 2.0)
            projector.shift.uniform_(-1.0, 1.0)

        def by_hand(modality: str, rows: np.ndarray) -> np.ndarray:
            raw, own = to_numpy(batch[modality])[rows], getattr(method.common, f"{modality}_projector")
            weights = {name: to_numpy(weight) for name, weight in own.named_parameters()}
            x = (raw - raw.mean(0)) / raw.std(0) @ weights["first.weight"].T
            x = (x - x.mean(0)) / np.sqrt(x.var(0) + 1e-5) * weights["gain"] + weights["shift"]
            return np.maximum(x, 0) @ weights["last.weight"].T + weights["last.bias"]

        h_v, h_s = by_hand("image", np.full(ROWS, True)), by_hand("text", paired)
        for mode in (True, False):
            assert method.train(mode)
            np.testing.assert_allclose(to_numpy(method.feature(batch["image"], make_rng())), h_v, atol=1e-3)
        a, b = ((x - x.mean(0)) / np.sqrt(x.var(0) + 1e-5) for x in (h_v, h_s))
        expected = sum(contrast(a[paired], b, 0.07))
        assert seeded_loss(method.train(), batch)["ita"].item() == pytest.approx(expected, rel=1e-3)

    @pytest.mark.parametrize("changes", [{"native": True}, {"mask_same_class": True}])
    def test_each_flag_changes_the_loss(self, changes: dict[str, Any]) -> None:
        losses = [seeded_loss(*fitted("ita", **each))["ita"].item() for each in ({}, changes)]
        assert abs(losses[0] - losses[1]) > 1e-3


class TestSWD:
    @for_all_label_kinds
    def test_objective(self, kind: str) -> None:
        method, batch = fitted("swd", kind, text_width=10, w_swd=1.3)
        h_v, h_s, paired = text_kept(method.common, batch)
        z_v, z_s = (
            x @ to_numpy(layer.weight).T + to_numpy(layer.bias)
            for x, layer in ((h_v, method.classifier), (h_s, method.text_classifier))
        )
        torch.manual_seed(0)
        directions = torch.randn(CLASSES, 8).numpy()
        directions = directions / np.linalg.norm(directions, axis=0)
        first, second = (np.sort(softmax(z, axis=1) @ directions, axis=0) for z in (z_v, z_s))
        expected = CLASSES * ((first - second) ** 2).mean()
        parts = seeded_loss(method, batch)
        assert parts["swd"].item() == pytest.approx(expected, rel=1e-3)
        ce = cross_entropy(method.predict(batch["image"], make_rng()), batch["label"])
        ce_text = cross_entropy(torch.from_numpy(z_s), batch["label"][torch.from_numpy(paired)])
        assert parts["loss"].item() == pytest.approx(ce + ce_text + 1.3 * expected, rel=1e-4)

    def test_equal_decisions_in_another_order_have_no_discrepancy(self) -> None:
        method, batch = fitted("swd")
        method.common.text_projector.load_state_dict(method.common.image_projector.state_dict())
        method.text_classifier.load_state_dict(method.classifier.state_dict())
        batch["text"], batch["paired"] = batch["image"].flip(0), torch.ones(ROWS)
        method.begin("head", batches_of(batch))
        assert seeded_loss(method, batch)["swd"].item() == pytest.approx(0.0, abs=1e-8)

    def test_a_detached_text_learns_from_its_labels_alone(self) -> None:
        for is_detached in (True, False):
            method, batch = fitted("swd", detach_text=is_detached)
            gradients = torch.autograd.grad(seeded_loss(method, batch)["swd"], list(method.parameters()), allow_unused=True)
            moved = {
                name.split(".")[1] if name.startswith("common") else name.split(".")[0]
                for (name, _), gradient in zip(method.named_parameters(), gradients, strict=True)
                if gradient is not None and gradient.any()
            }
            text = set() if is_detached else {"text_projector", "text_classifier"}
            assert moved == {"image_projector", "classifier"} | text

    def test_directions_are_fresh(self) -> None:
        method, batch = fitted("swd")
        assert seeded_loss(method, batch, seed=1)["swd"] != seeded_loss(method, batch, seed=2)["swd"]
