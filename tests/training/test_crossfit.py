"""MARNet's fusion out of fold: what a sample's features depend on, and that runs with it keep the promises of all runs."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.method_cases import (
    CLASSES,
    ROWS,
    batches_of,
    build,
    cross_entropy,
    fitted,
    make_batch,
    make_rng,
    seeded_loss,
    settings,
    to_numpy,
)
from helpers.tiny_heads import FAST_TRAINING, caches_by_key, small_settings
from safetensors.torch import load_file
from torch import Tensor

from pipeline.evaluation.evaluate import evaluate
from pipeline.methods.marnet import FEATURE_FUSIONS, MARNet, fold_of
from pipeline.runtime.errors import UserError
from pipeline.runtime.rng import KeyedRNG
from pipeline.runtime.runs import RunFolder
from pipeline.training import loop
from pipeline.training.config import TrainConfig
from pipeline.training.heads import HeadPlan, plan_head, resolve_head_settings, train_head, train_heads
from pipeline.training.seeds import Feed
from pipeline.training.state import Score, TrainState
from pipeline.training.train import train
from pipeline.types import Batch

K = 3


def trained(folder: Path, batch: Batch, crossfit: int = K) -> Any:
    """A MARNet trained on a batch in the loop of stage 2: two epochs of every phase, in shuffled batches of sixteen samples."""
    method = build("marnet", crossfit=crossfit)

    def source(epoch: int) -> Iterator[Batch]:
        order = torch.randperm(ROWS, generator=torch.Generator().manual_seed(epoch))
        for rows in order.split(16):
            yield {key: column[rows] for key, column in batch.items()}

    state = TrainState(
        method=method,
        run=RunFolder(folder / "marnet-0" / "seed0", 0),
        config=TrainConfig(epochs=2, lr=1e-2, grad_clip=0.1, select="last"),  # every step is clipped
    )
    assert not train([state], {0: Feed(source, batches_of(batch))}, lambda model, seeds: [Score(0.0, 0.0)], progress=False)
    return method.train(False)


def sampled(method: MARNet, batch: Batch) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return method.sample_features(batch)


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return trained(tmp_path_factory.mktemp("clean"), make_batch())


@pytest.mark.parametrize("changed", ["label", "text", "paired", "label and text"])
def test_features_of_a_sample_do_not_depend_on_its_label_and_text(changed: str, clean: Any, tmp_path: Path) -> None:
    """Those of the branches that are trained on everything do, and so do those of samples of other folds."""
    batch, sample = make_batch(), 5
    poisoned = {key: column.clone() for key, column in batch.items()}
    if "label" in changed:
        poisoned["label"][sample] = (batch["label"][sample] + 2) % CLASSES
    if "text" in changed:
        poisoned["text"][sample] = 50.0
    if changed == "paired":
        poisoned["paired"][sample] = 0.0
    dirty = trained(tmp_path, poisoned)
    fold = fold_of(batch["key"], K)
    assert fold.bincount(minlength=K).min() > 0
    for ours, theirs in zip(sampled(clean, batch), sampled(dirty, poisoned), strict=True):
        is_equal = (ours == theirs).all(dim=1)
        assert torch.equal(is_equal, fold == fold[sample])  # bit for bit in its fold, and in no other
    image, rng = batch["image"], make_rng()
    assert not torch.equal(clean.ema.feature(image, rng)[sample], dirty.ema.feature(image, rng)[sample])
    assert not torch.equal(clean.cdr.feature(image, rng)[sample], dirty.cdr.feature(image, rng)[sample])


def test_each_sample_has_the_features_of_its_fold() -> None:
    model, batch = fitted("marnet", crossfit=K)
    with torch.no_grad():
        for parameter in model.folds.parameters():
            parameter += torch.randn_like(parameter)  # all pairs start from the same weights
    f_e, f_c = sampled(model, batch)
    torch.manual_seed(0)
    rng = KeyedRNG.drawn(ROWS, batch["image"].device)
    for row in range(ROWS):
        fold = int(batch["key"][row]) % K
        expected = [model.folds[f"{name}_fold{fold}"].feature(batch["image"], rng)[row] for name in ("ema", "cdr")]
        torch.testing.assert_close([f_e[row], f_c[row]], expected)
    losses = seeded_loss(model, batch, "fusion")
    expected = [cross_entropy(model.fusions[kind](f_e, f_c), batch["label"]) for kind in FEATURE_FUSIONS]
    assert [losses[kind].item() for kind in FEATURE_FUSIONS] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("fold", range(K))
def test_a_branch_learns_from_the_samples_outside_of_its_fold(fold: int) -> None:
    model, batch = fitted("marnet", crossfit=K)
    kept = np.array([int(key) % K for key in batch["key"]]) != fold
    subset = {key: column[torch.from_numpy(kept)] for key, column in batch.items()}
    ema, cdr = model.folds[f"ema_fold{fold}"], model.folds[f"cdr_fold{fold}"]
    torch.testing.assert_close(seeded_loss(model, batch, f"ema_fold{fold}"), seeded_loss(ema, subset, "ema"))
    torch.manual_seed(0)
    x_0, x_s, _ = cdr.predict_one_step(batch)
    has_text = kept & (batch["paired"].numpy() > 0)
    parts = seeded_loss(model, batch, f"cdr_fold{fold}")
    assert parts["mse"].item() == pytest.approx(((to_numpy(x_0) - to_numpy(x_s)) ** 2)[has_text].mean(), rel=1e-5)
    assert parts["ce"].item() == pytest.approx(cross_entropy(cdr.classifier(x_0), batch["label"], kept), rel=1e-5)
    np.testing.assert_allclose(to_numpy(ema.image_scale.mean), to_numpy(batch["image"])[kept].mean(axis=0), rtol=1e-5)
    for text_scale in (ema.text_scale, cdr.space.text_scale):
        np.testing.assert_allclose(to_numpy(text_scale.mean), to_numpy(batch["text"])[has_text].mean(axis=0), rtol=1e-5)


def test_the_branches_for_prediction_are_those_without_it(clean: Any, tmp_path: Path) -> None:
    without = trained(tmp_path, make_batch(), crossfit=0)
    ours, theirs = clean.state_dict(), without.state_dict()
    assert [name for name in ours if not name.startswith("folds.")] == list(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs if name.startswith(("ema.", "cdr.")))
    assert [phase.name for phase in without.phases] == ["ema", "cdr", "fusion"]
    num_extra = sum(tensor.numel() for name, tensor in ours.items() if name.startswith("folds."))
    assert num_extra == K * sum(tensor.numel() for name, tensor in ours.items() if name.startswith(("ema.", "cdr.")))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"crossfit": 1}, "crossfit must be 0 or at least 2"),
        ({"crossfit": -1}, r"crossfit must be in 0\.\.20"),
        ({"crossfit": 2, "regime": "joint"}, "crossfit needs regime=staged"),
    ],
)
def test_impossible_folds_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        settings("marnet", **changes)


def plan(home: Path, **changes: Any) -> HeadPlan:
    given = {**small_settings("marnet"), "crossfit": 2, "ema.dropout": 0.1, "cdr.dropout": 0.1, **changes}
    config, training = resolve_head_settings("tiny", "marnet", "head", given, FAST_TRAINING)
    return plan_head(home, "tiny", "marnet", config, training, 0, caches_by_key(home))


def weights(head: HeadPlan) -> dict[str, Tensor]:
    return load_file(head.run.path / "checkpoint.safetensors")


def test_interrupted_in_every_phase_it_ends_in_the_same_bits(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    undisturbed = plan(Path(shutil.copytree(home, tmp_path / "undisturbed")))
    train_head(undisturbed, progress=False)
    monkeypatch.setattr(loop, "STATE_SECONDS", -math.inf)
    save, phases = TrainState.save, set()

    def save_and_die(state: TrainState) -> None:
        save(state)
        if state.phase.name not in phases:
            phases.add(state.phase.name)
            raise KeyboardInterrupt

    monkeypatch.setattr(TrainState, "save", save_and_die)
    head = plan(home)
    while not head.run.is_done:
        try:
            train_head(head, progress=False)
        except KeyboardInterrupt:
            continue
    assert phases == {"ema", "cdr", "ema_fold0", "ema_fold1", "cdr_fold0", "cdr_fold1", "fusion"}
    ours, theirs = weights(head), weights(undisturbed)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_trained_together_they_are_as_trained_alone(home: Path, tmp_path: Path) -> None:
    other_home = Path(shutil.copytree(home, tmp_path / "other"))
    changes: list[dict[str, Any]] = [{}, {"ema.w_ita": 0.3}, {"cdr.num_steps": 15, "cdr.w_mse": 0.3}]
    together = [plan(home, **each) for each in changes]
    assert train_heads(together, progress=False) == {}
    for head, each in zip(together, changes, strict=True):
        alone = plan(other_home, **each)
        train_head(alone, progress=False)
        ours, theirs = (load_logits(one) for one in (head, alone))
        np.testing.assert_allclose(ours, theirs, atol=1e-3, rtol=0)


def load_logits(head: HeadPlan) -> np.ndarray:
    evaluate(head.features.home, head.run, "test", {})
    return np.load(head.run.path / "predictions-test.npz")["logits"]


def test_text_cannot_reach_a_prediction(home: Path) -> None:
    head = plan(home)
    train_head(head, progress=False)
    before = load_logits(head)
    for shard in (home / "caches" / "tiny" / caches_by_key(home)["text"] / "features").rglob("*"):
        if shard.is_file() and shard.name != "zarr.json":
            shard.write_bytes(np.full(shard.stat().st_size // 2, np.nan, dtype=np.float16).tobytes())
    (head.run.path / "metrics.json").unlink()
    assert np.array_equal(load_logits(head), before)
