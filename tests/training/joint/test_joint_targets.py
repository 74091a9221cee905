"""Targets are data: a loss reaches the encoders through what the denoiser reads of them, and not through its target.

The oracle is the derivative of the losses' formulas, in NumPy, by central differences in float64: the encoder moves where the
denoiser reads its features, and a copy that does not move gives the target.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from helpers import joint_home
from helpers.method_cases import CLASSES, ROWS, WIDTH, fitted, seeded_loss, to_numpy
from torch import Tensor, nn

from pipeline.training.joint.model import JointMethod
from pipeline.types import Batch

STEP = 1e-6
ITEM = 6  # width of the items that the encoders read
# Settings that leave one loss against a target: L_SC against x_v, or L_MSE against x_s.
SC = {"stages": "dsl", "w_ce_dsl": 0.0, "w_sc": 1.0}
MSE = {"stages": "dst", "w_ce_dst": 0.0, "w_mse": 1.0}
CASES = [
    ("seda", SC, "image"),
    ("seda", {**SC, "sc_reduction": "literal"}, "image"),
    ("seda", {**SC, "centres": "train"}, "image"),
    ("seda", MSE, "text"),
    ("cdr", {"w_ce": 0.0, "w_mse": 1.0}, "text"),
    ("cdr", {"w_ce": 0.0, "w_mse": 1.0, "mse_reduction": "sum_dim"}, "text"),
]


class Scene:
    """A joint method on two linear encoders, in float64, and a batch for it."""

    def __init__(self, method: str, changes: dict[str, Any]) -> None:
        head, batch = fitted(method, **changes)
        self.head = head.double()
        self.changes = changes
        generator = torch.Generator().manual_seed(1)
        self.encoders = {key: nn.Linear(ITEM, WIDTH).double() for key in ("image", "text")}
        for encoder in self.encoders.values():
            nn.init.normal_(encoder.weight, generator=generator)
        items = {f"{key}_items": torch.randn(ROWS, ITEM, generator=generator, dtype=torch.float64) for key in self.encoders}
        doubles = {key: column.double() if column.is_floating_point() else column for key, column in batch.items()}
        self.batch: Batch = {**doubles, **items, "text_owner": torch.arange(ROWS)}
        self.model = JointMethod(self.head, self.encoders, dict(self.encoders), ("image.", "text."), (), joint_home.ALONE)
        self.outputs: list[Tensor] = []
        self.head.denoiser.register_forward_hook(lambda _module, _inputs, output: self.outputs.append(output))

    def output(self) -> np.ndarray:
        """Return what the denoiser predicts with the encoders as they are, always with the same steps and noise."""
        self.outputs.clear()
        with torch.no_grad():
            seeded_loss(self.model, self.batch, "joint")
        (output,) = self.outputs
        return to_numpy(output)

    def target(self, key: str) -> np.ndarray:
        """Return x_v or x_s of the encoders as they are."""
        with torch.no_grad():
            return to_numpy(getattr(self.head.space, key)(self.encoders[key](self.batch[f"{key}_items"])))

    def loss(self, output: np.ndarray, target: np.ndarray, key: str) -> float:
        """Return L_SC (SeDA eq. 6) or L_MSE (eq. 10, MARNet eq. 19) of a prediction and its target."""
        if key == "text":
            squares = (output - target)[self.batch["paired"].numpy() > 0] ** 2
            return float(
                (
                    squares.sum(axis=1) if getattr(self.head, "mse_reduction", "mean") == "sum_dim" else squares.mean(axis=1)
                ).mean()
            )
        label, distances = self.batch["label"].numpy(), []
        for each in range(CLASSES):
            centre = to_numpy(self.head.centres)[each] if self.head.has_train_centres else target[label == each].mean(axis=0)
            distances.append(np.linalg.norm(output[label == each].mean(axis=0) - centre))
        absolute = np.abs(output - target)
        if self.changes.get("sc_reduction") == "literal":
            return float((np.sum(distances) + absolute.sum()) / ROWS)
        return float(np.mean(distances) / np.sqrt(WIDTH) + absolute.mean())


@pytest.mark.parametrize(("method", "changes", "key"), CASES)
def test_no_gradient_reaches_an_encoder_through_a_target(method: str, changes: dict[str, Any], key: str) -> None:
    scene = Scene(method, changes)
    value = seeded_loss(scene.model, scene.batch, "joint")["loss"]
    value.backward()
    fixed = scene.target(key)
    assert value.item() == pytest.approx(scene.loss(scene.output(), fixed, key), rel=1e-6)
    slopes: dict[str, dict[str, float]] = {}
    for name, encoder in scene.encoders.items():
        weight = encoder.weight
        direction = torch.randn(weight.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
        values: dict[str, list[float]] = {"data": [], "moving": []}
        for sign in (1, -1):
            with torch.no_grad():
                weight += sign * STEP * direction
                output, moved = scene.output(), scene.target(key)
                weight -= sign * STEP * direction
            values["data"].append(scene.loss(output, fixed, key))
            values["moving"].append(scene.loss(output, moved, key))
        slopes[name] = {kind: (above - below) / (2 * STEP) for kind, (above, below) in values.items()}
        assert weight.grad is not None
        slopes[name]["ours"] = float((weight.grad * direction).sum())
    for slope in slopes.values():  # what the denoiser reads has its gradient: the image as condition, the noisy text as input
        assert slope["ours"] == pytest.approx(slope["data"], rel=1e-4)
        assert abs(slope["ours"]) > 1e-6
    assert abs(slopes[key]["moving"] - slopes[key]["data"]) > 0.1 * abs(slopes[key]["data"])  # the target's part would be seen
