"""Heads on caches of image tokens: what they compute of them, and a run from the cache to metrics."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.method_cases import ROWS, batches_of, make_batch, make_rng, seeded_loss, settings, shapes, to_numpy
from helpers.tiny_heads import FAST_TRAINING, caches_by_key, extract_tokens, small_settings

from pipeline.evaluation.evaluate import evaluate
from pipeline.nn.tokens import PatchTokens
from pipeline.runtime import plugins
from pipeline.runtime.errors import UserError
from pipeline.training.ensemble import ModelEnsemble
from pipeline.training.heads import plan_head, resolve_head_settings, train_head
from pipeline.types import Batch

METHODS = [name for name in plugins.names("methods") if getattr(plugins.get("methods", name), "reads_tokens", False)]
PATCHES, PATCH_WIDTH = 5, 7


def fitted_on_tokens(name: str, seed: int = 0) -> tuple[Any, Batch]:
    """Return a head with statistics, in evaluation mode, and a batch whose images are tokens."""
    torch.manual_seed(seed)
    method = plugins.get("methods", name)(settings(name), {**shapes(), "image": (PATCHES, PATCH_WIDTH)})
    image = 3.0 * torch.randn(ROWS, PATCHES, PATCH_WIDTH, generator=torch.Generator().manual_seed(0)) + 1.0
    batch = {**make_batch(), "image": image}
    for phase in method.phases:
        method.begin(phase.name, batches_of(batch))
    return method.train(False), batch


def test_patch_tokens_are_standardised_and_mapped() -> None:
    layer, x = PatchTokens(PATCH_WIDTH, 4, "per_dim"), 3.0 * torch.randn(6, PATCHES, PATCH_WIDTH) + 1.0
    layer.fit(iter([x[:4], x[4:]]))
    rows = to_numpy(x).reshape(-1, PATCH_WIDTH)
    expected = (rows - rows.mean(0)) / rows.std(0) @ to_numpy(layer.layer.weight).T + to_numpy(layer.layer.bias)
    np.testing.assert_allclose(to_numpy(layer(x)).reshape(-1, 4), expected, atol=1e-5)


def test_some_methods_read_tokens() -> None:
    assert {"team", "mgcc", "momke"} <= set(METHODS)


@pytest.mark.parametrize("name", METHODS)
def test_patches_count_and_have_no_order(name: str) -> None:
    """Their positions are part of their encoder's features."""
    method, batch = fitted_on_tokens(name)
    image = batch["image"]
    images = image, image.roll(1, dims=1), image + torch.tensor([1.0, -1.0, 0, 0, 0]).unsqueeze(1)  # the mean stays
    learned: set[str] = set()
    for phase in method.phases:
        losses = [seeded_loss(method, {**batch, "image": each}, phase.name)["loss"] for each in images]
        torch.testing.assert_close(losses[1], losses[0])
        assert (losses[2] - losses[0]).abs() > 1e-4
        losses[0].backward()
        learned |= {name for name, weight in method.named_parameters() if weight.grad is not None}
    assert learned == {name for name, _ in method.named_parameters()}
    logits = [method.predict(each, make_rng()) for each in (images[0], images[1], images[0][:3])]
    torch.testing.assert_close(logits[1], logits[0])
    torch.testing.assert_close(logits[2], logits[0][:3], atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["team", "mgcc"])
def test_the_prediction_is_that_of_the_mean_patch(name: str) -> None:
    method, batch = fitted_on_tokens(name)
    image = batch["image"]
    torch.testing.assert_close(method.predict(image, make_rng()), method.predict(image.mean(1), make_rng()))


@pytest.mark.parametrize("name", METHODS)
def test_an_ensemble_on_tokens_equals_its_models(name: str) -> None:
    models = [fitted_on_tokens(name, seed)[0] for seed in (0, 1)]
    _, batch = fitted_on_tokens(name)
    phases = [phase.name for phase in models[0].phases]
    alone = [[seeded_loss(model, batch, phase)["loss"] for model in models] for phase in phases]
    ensemble = ModelEnsemble(models)
    for phase, losses in zip(phases, alone, strict=True):
        torch.testing.assert_close(seeded_loss(ensemble, batch, phase)["loss"], torch.stack(losses))


@pytest.mark.parametrize("name", METHODS)
def test_tokens_of_texts_are_refused(name: str) -> None:
    with pytest.raises(UserError, match="the text features are tokens, 3×16 of each text; this method reads one vector"):
        plugins.get("methods", name)(settings(name), {**shapes(), "text": (3, 16)})


@pytest.mark.parametrize("name", METHODS)
def test_a_run_from_a_cache_of_tokens(name: str, tiny_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = Path(shutil.copytree(tiny_home, tmp_path / "home"))
    caches = {**caches_by_key(home), "image": extract_tokens(home, monkeypatch).name}
    config, training = resolve_head_settings("tiny", name, "head", small_settings(name), FAST_TRAINING)
    run = train_head(plan_head(home, "tiny", name, config, training, 0, caches), progress=False)
    assert 0.0 <= evaluate(home, run, "val", {})["metrics"]["acc1"] <= 100.0
