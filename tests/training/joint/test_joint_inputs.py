"""Live batches: the texts that stage 2 would have read, pictures that change by their name, items a batch ahead."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import joint_home
from torch import Tensor

from pipeline.cache.table import shuffled
from pipeline.data.manifest import Manifest
from pipeline.runtime.rng import KeyedRNG
from pipeline.training.config import TrainConfig
from pipeline.training.joint.ddp import DistributedContext
from pipeline.training.joint.inputs import Chunks, augmented, mapped, picked, with_items
from pipeline.training.joint.trainer import JointConfig, source_of
from pipeline.types import Batch

TRAINING = TrainConfig(batch_size=8)


@pytest.fixture(scope="module")
def captioned(tiny_manifest: Manifest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home in which samples have three texts, one, or none."""
    words = ("a cat", "quick dog", "the lazy fox")
    samples = tuple(
        replace(sample, texts=(words, words[:1], ())[number % 3]) if sample.split == "train" else sample
        for number, sample in enumerate(tiny_manifest.samples)
    )
    manifest = replace(tiny_manifest, samples=samples, meta={**tiny_manifest.meta, "texts_recur": "three words only"})
    return joint_home.make_home(manifest, tmp_path_factory.mktemp("captioned") / "home")


@pytest.mark.parametrize("aggregate", ["mean", "first", "random"])
def test_live_texts_are_those_of_stage_2(aggregate: str, captioned: Path) -> None:
    """Before a step is taken, live features are the cached ones in every epoch, filled up where a sample has no text."""
    init = joint_home.head(captioned, "ema", aggregate=aggregate, epochs=1)
    plan = joint_home.together(captioned, init, JointConfig(train="both"), TRAINING)
    model, live = joint_home.assembled(plan)
    source = source_of(plan, model, live, joint_home.ALONE, progress=False)
    cached = shuffled(plan.features.train, 8, 0)
    drawn = []
    for epoch in range(3):
        for ours, theirs in zip(source(epoch), cached(epoch), strict=True):
            with torch.no_grad():
                found = model.live(ours)
            for key in ("text", "image"):
                torch.testing.assert_close(found[key], theirs[key], rtol=1e-4, atol=1e-5)
            drawn.append(len(ours["text_owner"]))
            model.loss(ours, KeyedRNG.seeded(0, ours["key"]), "joint")
    texts = {"mean": 8 * (3 + 1), "first": 8 * 2, "random": 8 * 2}[aggregate]  # of 24 samples a third each
    assert sum(drawn) == 3 * texts


def test_augmentation_is_named_by_the_sample() -> None:
    items = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (6, 3, 20, 30), dtype=np.uint8))
    keys = torch.arange(6)
    rng = KeyedRNG.seeded(0, keys).at("augment", 1)
    whole = augmented(items, rng)
    assert whole.shape == items.shape
    assert whole.dtype == torch.uint8
    assert torch.equal(augmented(items[2:4], KeyedRNG.seeded(0, keys[2:4]).at("augment", 1)), whole[2:4])
    assert not torch.equal(augmented(items, KeyedRNG.seeded(0, keys).at("augment", 2)), whole)
    with pytest.raises(ValueError, match="prepared items are pictures"):
        augmented(torch.zeros(6, 768), rng)


def test_augmentation_sees_at_least_half_of_a_picture_and_mirrors_half_of_them() -> None:
    """Pictures whose channels are the coordinates of their pixels show what was cut."""
    size, count = 40, 200
    row, column = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    items = torch.stack([row, column, row]).float().expand(count, 3, size, size)
    seen = augmented(items, KeyedRNG.seeded(0, torch.arange(count)))
    height = (seen[:, 0].amax(dim=(1, 2)) - seen[:, 0].amin(dim=(1, 2)) + 1) / size
    width = (seen[:, 1].amax(dim=(1, 2)) - seen[:, 1].amin(dim=(1, 2)) + 1) / size
    assert (height * width).min() > 0.45
    assert (height * width).max() > 0.9
    ratio = height / width
    assert 0.7 < ratio.min() < 0.8
    assert 1.25 < ratio.max() < 1.45
    mirrored = seen[:, 1, 0, 0] > seen[:, 1, 0, -1]
    assert 70 <= int(mirrored.sum()) <= 130


def test_items_come_one_batch_ahead_and_errors_come_out() -> None:
    fetched = []

    def source(epoch: int) -> Iterator[Batch]:
        for step in range(4):
            yield {"key": torch.tensor([epoch, step])}

    def fetch(batch: Batch, epoch: int) -> Batch:
        fetched.append(int(batch["key"][1]))
        if epoch == 1 and fetched[-1] == 2:
            raise ValueError("no such file")
        return {"items": batch["key"] * 2}

    batches = list(with_items(source, fetch)(0))
    assert [batch["items"].tolist() for batch in batches] == [[0, 0], [0, 2], [0, 4], [0, 6]]
    assert fetched == [0, 1, 2, 3]
    with pytest.raises(ValueError, match="no such file"):
        list(with_items(source, fetch)(1))


@pytest.mark.parametrize("count", [1, 5, 7, 8])
@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_shares_are_equal_and_cover_a_batch_in_order(count: int, size: int) -> None:
    shares = [DistributedContext(rank, size).share(count) for rank in range(size)]
    assert len({len(share) for share in shares}) == 1
    joined: Tensor = torch.cat(shares)
    assert torch.equal(joined[:count], torch.arange(count))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_are_picked_bit_by_bit(dtype: torch.dtype, tmp_path: Path) -> None:
    rows = torch.randn(20, 3).to(dtype)

    def chunks() -> Chunks:
        yield from rows.split(6)

    items, order = mapped(tmp_path / "x.npy", chunks, 20), torch.tensor([7, 0, 19, 7])
    assert torch.equal(picked(items, order), rows[order])
    assert picked(items, order).dtype == dtype
