"""Inputs of joint training: the texts that stage 2 reads, image augmentation by sample, and items one batch ahead."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import joint_home
from torch import Tensor

from pipeline.cache.table import shuffled_batches
from pipeline.data.manifest import Manifest
from pipeline.runtime.rng import KeyedRNG
from pipeline.training.config import TrainConfig
from pipeline.training.joint.ddp import DistributedContext
from pipeline.training.joint.inputs import TensorChunks, augment_images, open_mapped, prefetch_items, select_items
from pipeline.training.joint.plan import JointConfig
from pipeline.training.joint.trainer import joint_source
from pipeline.types import Batch

TRAINING = TrainConfig(batch_size=8)


@pytest.fixture(scope="module")
def captioned_home(tiny_manifest: Manifest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home in which samples have three texts, one, or none."""
    words = ("a cat", "quick dog", "the lazy fox")
    samples = tuple(
        replace(sample, texts=(words, words[:1], ())[number % 3]) if sample.split == "train" else sample
        for number, sample in enumerate(tiny_manifest.samples)
    )
    manifest = replace(tiny_manifest, samples=samples, meta={**tiny_manifest.meta, "texts_recur": "three words only"})
    return joint_home.make_home(manifest, tmp_path_factory.mktemp("captioned") / "home")


@pytest.mark.parametrize("aggregate", ["mean", "first", "random"])
def test_encoded_texts_are_those_of_stage_2(aggregate: str, captioned_home: Path) -> None:
    """Before the first step, the encoded features equal the cached ones in every epoch, also for samples without a text."""
    init = joint_home.train_small_head(captioned_home, "ema", aggregate=aggregate, epochs=1)
    plan = joint_home.joint_plan(captioned_home, init, JointConfig(train="both"), TRAINING)
    model, encoders = joint_home.build_joint(plan)
    source = joint_source(plan, model, encoders, joint_home.ALONE, progress=False)
    cached = shuffled_batches(plan.features.train, 8, 0)
    num_texts = []
    for epoch in range(3):
        for ours, theirs in zip(source(epoch), cached(epoch), strict=True):
            with torch.no_grad():
                found = model.encode_batch(ours)
            for key in ("text", "image"):
                torch.testing.assert_close(found[key], theirs[key], rtol=1e-4, atol=1e-5)
            num_texts.append(len(ours["text_owner"]))
            model.loss(ours, "joint")
    # of the 24 samples, a third has three texts, a third one text, and a third no text
    expected = {"mean": 8 * (3 + 1), "first": 8 * 2, "random": 8 * 2}[aggregate]
    assert sum(num_texts) == 3 * expected


def test_augmentation_depends_on_seed_epoch_and_sample() -> None:
    items = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (6, 3, 20, 30), dtype=np.uint8))
    keys = torch.arange(6)
    rng = KeyedRNG.seeded(0, keys).at("augment", 1)
    whole = augment_images(items, rng)
    assert whole.shape == items.shape
    assert whole.dtype == torch.uint8
    assert torch.equal(augment_images(items[2:4], KeyedRNG.seeded(0, keys[2:4]).at("augment", 1)), whole[2:4])
    assert not torch.equal(augment_images(items, KeyedRNG.seeded(0, keys).at("augment", 2)), whole)
    with pytest.raises(ValueError, match="prepared items are pictures"):
        augment_images(torch.zeros(6, 768), rng)


def test_augmentation_keeps_half_of_the_area_and_mirrors_half_of_the_images() -> None:
    """The channels of these images are the coordinates of their pixels, which show the crop."""
    size, count = 40, 200
    row, column = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    items = torch.stack([row, column, row]).float().expand(count, 3, size, size)
    seen = augment_images(items, KeyedRNG.seeded(0, torch.arange(count)))
    height = (seen[:, 0].amax(dim=(1, 2)) - seen[:, 0].amin(dim=(1, 2)) + 1) / size
    width = (seen[:, 1].amax(dim=(1, 2)) - seen[:, 1].amin(dim=(1, 2)) + 1) / size
    assert (height * width).min() > 0.45
    assert (height * width).max() > 0.9
    ratio = height / width
    assert 0.7 < ratio.min() < 0.8
    assert 1.25 < ratio.max() < 1.45
    mirrored = seen[:, 1, 0, 0] > seen[:, 1, 0, -1]
    assert 70 <= int(mirrored.sum()) <= 130


def test_items_are_prefetched_and_errors_are_raised() -> None:
    fetched = []

    def source(epoch: int) -> Iterator[Batch]:
        for step in range(4):
            yield {"key": torch.tensor([epoch, step])}

    def fetch(batch: Batch, epoch: int) -> Batch:
        fetched.append(int(batch["key"][1]))
        if epoch == 1 and fetched[-1] == 2:
            raise ValueError("no such file")
        return {"items": batch["key"] * 2}

    batches = list(prefetch_items(source, fetch)(0))
    assert [batch["items"].tolist() for batch in batches] == [[0, 0], [0, 2], [0, 4], [0, 6]]
    assert fetched == [0, 1, 2, 3]
    with pytest.raises(ValueError, match="no such file"):
        list(prefetch_items(source, fetch)(1))


@pytest.mark.parametrize("count", [1, 5, 7, 8])
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_shares_are_equal_and_cover_a_batch_in_order(count: int, world_size: int) -> None:
    shares = [DistributedContext(rank, world_size).local_positions(count) for rank in range(world_size)]
    assert len({len(share) for share in shares}) == 1
    joined: Tensor = torch.cat(shares)
    assert torch.equal(joined[:count], torch.arange(count))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_items_are_selected_bit_by_bit(dtype: torch.dtype, tmp_path: Path) -> None:
    rows = torch.randn(20, 3).to(dtype)

    def chunks() -> TensorChunks:
        yield from rows.split(6)

    items, order = open_mapped(tmp_path / "x.npy", chunks, 20), torch.tensor([7, 0, 19, 7])
    assert torch.equal(select_items(items, order), rows[order])
    assert select_items(items, order).dtype == dtype
