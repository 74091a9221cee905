"""Heads on caches of tokens, patches or words: what they compute of them, and a run from the caches to metrics."""

from __future__ import annotations

import shutil
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.method_cases import LABEL_KINDS, ROWS, batches_of, make_batch, make_rng, seeded_loss, settings, shapes, to_numpy
from helpers.tiny_heads import FAST_TRAINING, extract_tokens, small_settings
from scipy import stats
from torch import Tensor

from pipeline.cache.reader import find_cache
from pipeline.cache.streaming import open_split
from pipeline.cache.table import load_split, ordered_batches, shuffled_batches
from pipeline.cache.verify import verify
from pipeline.data.manifest import Manifest
from pipeline.data.manifest_files import read_manifest, write_manifest
from pipeline.evaluation.evaluate import evaluate
from pipeline.nn.tokens import TokenLayer, paired_words, pooled_text, word_mask
from pipeline.runtime import plugins
from pipeline.runtime.errors import UserError
from pipeline.runtime.rng import sample_keys
from pipeline.training.ensemble import ModelEnsemble
from pipeline.training.features import open_features
from pipeline.training.heads import plan_head, resolve_head_settings, train_head
from pipeline.training.text_controls import TEXT_CONTROLS, control_texts, draw_class_vectors, project_labels
from pipeline.types import Batch

CPU = torch.device("cpu")
METHODS = [name for name in plugins.names("methods") if getattr(plugins.get("methods", name), "reads_tokens", False)]
PATCHES, PATCH_WIDTH, WORDS, WORD_WIDTH = 5, 7, 6, 9
KEYS: dict[str, tuple[str, ...]] = {"patches": ("image",), "words": ("text",), "both": ("image", "text")}  # that are tokens
ORDERED = {"atnet"}  # its decoder gives words one by one
OF_PATCHES = [name for name in METHODS if name != "atnet"]  # it reads their mean
for_all_methods = pytest.mark.parametrize("name", METHODS)
for_words = pytest.mark.parametrize(("name", "case"), [*product(METHODS, ("words", "both"))])


def make_words(num_tokens: int = WORDS) -> Tensor:
    """Return texts of 1 to 6 words each, behind which there are zeros."""
    words = 3.0 * torch.randn(ROWS, WORDS, WORD_WIDTH, generator=torch.Generator().manual_seed(1)) - 1.0
    words[torch.arange(WORDS) > (torch.arange(ROWS) % WORDS).unsqueeze(1)] = 0.0
    return torch.nn.functional.pad(words, (0, 0, 0, num_tokens - WORDS))


def fitted_on_tokens(
    name: str, case: str = "patches", kind: str = "single", seed: int = 0, num_tokens: int = WORDS
) -> tuple[Any, Batch]:
    """Return a head with statistics, in evaluation mode, and a batch in which images, texts, or both are tokens."""
    torch.manual_seed(seed)
    image = 3.0 * torch.randn(ROWS, PATCHES, PATCH_WIDTH, generator=torch.Generator().manual_seed(0)) + 1.0
    tokens = {"image": image, "text": make_words(num_tokens)}
    batch = make_batch(kind) | {key: tokens[key] for key in KEYS[case]}
    method = plugins.get("methods", name)(settings(name), {**shapes(kind), **{k: batch[k].shape[1:] for k in KEYS[case]}})
    for phase in method.phases:
        method.begin(phase.name, batches_of(batch))
    return method.train(False), batch


def losses_of(method: Any, batch: Batch) -> Tensor:
    """Return the loss of each phase."""
    return torch.stack([seeded_loss(method, batch, phase.name)["loss"] for phase in method.phases])


def test_tokens_are_standardised_and_mapped() -> None:
    layer, x = TokenLayer(PATCH_WIDTH, 4, "per_dim"), 3.0 * torch.randn(6, PATCHES, PATCH_WIDTH) + 1.0
    layer.fit(iter([x[:4], x[4:]]))
    rows = to_numpy(x).reshape(-1, PATCH_WIDTH)
    expected = (rows - rows.mean(0)) / rows.std(0) @ to_numpy(layer.layer.weight).T + to_numpy(layer.layer.bias)
    np.testing.assert_allclose(to_numpy(layer(x)).reshape(-1, 4), expected, atol=1e-5)


def test_words_end_where_zeros_begin() -> None:
    text, paired = make_words(), make_batch()["paired"]
    mask = word_mask(text)
    assert mask is not None
    assert mask.sum(1).tolist() == [row % WORDS + 1 for row in range(ROWS)]
    words = [[word for word in words if word.any()] for words in to_numpy(text)]
    np.testing.assert_allclose(to_numpy(pooled_text(text)), [np.mean(each, axis=0) for each in words], atol=1e-6)
    assert not pooled_text(torch.zeros_like(text)).any()
    expected = [word for each, is_paired in zip(words, paired, strict=True) if is_paired for word in each]
    np.testing.assert_allclose(to_numpy(paired_words({"text": text, "paired": paired})), expected)


