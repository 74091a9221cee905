"""The public API: a dataset of the user's own from files to comparison, as a notebook does it; and the commands beside it."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from helpers.command_line import run
from helpers.photos import BROKEN, NUM_OF_EACH, TEXTLESS, TRAINING, TWO_TEXTS, PhotoHome, make_photo_home
from scipy.special import log_softmax

import pipeline as da
from pipeline.cache.arrays import read_features
from pipeline.cache.provenance import make_provenance
from pipeline.commands.doctor import run_checks
from pipeline.data.manifest_files import load_dataset_spec, read_manifest
from pipeline.data.prepare import prepare
from pipeline.data.spec import load_spec
from pipeline.evaluation.statistics import Scores, paired_bootstrap
from pipeline.extraction.inputs import default_encoders

EMA: dict[str, Any] = {"train": TRAINING, "width": 16}


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> PhotoHome:
    return make_photo_home(tmp_path_factory.mktemp("photos"))


@pytest.fixture(scope="module")
def heads(photos: PhotoHome) -> dict[str, da.Runs]:
    """Three seeds of two methods."""
    ws, caches = photos
    return {
        "ema": ws.train_heads("photos", "ema", seeds=(0, 1, 2), **EMA, **caches),
        "baseline": ws.train_heads("photos", "baseline", seeds=(0, 1, 2), train=TRAINING, **caches),
    }


def test_features_are_in_the_manifest_s_order_and_mark_what_is_missing(photos: PhotoHome) -> None:
    ws, caches = photos
    cache, manifest = ws.cache("photos", caches["image"]), ws.manifest("photos")
    features = ws.features("photos", caches["image"])
    assert features.ids == tuple(sample.id for sample in manifest.samples)
    assert features.array.shape == (3 * NUM_OF_EACH, 32)
    assert features.array.dtype == np.float32
    for row in (0, 17, 59):  # each row by itself, by its id
        np.testing.assert_array_equal(features.array[row], cache.read([features.ids[row]])[0])
    assert [sample_id for sample_id, there in zip(features.ids, features.is_present, strict=True) if not there] == [BROKEN]
    assert np.isnan(features.array[features.ids.index(BROKEN)]).all()
    assert features.labels.tolist() == [sample.labels[0] for sample in manifest.samples]
    assert features.split.tolist() == [sample.split for sample in manifest.samples]
    dataset = features.to_torch()
    assert len(dataset) == 3 * NUM_OF_EACH - 1  # pyright: ignore[reportArgumentType]
    loader = torch.utils.data.DataLoader(dataset, batch_size=100)
    image, label = next(iter(loader))
    assert torch.isfinite(image).all()
    assert label.tolist() == features.labels[features.is_present].tolist()


def test_features_do_not_depend_on_the_order_of_the_cache(photos: PhotoHome, monkeypatch: pytest.MonkeyPatch) -> None:
    ws, caches = photos
    expected = ws.features("photos", caches["image"], "val").array
    manifest = ws.manifest("photos")
    order = np.random.default_rng(0).permutation(len(manifest.samples)).tolist()
    shuffled = replace(manifest, samples=tuple(manifest.samples[k] for k in order), rows=tuple(order))
    monkeypatch.setattr("pipeline.data.manifest_files.read_manifest", lambda *_: shuffled)
    features = ws.features("photos", caches["image"], "val")
    wanted = [sample.id for sample in manifest.split("val")]
    assert list(features.ids) != wanted
    np.testing.assert_array_equal(features.array[[features.ids.index(each) for each in wanted]], expected)


def test_several_texts_become_their_mean_or_the_first(photos: PhotoHome) -> None:
    ws, caches = photos
    cache = ws.cache("photos", caches["text"])
    rows, counts = cache.read_rows([TWO_TEXTS])
    assert counts.tolist() == [2]
    mean, first = (ws.features("photos", caches["text"], aggregate=how) for how in ("mean", "first"))
    at = mean.ids.index(TWO_TEXTS)
    np.testing.assert_allclose(mean.array[at], rows.mean(axis=0), rtol=1e-6)
    np.testing.assert_array_equal(first.array[at], rows[0])
    np.testing.assert_array_equal(ws.features("photos", caches["text"]).array, mean.array)  # the dataset says: mean
    assert not mean.is_present[mean.ids.index(TEXTLESS)]


def test_a_run_shows_its_settings_metrics_history_and_predictions(photos: PhotoHome) -> None:
    ws, caches = photos
    trained = ws.train_head("photos", "seda", seed=3, T=1200, gamma=1.5, settings={"width": 16}, train=TRAINING, **caches)
    assert trained.seed == 3
    assert trained.is_done
    assert {key: trained.config.settings[key] for key in ("num_steps", "width")} == {"num_steps": 1200, "width": 16}
    assert trained.history["val_metric"].notna().sum() == TRAINING["epochs"]
    table = trained.predictions("test")
    assert table["sample_id"].tolist() == [sample.id for sample in ws.manifest("photos").split("test")]
    logits = table.filter(like="logit ").to_numpy()
    class_names = ws.manifest("photos").class_names
    assert table.columns[3:].tolist() == [f"{kind} {name}" for kind in ("logit", "score") for name in class_names]
    np.testing.assert_allclose(table.filter(like="score ").to_numpy(), log_softmax(logits, axis=1), atol=1e-5)
    assert logits.argmax(axis=1).tolist() == table["predicted"].tolist()
    accuracy = 100 * (table["predicted"] == table["label"]).mean()
    assert trained.evaluate("test")["acc1"] == pytest.approx(accuracy)
    assert trained.metrics.loc["test", "acc1"] == pytest.approx(accuracy)
    assert sorted(trained.metrics.index) == ["test", "val"]  # val was scored by train_head
    changed = trained.predictions("test", draws=2)
    assert len(changed) == len(table)
    assert "test@draws=2" in trained.metrics.index
    again = da.load_run(trained.path)
    pd.testing.assert_frame_equal(again.predictions("test"), table)
    assert again.name == trained.name
    assert ws.evaluate(trained.path, "test") == trained.evaluate("test")


def test_runs_are_compared_over_seeds_and_samples(photos: PhotoHome, heads: dict[str, da.Runs]) -> None:
    runs = photos.workspace.runs("photos")
    found = runs.compare("ema", heads["baseline"][0].name, split="test").set_index("metric")
    correct = {}
    for method, own in heads.items():
        tables = [each.predictions("test") for each in own]
        correct[method] = np.array([100.0 * (table["label"] == table["predicted"]) for table in tables])
    row: dict[Any, Any] = found.loc["acc1"].to_dict()
    assert (row["a"], row["b"]) == (heads["ema"][0].name, heads["baseline"][0].name)
    assert (row["a_seeds"], row["b_seeds"]) == (3, 3)
    assert row["a_mean"] == pytest.approx(correct["ema"].mean())
    expected = paired_bootstrap(Scores(correct["ema"], correct["baseline"], None, True))
    assert [row[key] for key in ("difference", "low", "high")] == pytest.approx(expected[:3])
    assert row["low"] <= row["difference"] <= row["high"]
    assert row["verdict"] == "3 of 5 seeds"
    assert np.isnan(row["p_holm"])
    pd.testing.assert_frame_equal(
        photos.workspace.compare("photos", "ema", heads["baseline"][0].name, split="test").set_index("metric"), found
    )


def test_a_comparison_needs_names_of_two_heads(photos: PhotoHome, heads: dict[str, da.Runs]) -> None:
    runs = photos.workspace.runs("photos")
    assert {each.name for each in runs} >= {own[0].name for own in heads.values()}
    assert runs.table.set_index(["name", "seed"])["val acc1"].notna().all()
    with pytest.raises(da.UserError, match="at least two heads"):
        runs.compare("ema")
    with pytest.raises(da.UserError, match="no head of photos that is called 'cdr'; choose one of: baseline-"):
        runs.compare("ema", "cdr")
    with pytest.raises(da.UserError, match="no head of photos that is called ''"):
        runs.compare("", "ema")


def test_a_comparison_reads_the_test_split_of_nobody_else(photos: PhotoHome) -> None:
    ws, caches = photos
    first, second = (ws.train_head("photos", "ema", tau=tau, **EMA, **caches) for tau in (0.3, 0.4))
    for names in (("ema",), (first.name,), (first.name, "ema"), ("", second.name)):
        with pytest.raises(da.UserError):
            ws.compare("photos", *names, split="test")
    with pytest.raises(da.UserError, match=r"unknown split 'tset'.*did you mean 'test'"):
        ws.compare("photos", first.name, second.name, split="tset")
    assert not list(ws.home.glob(f"runs/photos/{first.name}/*/test_reads.jsonl"))
    shutil.copytree(first.path, first.path.with_name("seed0 (copy)"))
    assert [run.path.name for run in ws.runs("photos") if run.name == first.name] == ["seed0"]


def test_features_of_an_empty_split_are_empty(photos: PhotoHome, monkeypatch: pytest.MonkeyPatch) -> None:
    ws, caches = photos
    manifest = ws.manifest("photos")
    kept = tuple(sample for sample in manifest.samples if sample.split != "val")
    fewer = replace(manifest, samples=kept, rows=tuple(range(len(kept))))
    features = read_features(fewer, ws.cache("photos", caches["image"]), "val")
    assert (len(features), features.array.shape, features.is_present.shape) == (0, (0, 32), (0,))


def test_extract_leaves_out_the_text_encoder_of_a_dataset_without_texts(photos: PhotoHome, tmp_path: Path) -> None:
    manifest = photos.workspace.manifest("photos")
    ws = da.Workspace(tmp_path / "home")
    ws.prepare("table", _by_class(manifest, tmp_path / "classes"), name="classes")
    assert default_encoders(ws.home, ws.manifest("classes")) == ["efficientnet_lite"]
    assert default_encoders(photos.workspace.home, manifest) == ["efficientnet_lite", "transformers_text"]


def _by_class(manifest: da.Manifest, root: Path) -> Path:
    """Return a folder with one folder of pictures for each class."""
    for sample in manifest.samples:
        target = root / manifest.class_names[sample.labels[0]] / sample.media.name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(manifest.media_path(sample), target)
    return root


def test_grid_and_report_of_a_named_dataset(photos: PhotoHome) -> None:
    ws, caches = photos
    options: dict[str, Any] = {"train": {**TRAINING, "epochs": 1}, "workers": 0, **caches}
    result = ws.grid("photos", "ema", {"tau": [0.1, 0.2]}, seeds=(0,), width=16, **options)
    assert sorted(result.ranking["tau"]) == [0.1, 0.2]
    numpy_seeds: dict[str, Any] = {"seeds": np.arange(1)}
    one = ws.grid("photos", "ema", {"tau": np.array([0.1, 0.2]), "scale": "global"}, width=16, **options, **numpy_seeds)
    assert one.ranking["scale"].tolist() == ["global", "global"]
    assert (result.folder / "index.html").is_file()
    assert not result.failed
    page, markdown = ws.report("photos")
    assert page.is_file()
    assert "photos" in markdown.read_text()


def test_the_commands_take_the_name_and_find_the_same_runs(
    photos: PhotoHome, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ws, caches = photos
    home = ["--home", str(ws.home)]
    train = ["--set", "width=16", *(f"--train={key}={value}" for key, value in TRAINING.items())]
    names = [f"--{key}={name}" for key, name in caches.items()]
    arguments = ["train-head", "--dataset", "photos", "--method", "ema", "--json", *train, *names, *home]
    assert run(arguments, monkeypatch) == 0
    (row,) = json.loads(capsys.readouterr().out)
    head = ws.train_head("photos", "ema", **EMA, **caches)
    assert Path(row["run"]) == head.path
    assert row["acc1"] == pytest.approx(head.evaluate("val")["acc1"], abs=0.01)
    assert run(["report", "photos", *home], monkeypatch) == 0
    findings = list(run_checks(ws.home, "photos"))
    assert any("the media of photos in" in finding.subject and finding.is_ok for finding in findings)


def test_prepare_gives_several_names_to_one_plug_in(
    photos: PhotoHome, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    root = photos.workspace.manifest("photos").media_root
    options = ["--root", str(root), "--set", "texts_recur=true", "--home", str(tmp_path)]
    for name in ("first", "second"):
        assert run(["prepare", "table", "--name", name, *options], monkeypatch) == 0
    assert run(["prepare", "table", *options], monkeypatch) == 0
    first, second, unnamed = (read_manifest(tmp_path, name) for name in ("first", "second", "table"))
    assert first.fingerprint() == second.fingerprint() == unnamed.fingerprint()
    assert (first.dataset, first.plugin, first.prepare_command) == ("first", "table", "diffalign prepare table --name first")
    assert (unnamed.plugin, unnamed.prepare_command) == ("table", "diffalign prepare table")
    assert "plugin" not in unnamed.meta  # its files are those of before
    assert load_dataset_spec(tmp_path, "first") == load_dataset_spec(tmp_path, "table") == load_spec("table")
    (tmp_path / "manifests" / "first.parquet").unlink()
    with pytest.raises(da.UserError, match=r"run: diffalign prepare table --name first$"):
        read_manifest(tmp_path, "first")
    capsys.readouterr()
    assert run(["prepare", "table", "--name", "openmoji", *options], monkeypatch) == 2
    assert "'openmoji' is a dataset of its own" in capsys.readouterr().err
    with pytest.raises(da.UserError, match="may hold only letters"):
        prepare("table", root, tmp_path, {}, name="../x")


def test_a_named_dataset_has_the_encoders_and_tuned_settings_of_its_plug_in(photos: PhotoHome) -> None:
    ws, caches = photos
    with pytest.raises(da.UserError, match=r"no cache of photos named 'efficientnet_lite'"):
        ws.features("photos", "image")
    with pytest.raises(da.UserError, match=r"table\.yaml has no tuned settings for 'ema'"):
        ws.train_head("photos", "ema", preset="tuned", **caches)
    command = make_provenance(
        dataset="photos", encoder="timm", settings={}, store_dtype="float16", compiled=False, shard_rows=0, batch_size=1
    )["command"]
    assert " photos " in command


def test_mistakes_are_user_errors_that_name_the_choices(photos: PhotoHome, tmp_path: Path) -> None:
    ws, caches = photos
    with pytest.raises(da.UserError, match="unknown method 'sedda'"):
        ws.train_head("photos", "sedda", **caches)
    with pytest.raises(da.UserError, match="unknown setting 'TT'"):
        ws.train_head("photos", "seda", TT=3, **caches)
    with pytest.raises(da.UserError, match="setting 'T' is given twice"):
        ws.train_head("photos", "seda", T=3, settings={"T": 3}, **caches)
    with pytest.raises(da.UserError, match="unknown encoder"):
        ws.extract("photos", "resnet")
    with pytest.raises(da.UserError, match="settings belong to one encoder"):
        ws.extract("photos", width=3)
    with pytest.raises(da.UserError, match="unknown split 'valid'"):
        ws.features("photos", caches["image"], "valid")
    with pytest.raises(da.UserError, match="unknown aggregate 'max'; choose one of: mean, first"):
        ws.features("photos", caches["text"], aggregate="max")  # pyright: ignore[reportArgumentType]
    with pytest.raises(da.UserError, match="unknown aggregate 'max'; choose one of: mean, first, random"):
        ws.train_head("photos", "ema", **{**caches, "aggregate": "max"})
    for seed in (-1, 2**63, 1.5, "0", True):
        with pytest.raises(da.UserError, match=r"a seed must be a whole number in 0\.\.2\^63 - 1"):
            ws.train_head("photos", "ema", seed=seed, **EMA, **caches)  # pyright: ignore[reportArgumentType]
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"seeds": (-1,)}, "a seed must be"),
        ({"seeds": ()}, "needs at least one seed"),
        ({"points": -1}, "at least 0, not -1"),
        ({"search": "half"}, "unknown search 'half'"),
    ]
    for options, message in wrong:
        with pytest.raises(da.UserError, match=message):
            ws.grid("photos", "ema", {"tau": 0.1}, **EMA, **caches, **options)
    with pytest.raises(da.UserError, match="give its values in the order of the setting"):
        ws.prepare("table", tmp_path, splits={"test": 30, "train": 60, "val": 10})
    with pytest.raises(da.UserError, match=r"accumulate must be >= 1"):
        ws.finetune(ws.train_head("photos", "baseline", train=TRAINING, **caches), accumulate=0)
    with pytest.raises(da.UserError, match="is not a run"):
        da.load_run(tmp_path)
    with pytest.raises(da.UserError, match="run: diffalign prepare other"):
        ws.manifest("other")
