"""What a head is trained on in place of its texts: each control against brute force, and runs that are trained on one."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.tiny_grids import short_grid
from helpers.tiny_heads import FAST_TRAINING, caches_by_key, small_settings, train_tiny
from scipy import stats
from sklearn.linear_model import LogisticRegression

from pipeline.cache.reader import Cache, find_cache
from pipeline.cache.streaming import open_split
from pipeline.cache.table import FeatureTable, load_split, ordered_batches, shuffled_batches
from pipeline.data.manifest import Manifest
from pipeline.evaluation.evaluate import evaluate
from pipeline.extraction.extract import ExtractOptions, extract
from pipeline.report.results import collect_results
from pipeline.runtime.rng import sample_keys
from pipeline.runtime.runs import RunFolder
from pipeline.studies.search import run_grid
from pipeline.training.features import cache_names, open_features
from pipeline.training.heads import plan_head, plan_head_on, resolve_head_settings, train_head
from pipeline.training.joint.finetune import finetune, resolve_joint_settings
from pipeline.training.joint.plan import JointConfig, JointOptions
from pipeline.training.text_controls import (
    TEXT_CONTROLS,
    control_texts,
    draw_class_vectors,
    draw_noise,
    join_text,
    parse_text,
    project_labels,
    shuffle,
)

CPU = torch.device("cpu")
for_all_controls = pytest.mark.parametrize("control", TEXT_CONTROLS)


def test_the_name_of_a_cache_and_a_control() -> None:
    assert parse_text("") == ("", "real")
    assert parse_text("real") == ("", "real")
    assert parse_text("noise") == ("", "noise")
    assert parse_text("bert-0123456789ab") == ("bert-0123456789ab", "real")
    assert parse_text("bert:shuffled-within") == ("bert", "shuffled-within")
    for name, control in (("bert", "real"), ("bert", "label"), ("", "noise")):
        assert parse_text(join_text(name, control)) == (name, control)
    with pytest.raises(ValueError, match=r"unknown text control 'shuffled'.*shuffled-within"):
        parse_text("bert:shuffled")


@pytest.mark.parametrize("num_groups", [1, 5, 40])
def test_a_shuffle_permutes_every_group_and_nobody_keeps_its_text(num_groups: int) -> None:
    rng = np.random.default_rng(0)
    groups, keys = rng.integers(num_groups, size=60).tolist(), sample_keys(map(str, range(60)))
    donors = shuffle(keys, groups, seed=3)
    assert sorted(donors) == list(range(60))
    sizes = Counter(groups)
    for row, donor in enumerate(donors):
        assert groups[row] == groups[donor]
        assert (row == donor) == (sizes[groups[row]] == 1)
    assert shuffle(keys, groups, seed=3) == donors
    assert shuffle(keys, groups, seed=4) != donors
    order = rng.permutation(60).tolist()  # the samples decide, not their order
    again = shuffle(keys[order], [groups[row] for row in order], seed=3)
    assert {order[row]: order[donor] for row, donor in enumerate(again)} == dict(enumerate(donors))


def test_all_others_are_equally_likely_donors() -> None:
    keys = sample_keys(map(str, range(5)))
    counts = Counter(pair for seed in range(4000) for pair in enumerate(shuffle(keys, [0] * 5, seed)))
    assert len(counts) == 20
    assert stats.chisquare(list(counts.values())).pvalue > 1e-3


def test_noise_has_the_given_moments() -> None:
    mean, std = torch.tensor([1.0, -2.0, 0.5]), torch.tensor([0.1, 3.0, 0.0])
    noise = draw_noise(mean, std, sample_keys(map(str, range(20_000))), seed=1).numpy()
    assert (noise[:, 2] == 0.5).all()
    for column in range(2):
        standard = (noise[:, column] - mean[column].item()) / std[column].item()
        assert stats.kstest(standard, "norm").pvalue > 1e-3
    assert abs(np.corrcoef(noise[:, 0], noise[:, 1])[0, 1]) < 0.03


@pytest.mark.parametrize("width", [4, 12, 30])
def test_labels_are_linearly_decodable(width: int) -> None:
    label = torch.arange(12).repeat(5)
    vectors = project_labels(label, draw_class_vectors(12, width, seed=0))
    assert vectors.shape == (60, width)
    np.testing.assert_allclose(vectors.norm(dim=1), 1.0, atol=1e-6)
    assert LogisticRegression(C=1e6, max_iter=2000).fit(vectors, label).score(vectors, label) == 1.0
    indicators = (torch.rand(60, 12, generator=torch.Generator().manual_seed(0)) < 0.3).float()
    sums = project_labels(indicators, vectors[:12])
    torch.testing.assert_close(sums, indicators @ vectors[:12])
    if width >= 12:  # the vectors of the classes are orthogonal, so that a linear layer reads every label exactly
        torch.testing.assert_close(sums @ vectors[:12].T, indicators, atol=1e-5, rtol=0)


@pytest.fixture(scope="module")
def two_texts(tiny_manifest: Manifest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Manifest, dict[str, Cache]]:
    """Return `tiny` and its caches: two texts per sample, one sample without text, and one image that cannot be decoded."""
    home, media = tmp_path_factory.mktemp("controls"), tmp_path_factory.mktemp("controls_media")
    for file in tiny_manifest.media_root.iterdir():
        (media / file.name).write_bytes(b"" if file.stem == "blue-2" else file.read_bytes())
    samples = tuple(
        replace(sample, texts=() if sample.id == "red-0" else (*sample.texts, f"another text of {sample.id}"))
        for sample in tiny_manifest.samples
    )
    manifest = replace(tiny_manifest, media_root=media, samples=samples)
    caches = {}
    for key, width in (("image", "16"), ("text", "12")):
        settings = {"modality": key, "width": width}
        path = extract(manifest, "random_projection", settings, home, options=ExtractOptions(progress=False, max_failures=0.5))
        caches[key] = find_cache(home, manifest, path.name)
    return manifest, caches


def tables(case: tuple[Manifest, dict[str, Cache]], control: str, aggregate: str, seed: int = 0) -> tuple[FeatureTable, ...]:
    """Return the training split with real texts, and with a control."""
    manifest, caches = case
    controlled = {**caches, "text": control_texts(control, manifest, caches, aggregate, seed)}
    real, found = (load_split(manifest, each, "train", CPU, aggregate) for each in (caches, controlled))
    assert found.ids == real.ids
    for name in ("image", "label", "key", "paired"):  # a control changes texts alone, and a sample without text keeps none
        assert torch.equal(found.columns[name], real.columns[name])
    assert found.columns["paired"].tolist().count(0.0) == 1
    return real, found


def rows_by_class(table: FeatureTable, is_by_class: bool) -> dict[int, list[tuple[float, ...]]]:
    rows: dict[int, list[tuple[float, ...]]] = {}
    for text, label, paired in zip(*(table.columns[key].tolist() for key in ("text", "label", "paired")), strict=True):
        if paired:
            rows.setdefault(label if is_by_class else 0, []).append(tuple(text))
    return {label: sorted(texts) for label, texts in rows.items()}


@pytest.mark.parametrize("aggregate", ["mean", "first"])
@pytest.mark.parametrize("control", ["shuffled-within", "shuffled-across"])
def test_shuffled_texts_are_the_same_texts_at_other_samples(two_texts: Any, control: str, aggregate: str) -> None:
    real, found = tables(two_texts, control, aggregate)
    is_by_class = control == "shuffled-within"
    assert rows_by_class(found, is_by_class) == rows_by_class(real, is_by_class)
    paired = real.columns["paired"] > 0
    assert (found.columns["text"] != real.columns["text"]).any(dim=1)[paired].all()
    torch.testing.assert_close(found.columns["text"][~paired], real.columns["text"][~paired], atol=1e-6, rtol=0)


def test_texts_that_are_drawn_anew_come_from_one_donor(two_texts: Any) -> None:
    real, found = tables(two_texts, "shuffled-within", "random")
    assert real.captions
    texts_of = [
        {tuple(row) for row in real.captions.features[start:end].tolist()}
        for start, end in zip(real.captions.offsets[:-1], real.captions.offsets[1:], strict=True)
    ]
    seen: dict[int, set[tuple[float, ...]]] = {}
    row_of = {key: row for row, key in enumerate(real.columns["key"].tolist())}
    for epoch in range(20):
        for batch in shuffled_batches(found, 5, seed=0)(epoch):
            for key, text, paired in zip(*(batch[name].tolist() for name in ("key", "text", "paired")), strict=True):
                if paired:
                    seen.setdefault(row_of[key], set()).add(tuple(text))
    donors = [texts_of.index(texts) for texts in seen.values()]
    assert len(donors) == len(set(donors)) == 22
    for row, donor in zip(seen, donors, strict=True):
        assert row != donor
        assert real.columns["label"][row] == real.columns["label"][donor]


@pytest.mark.parametrize("aggregate", ["mean", "random"])
def test_noise_depends_on_the_sample_and_replaces_every_text(two_texts: Any, aggregate: str) -> None:
    real, found = tables(two_texts, "noise", aggregate)
    paired = real.columns["paired"] > 0
    texts, noise = ((t.captions.features if t.captions else t.columns["text"][paired]).numpy() for t in (real, found))
    texts, noise = texts[np.isfinite(texts).all(axis=1)], noise[np.isfinite(noise).all(axis=1)]
    assert texts.shape == noise.shape
    assert len(np.unique(noise, axis=0)) == len(noise)
    standard = (noise - texts.mean(axis=0)) / texts.std(axis=0)
    assert stats.kstest(standard.reshape(-1), "norm").pvalue > 1e-3


@pytest.mark.parametrize("aggregate", ["mean", "random"])
def test_label_texts_say_the_label_and_nothing_else(two_texts: Any, aggregate: str) -> None:
    _, found = tables(two_texts, "label", aggregate)
    batch = next(shuffled_batches(found, len(found), seed=0)(0))
    paired = batch["paired"] > 0
    expected = project_labels(batch["label"], draw_class_vectors(4, 12, seed=0))
    assert torch.equal(batch["text"][paired], expected[paired])


@for_all_controls
@pytest.mark.parametrize("aggregate", ["mean", "random"])
def test_windows_have_the_texts_of_a_table(two_texts: Any, control: str, aggregate: str) -> None:
    manifest, caches = two_texts
    controlled = {**caches, "text": control_texts(control, manifest, caches, aggregate, seed=2)}
    table = load_split(manifest, controlled, "train", CPU, aggregate)
    windows = open_split(manifest, controlled, "train", CPU, aggregate, 8)
    assert not isinstance(windows, FeatureTable)
    whole, parts = (list(ordered_batches(each, 0)()) for each in (table, windows))
    assert len(parts) == 3
    for name, column in whole[0].items():
        torch.testing.assert_close(torch.cat([part[name] for part in parts]), column, atol=1e-6, rtol=0)


@for_all_controls
def test_each_seed_has_its_own_control_and_a_seed_the_same(two_texts: Any, control: str) -> None:
    first, again, other = (tables(two_texts, control, "mean", seed)[1].columns["text"] for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@for_all_controls
def test_several_labels(two_texts: Any, control: str) -> None:
    """With several labels a class is a set of labels, and the text of a sample is the sum of its labels' vectors."""
    manifest, caches = two_texts
    samples = tuple(
        replace(sample, labels=tuple(sorted({*sample.labels, int(sample.id[-1]) % 2}))) for sample in manifest.samples
    )
    multi = replace(manifest, label_kind="multi", samples=samples)
    controlled = {**caches, "text": control_texts(control, multi, caches, "mean", seed=0)}
    real, found = (load_split(multi, each, "train", CPU, "mean").columns for each in (caches, controlled))
    paired = real["paired"] > 0
    if control == "label":
        torch.testing.assert_close(
            found["text"][paired], project_labels(real["label"], draw_class_vectors(4, 12, seed=0))[paired]
        )
    if control == "shuffled-within":
        owners = {tuple(text): tuple(label) for text, label in zip(real["text"].tolist(), real["label"].tolist(), strict=True)}
        for text, label in zip(found["text"][paired].tolist(), found["label"][paired].tolist(), strict=True):
            assert owners[tuple(text)] == tuple(label)