def test_some_methods_read_tokens() -> None:
    assert {"team", "mgcc", "momke", "atnet"} <= set(METHODS)


@pytest.mark.parametrize("name", OF_PATCHES)
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


@for_words
def test_words_count_and_padding_changes_nothing(name: str, case: str) -> None:
    method, batch = fitted_on_tokens(name, case)
    text = batch["text"]
    expected = losses_of(method, batch)
    if name not in ORDERED:
        torch.testing.assert_close(losses_of(method, {**batch, "text": text.roll(1, dims=1)}), expected)
    longer, padded = fitted_on_tokens(name, case, num_tokens=WORDS + 3)
    for key, value in longer.state_dict().items():  # some parameters have a row for each token
        own = method.state_dict()[key]
        value[tuple(slice(size) for size in own.shape)] = own
    torch.testing.assert_close(losses_of(longer, padded), expected)
    changed, moved = text.clone(), 5.0 * torch.randn(WORD_WIDTH, generator=torch.Generator().manual_seed(2))
    changed[WORDS - 1 :: WORDS, :2] += torch.stack([moved, -moved])  # of the texts of six words; the mean stays
    assert (losses_of(method, {**batch, "text": changed}) - expected).abs().max() > 1e-4


@pytest.mark.parametrize("kind", LABEL_KINDS)
@for_words
def test_a_sample_without_text_changes_nothing(name: str, case: str, kind: str) -> None:
    """Not even in the statistics; and every parameter learns, with one label or several."""
    outcomes = []
    for garbage in (0.0, 1e3):
        torch.manual_seed(0)
        method, batch = fitted_on_tokens(name, case, kind)
        batch["text"] = torch.where(batch["paired"][:, None, None] > 0, batch["text"], garbage * torch.randn(WORDS, WORD_WIDTH))
        for phase in method.phases:
            method.begin(phase.name, batches_of(batch))
        losses = losses_of(method, batch)
        losses.sum().backward()
        outcomes.append([losses.detach(), *(weight.grad for weight in method.parameters())])
    assert all(gradient.isfinite().all() for gradient in outcomes[0])
    torch.testing.assert_close(outcomes[1], outcomes[0], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("name", "case"), [(name, case) for name in ("team", "mgcc", "atnet") for case in ("patches", "both")])
def test_the_prediction_is_that_of_the_mean_patch(name: str, case: str) -> None:
    method, batch = fitted_on_tokens(name, case)
    image = batch["image"]
    torch.testing.assert_close(method.predict(image, make_rng()), method.predict(image.mean(1), make_rng()))


