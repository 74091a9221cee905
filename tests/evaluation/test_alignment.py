"""Alignment to the text is measured on validation pairs, beside the mean text, and is kept with the run."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from helpers.equation_cases import fitted
from helpers.method_cases import make_rng, to_numpy
from helpers.tiny_heads import train_tiny
from sklearn.metrics import mean_squared_error
from sklearn.metrics.pairwise import paired_cosine_distances

from pipeline.cache.table import FeatureTable
from pipeline.evaluation.alignment import measure_alignment
from pipeline.report.alignment import alignment_blocks
from pipeline.report.blocks import BulletList
from pipeline.training.features import FeatureSet


def pairs_of(batch: dict[str, torch.Tensor]) -> FeatureTable:
    return FeatureTable(ids=tuple(map(str, range(len(batch["key"])))), columns=batch, excluded=())


@pytest.mark.parametrize("name", ["seda", "cdr", "marnet"])
def test_the_figures_are_sklearns(name: str) -> None:
    method, batch = fitted(name)
    has_text = batch["paired"] > 0
    poisoned = {**batch, "text": torch.where(has_text[:, None], batch["text"], torch.nan)}
    figures = measure_alignment(method, pairs_of(poisoned), seed=0)
    head = method.cdr if name == "marnet" else method
    real = to_numpy(head.space.text(batch["text"]))[has_text.numpy()]
    generated = to_numpy(head.feature(batch["image"], make_rng().at("predict")))[has_text.numpy()]
    mean = np.broadcast_to(real.mean(0), real.shape)
    expected = {
        "text_cos": 1 - paired_cosine_distances(generated, real).mean(),
        "text_mse": mean_squared_error(real, generated),
        "mean_text_cos": 1 - paired_cosine_distances(mean, real).mean(),
        "mean_text_mse": mean_squared_error(real, mean),
    }
    assert figures == pytest.approx(expected, rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("name", ["baseline", "ema", "mlp"])
def test_a_head_that_generates_no_text_has_no_figures(name: str) -> None:
    method, batch = fitted(name)
    assert measure_alignment(method, pairs_of(batch), seed=0) == {}


def test_texts_that_do_not_differ_have_no_figures() -> None:
    method, batch = fitted("seda")
    same = batch["text"][:1].expand_as(batch["text"])
    assert measure_alignment(method, pairs_of({**batch, "text": same}), seed=0) == {}


def test_samples_without_texts_have_no_figures() -> None:
    method, batch = fitted("seda")
    assert measure_alignment(method, pairs_of({**batch, "paired": torch.zeros_like(batch["paired"])}), seed=0) == {}


def pairs_with(text: float) -> Any:
    """Return what stands in for the validation pairs: texts of about this size."""

    def read(features: Any) -> FeatureTable:
        val = features.val
        size = len(val)
        texts = text * torch.linspace(1.0, 2.0, size)[:, None].expand(size, *features.shapes["text"])
        return replace(val, columns={**val.columns, "text": texts, "paired": torch.ones(size)})

    return property(read)


def test_it_is_kept_with_the_run_and_changes_nothing_else(
    tiny_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The texts of validation samples are measured; whatever they are, weights and history are the same bytes."""
    runs = []
    for number, text in enumerate((None, 7.0, -1e6)):
        home = Path(shutil.copytree(tiny_home, tmp_path / f"home{number}"))
        if text is not None:
            monkeypatch.setattr(FeatureSet, "validation_pairs", pairs_with(text))
        runs.append(train_tiny(home, "seda"))
    figures = [run.read_alignment() for run in runs]
    assert figures[0].keys() == {"text_cos", "text_mse", "mean_text_cos", "mean_text_mse"}
    assert len({each["text_mse"] for each in figures}) == 3
    for name in ("checkpoint.safetensors", "history.csv"):
        assert len({(run.path / name).read_bytes() for run in runs}) == 1


def heads_with(*figures: dict[str, float]) -> list[Any]:
    runs = [SimpleNamespace(read_alignment=lambda each=each: each) for each in figures]
    return [SimpleNamespace(runs=runs, label="seda (a&b)")]


@pytest.mark.parametrize(
    ("mse", "words"), [(1.5, "does not align to the text"), (1.0, "does not align to the text"), (0.6, "explains 40 %")]
)
def test_the_report_says_of_a_head_whether_it_aligns(mse: float, words: str) -> None:
    figures = {"text_cos": 0.1, "text_mse": mse, "mean_text_cos": 0.0, "mean_text_mse": 1.0}
    *_, sentences = alignment_blocks(heads_with(figures, figures, {}))
    assert isinstance(sentences, BulletList)
    assert words in sentences.items[0]
    assert alignment_blocks(heads_with({})) == []