def test_a_shuffle_that_changes_nothing_is_refused(two_texts: Any) -> None:
    manifest, caches = two_texts
    alone = replace(
        manifest,
        label_kind="multi",
        class_names=tuple(sample.id for sample in manifest.samples),
        samples=tuple(replace(sample, labels=(row,)) for row, sample in enumerate(manifest.samples)),
    )
    with pytest.raises(ValueError, match="shuffled-within changes nothing: no two training samples of tiny with equal labels"):
        control_texts("shuffled-within", alone, caches, "mean", seed=0)
    assert control_texts("shuffled-across", alone, caches, "mean", seed=0)


def train_on(home: Path, method: str, text: str, seed: int = 0, **training: Any) -> RunFolder:
    settings, config = resolve_head_settings("tiny", method, "head", small_settings(method), {**FAST_TRAINING, **training})
    caches = caches_by_key(home)
    names = {**caches, "text": join_text(caches["text"], text)}
    return train_head(plan_head(home, "tiny", method, settings, config, seed, names), progress=False)


def test_a_run_on_real_texts_keeps_its_name(home: Path) -> None:
    run = train_tiny(home, "ema")
    assert "text_control" not in json.loads((run.path / "config.json").read_text())
    assert train_on(home, "ema", "real") == run


def test_runs_on_controls_are_runs_of_their_own_with_rows_of_their_own(home: Path) -> None:
    runs = {text: train_on(home, "ema", text) for text in ("real", *TEXT_CONTROLS)}
    assert len({run.path for run in runs.values()}) == 5
    weights = {(run.path / "checkpoint.safetensors").read_bytes() for run in runs.values()}
    assert len(weights) == 5
    for text, run in runs.items():
        assert run.config().text_control == text
        evaluate(home, run, "test", {})
    labels = [row.label for row in collect_results(home, "tiny", "test").rows]
    assert sorted(labels) == sorted(["ema", *(f"ema · text={control}" for control in TEXT_CONTROLS)])


