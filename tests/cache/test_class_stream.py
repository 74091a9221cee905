"""The class stream: which rows it draws, that batches contain them, and that training reads them."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.tiny_heads import FAST_TRAINING, caches_by_key, small_settings
from scipy import stats

from pipeline.cache.class_stream import draw_class_rows
from pipeline.cache.table import FeatureTable, shuffled_batches
from pipeline.runtime.rng import sample_keys
from pipeline.training.features import open_features
from pipeline.training.heads import plan_head, resolve_head_settings, train_head
from pipeline.types import Batch, ClassStream

LABEL = torch.tensor([0] * 9 + [1] * 6 + [2] * 2 + [3] + [4] * 7)  # class 3 has one sample
PAIRED = torch.ones(25)
PAIRED[[0, 3, 18]] = 0.0


def columns_of(label: torch.Tensor, **more: torch.Tensor) -> Batch:
    return {"label": label, "key": sample_keys(f"sample-{number}" for number in range(len(label))), **more}


@pytest.mark.parametrize("is_multi", [False, True])
def test_rows_are_of_their_class_and_have_texts(is_multi: bool) -> None:
    member = torch.eye(5)[LABEL]
    member[:4, 2] = 1.0  # some samples have two labels
    columns = columns_of(member if is_multi else LABEL, paired=PAIRED)
    rows, label = draw_class_rows(columns, ClassStream(3, 4), 200, seed=0, epoch=0)
    assert rows.shape == label.shape == (200, 12)
    assert (PAIRED[rows] == 1).all()
    assert (member[rows, label] == 1).all() if is_multi else torch.equal(LABEL[rows], label)
    for step_rows, step_label in zip(rows.view(200, 3, 4), label.view(200, 3, 4), strict=True):
        assert len(set(step_label[:, 0].tolist())) == 3
        for some, classes in zip(step_rows, step_label, strict=True):
            usable = int(((member if is_multi else torch.eye(5)[LABEL])[:, classes[0]] * PAIRED).sum())
            assert len(set(some.tolist())) == min(4, usable)  # a class of two gives each sample twice
    counts = np.bincount(label[:, ::4].flatten().numpy(), minlength=5)
    assert counts[3] == 0
    assert stats.chisquare(np.delete(counts, 3)).pvalue > 0.001


def test_it_is_a_function_of_seed_epoch_and_samples() -> None:
    columns, stream = columns_of(LABEL), ClassStream(2, 2)
    drawn = [draw_class_rows(columns, stream, 5, seed, epoch)[0] for seed, epoch in ((0, 0), (0, 1), (1, 0), (0, 0))]
    assert torch.equal(drawn[0], drawn[3])
    assert len({tuple(rows.flatten().tolist()) for rows in drawn}) == 3
    assert draw_class_rows(columns, ClassStream(9, 2), 5, 0, 0)[0].shape == (5, 8)  # all four classes that have two samples
    assert draw_class_rows(columns_of(torch.arange(6)), stream, 5, 0, 0)[0].shape == (5, 0)


def test_batches_have_the_stream_beside_their_own_rows() -> None:
    columns = columns_of(LABEL, image=torch.arange(25.0)[:, None], text=-torch.arange(25.0)[:, None], paired=PAIRED)
    table = FeatureTable(tuple(map(str, range(25))), columns, ())
    with_stream, without = (list(shuffled_batches(table, 8, 0, stream)(2)) for stream in (ClassStream(2, 3), None))
    rows, label = draw_class_rows(columns, ClassStream(2, 3), 3, 0, 2)
    for step, (found, plain) in enumerate(zip(with_stream, without, strict=True)):
        assert set(found) - set(plain) == {"class_image", "class_text", "class_label"}
        assert all(torch.equal(found[key], column) for key, column in plain.items())
        assert torch.equal(found["class_image"][:, 0], rows[step].float())
        assert torch.equal(found["class_text"][:, 0], -rows[step].float())
        assert torch.equal(found["class_label"], label[step])
    lonely = FeatureTable(table.ids, {**columns, "label": torch.arange(25)}, ())
    assert set(next(shuffled_batches(lonely, 8, 0, ClassStream(2, 3))(0))) == set(columns)


@pytest.mark.parametrize("window", [0, 16])
def test_training_reads_the_stream(window: int, tiny_home: Path, tmp_path: Path) -> None:
    home = Path(shutil.copytree(tiny_home, tmp_path / "home"))
    losses: list[str] = []
    for count in (2, 4):
        sizes = {**small_settings("cdd"), "step_classes": count}
        settings, config = resolve_head_settings("tiny", "cdd", "head", sizes, {**FAST_TRAINING, "window": window})
        run = train_head(plan_head(home, "tiny", "cdd", settings, config, 0, caches_by_key(home)), progress=False)
        losses.append((run.path / "history.csv").read_text())
    assert losses[0] != losses[1]
    features = open_features(home, "tiny", "cdd", caches_by_key(home))
    assert next(shuffled_batches(features.train, 8, 0, ClassStream(4, 2))(0))["class_label"].bincount().tolist() == [2] * 4