@pytest.mark.parametrize("case", KEYS)
@for_all_methods
def test_an_ensemble_on_tokens_equals_its_models(name: str, case: str) -> None:
    models = [fitted_on_tokens(name, case, seed=seed)[0] for seed in (0, 1)]
    _, batch = fitted_on_tokens(name, case)
    alone = [losses_of(model, batch) for model in models]
    for losses in alone:
        losses.sum().backward()
    gradients = {key: [model.get_parameter(key).grad for model in models] for key, _ in models[0].named_parameters()}
    predicted = torch.stack([model.predict(batch["image"], make_rng()) for model in models])
    ensemble: Any = ModelEnsemble(models)
    losses = torch.stack([seeded_loss(ensemble, batch, phase.name)["loss"] for phase in models[0].phases], dim=1)
    torch.testing.assert_close(losses, torch.stack(alone))
    losses.sum().backward()
    found = {key: list(weight.grad) for key, weight in ensemble.named_parameters()}
    torch.testing.assert_close(found, gradients, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(ensemble.predict(batch["image"], make_rng()), predicted)


@pytest.fixture(scope="module")
def token_home(tiny_manifest: Manifest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """A home of `tiny` with two texts per sample, none of one, and the names of its caches of patches and of words."""
    home = tmp_path_factory.mktemp("tokens")
    samples = [replace(each, texts=(*each.texts, f"another, of {each.id}")) for each in tiny_manifest.samples]
    write_manifest(replace(tiny_manifest, samples=(replace(samples[0], texts=()), *samples[1:])), home)
    return home, {key: extract_tokens(home, key).name for key in KEYS["both"]}


def test_a_cache_of_words_is_whole(token_home: tuple[Path, dict[str, str]]) -> None:
    home, names = token_home
    path = home / "caches" / "tiny" / names["text"]
    assert verify(path) == []
    rows = find_cache(home, read_manifest(home, "tiny"), names["text"]).read_rows(["red-1"])[0]
    assert rows.shape == (2, 8, 4)
    lengths = [int(each.any(axis=1).sum()) for each in rows]
    assert lengths[0] != lengths[1]
    assert all(not each[length:].any() for each, length in zip(rows, lengths, strict=True))


def test_several_texts_of_words_are_read_one_by_one(token_home: tuple[Path, dict[str, str]]) -> None:
    home, names = token_home
    with pytest.raises(UserError, match="holds tokens of several texts of a sample, which have no mean: give --aggregate"):
        open_features(home, "tiny", "team", names)
    cache = find_cache(home, read_manifest(home, "tiny"), names["text"])
    drawn: set[int] = set()
    for aggregate in ("first", "random"):
        source, _ = open_features(home, "tiny", "team", names, aggregate).splits(0, 0)
        batches = [next(shuffled_batches(source, len(source.ids), 0)(epoch)) for epoch in range(3)]
        row_of = {key: each for key, each in zip(sample_keys(source.ids).tolist(), source.ids, strict=True)}
        for batch in batches:
            assert int(batch["paired"].sum()) == len(source.ids) - 1
            assert batch["text"].isfinite().all()
            for key, text, paired in zip(batch["key"].tolist(), batch["text"].numpy(), batch["paired"], strict=True):
                if paired:
                    texts = cache.read_rows([row_of[key]])[0]
                    same = [number for number, each in enumerate(texts) if np.array_equal(each, text)]
                    assert same == [0] if aggregate == "first" else len(same) == 1
                    drawn |= set(same)
    assert drawn == {0, 1}


@pytest.mark.parametrize("aggregate", ["first", "random"])
@pytest.mark.parametrize("control", TEXT_CONTROLS)
def test_a_control_keeps_the_number_of_words(token_home: tuple[Path, dict[str, str]], control: str, aggregate: str) -> None:
    """In a table and in windows alike."""
    home, names = token_home
    manifest = read_manifest(home, "tiny")
    caches = {key: find_cache(home, manifest, name) for key, name in names.items()}
    controlled = {**caches, "text": control_texts(control, manifest, caches, aggregate, seed=0)}
    whole, windows = (open_split(manifest, controlled, "train", CPU, aggregate, window) for window in (0, 8))
    found, parts = (list(ordered_batches(each, 0)()) for each in (whole, windows))
    torch.testing.assert_close(torch.cat([part["text"] for part in parts]), found[0]["text"], atol=1e-6, rtol=0)
    paired = found[0]["paired"] > 0
    real = next(ordered_batches(load_split(manifest, caches, "train", CPU, aggregate), 0)())
    masks = [(each["text"][paired] != 0).any(-1) for each in (real, found[0])]
    assert torch.equal(*masks) or control not in ("noise", "label")
    words = found[0]["text"][paired][masks[1]]
    if control == "label":
        vectors = project_labels(found[0]["label"][paired], draw_class_vectors(4, 4, seed=0))
        assert torch.equal(words, vectors.repeat_interleave(masks[1].sum(1), dim=0))
    if control == "noise":
        assert len(words.unique(dim=0)) == len(words)
        real_words = caches["text"].read_rows(whole.ids, first_only=aggregate == "first")[0].reshape(-1, 4)
        real_words = real_words[real_words.any(axis=1)]
        standard = (words.numpy() - real_words.mean(axis=0)) / real_words.std(axis=0)
        assert stats.kstest(standard.flatten(), "norm").pvalue > 1e-3


@for_all_methods
def test_a_run_from_caches_of_tokens(name: str, token_home: tuple[Path, dict[str, str]], tmp_path: Path) -> None:
    """It resumes with the same bits, and predicts when there are no texts any more."""
    source, names = token_home
    home = Path(shutil.copytree(source, tmp_path / "home"))
    config, training = resolve_head_settings("tiny", name, "head", small_settings(name), FAST_TRAINING)
    plan = plan_head(home, "tiny", name, config, training, 0, names, "random")
    train_head(plan, progress=False, should_stop=lambda epoch, metric: epoch == 1)
    assert not plan.run.is_done
    run = train_head(plan, progress=False)
    resumed = (run.path / "checkpoint.safetensors").read_bytes()
    for file in run.path.iterdir():
        file.unlink()
    assert (train_head(plan, progress=False).path / "checkpoint.safetensors").read_bytes() == resumed
    shutil.rmtree(home / "caches" / "tiny" / names["text"])
    assert 0.0 <= evaluate(home, run, "val", {})["metrics"]["acc1"] <= 100.0