def test_a_seed_has_one_control_alone_after_another_seed_and_resumed(home: Path) -> None:
    text = join_text(caches_by_key(home)["text"], "noise")
    features = open_features(home, "tiny", "ema", {**caches_by_key(home), "text": text})
    settings, training = resolve_head_settings("tiny", "ema", "head", small_settings("ema"), FAST_TRAINING)
    first, second = (plan_head_on(features, "ema", settings, training, seed) for seed in (0, 1))
    train_head(second, progress=False)
    train_head(first, progress=False, should_stop=lambda epoch, metric: epoch == 2)
    assert not first.run.is_done
    train_head(first, progress=False)
    resumed = (first.run.path / "checkpoint.safetensors").read_bytes()
    for file in first.run.path.iterdir():
        file.unlink()
    assert train_on(home, "ema", "noise") == first.run
    assert (first.run.path / "checkpoint.safetensors").read_bytes() == resumed


def test_a_grid_on_a_control_has_the_runs_of_train_head(home: Path) -> None:
    text = f"{caches_by_key(home)['text']}:shuffled-across"
    grid = short_grid(home, "ema", ("w_ita=1,2",), seeds=(0, 1), text=text)
    result = run_grid(grid, workers=0, read_test=False)
    assert not result.failed
    assert all(head.config.text_control == "shuffled-across" and head.run.is_done for head in grid.heads.values())


def test_what_a_control_cannot_be_combined_with(home: Path) -> None:
    with pytest.raises(ValueError, match="baseline reads no text, so there is none to replace by 'noise'"):
        train_on(home, "baseline", "noise")
    run = train_on(home, "ema", "noise")
    with pytest.raises(ValueError, match="was trained on text=noise; joint training reads real texts alone"):
        finetune(home, run, JointConfig(), resolve_joint_settings(run, {}), JointOptions(progress=False))
    assert cache_names(home, "tiny", "a", "b:noise") == {"image": "a", "text": "b:noise"}
