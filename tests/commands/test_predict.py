"""New pictures through a trained run: what goes in and comes out, what a copied run needs, and what changes nothing."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import replace
from functools import partial
from glob import glob
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from helpers.command_line import run
from helpers.photos import BROKEN, TRAINING, PhotoHome, make_photo_home
from PIL import Image
from scipy.special import softmax

import pipeline as da
from pipeline.data.folds import write_folds
from pipeline.data.media_files import manifest_of_files
from pipeline.encoders._factory import with_files_of
from pipeline.evaluation.classify import ROWS_AT_ONCE, Classifier, find_any_cache
from pipeline.evaluation.inference_spec import ENCODER_FOLDER
from pipeline.extraction.inputs import EncoderInputs
from pipeline.extraction.new_media import encode_files
from pipeline.runtime.logs import inert

DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> PhotoHome:
    return make_photo_home(tmp_path_factory.mktemp("predict"))


@pytest.fixture(scope="module")
def seda(photos: PhotoHome) -> da.Run:
    """A head whose chain starts from noise."""
    settings: dict[str, Any] = {"width": 16, "eta": 1.0}
    return photos.workspace.train_head("photos", "seda", train=TRAINING, settings=settings, **photos.caches)


@pytest.fixture
def copied(seda: da.Run, tmp_path: Path) -> Path:
    """A copy of the run alone, far from its home."""
    return Path(shutil.copytree(seda.path, tmp_path / "copied" / "seed0"))


def pictures_of(photos: PhotoHome) -> Path:
    return photos.workspace.manifest("photos").media_root


def probabilities(table: pd.DataFrame) -> np.ndarray:
    """The probabilities by class name, in the order of the rows."""
    return np.array([[dict(zip(row[1:-1:2], row[2:-1:2], strict=True))[name] for name in ("blue", "green", "red")]
                     for row in table[table["error"] == ""].itertuples(index=False)])  # fmt: skip


def test_a_picture_has_the_features_and_the_classes_that_it_has_in_the_cache(photos: PhotoHome, seda: da.Run) -> None:
    home, manifest = photos.workspace.home, photos.workspace.manifest("photos")
    classifier = Classifier.of(seda.folder, home)
    files = [str(manifest.media_path(sample)) for sample in manifest.samples]
    encoded = list(encode_files(files, classifier.spec.build_encoder(seda.folder), classifier.spec.store_dtype, workers=0))
    cache = find_any_cache(home, "random_projection", classifier.spec)  # of pictures, not that of texts
    ids = [sample.id for sample in manifest.samples]
    np.testing.assert_array_equal(np.concatenate([each.features for each in encoded]), cache.read(ids))
    table = seda.predict(files, top=3, workers=2)
    stored = list(classifier.classify_cache(cache, home))
    assert [name for rows in stored for name in rows.names] == cache.ids
    by_id = {name: own for rows in stored for name, own in zip(rows.names, rows.probabilities, strict=True)}
    expected = np.array([by_id[each] for each in ids if each != BROKEN])
    np.testing.assert_allclose(probabilities(table), expected, rtol=1e-6)
    assert table.loc[table["error"] != "", "file"].tolist() == [files[ids.index(BROKEN)]]
    test_ids = [sample.id for sample in manifest.split("test")]
    (test,) = classifier.classify_cache(cache, home, "test")
    assert list(test.names) == test_ids
    log = (seda.path / "test_reads.jsonl").read_text().splitlines()
    assert [json.loads(line)["evaluation"] for line in log] == [f"predict {cache.path.name}"] * 2


def test_noise_belongs_to_the_content_of_a_file(photos: PhotoHome, seda: da.Run, tmp_path: Path) -> None:
    names = ["red-1", "blue-2", "green-7"]
    for name in names:
        shutil.copyfile(pictures_of(photos) / f"{name}.png", tmp_path / f"copy of {name[::-1]}.png")
    own = probabilities(seda.predict([pictures_of(photos) / f"{name}.png" for name in names], top=3))
    for number, name in enumerate(names):  # alone, under another name
        alone = probabilities(seda.predict(tmp_path / f"copy of {name[::-1]}.png", top=3))
        np.testing.assert_allclose(alone[0], own[number], rtol=1e-4)
    Image.open(pictures_of(photos) / "red-1.png").save(tmp_path / "packed.png", compress_level=0)  # the same pixels
    other = probabilities(seda.predict(tmp_path / "packed.png", top=3))
    assert np.abs(other - own[0]).max() > 1e-3


def test_probabilities_are_those_of_the_validation_temperature(photos: PhotoHome) -> None:
    head = photos.workspace.train_head("photos", "baseline", train=TRAINING, **photos.caches)
    temperature = json.loads((head.path / "calibration.json").read_text())["temperature"]
    known = head.predictions("val").set_index("sample_id")
    table = head.predict([pictures_of(photos) / f"{name}.png" for name in known.index], top=3)
    logits = known[["logit blue", "logit green", "logit red"]].to_numpy()
    np.testing.assert_allclose(probabilities(table), softmax(logits / temperature, axis=1), rtol=1e-4)
    assert f"temperature {temperature:.3g}, chosen on 9 validation samples" in table.attrs["calibration"]
    (head.path / "calibration.json").unlink()  # as runs of earlier versions
    again = head.predict(pictures_of(photos) / "red-1.png")
    assert again.attrs == table.attrs
    assert (head.path / "calibration.json").is_file()


def test_a_copied_run_needs_no_home(copied: Path, photos: PhotoHome, seda: da.Run) -> None:
    picture = pictures_of(photos) / "red-1.png"
    pd.testing.assert_frame_equal(da.load_run(copied).predict(picture), seda.predict(picture))
    spec = json.loads((copied / "predict.json").read_text())
    assert spec["class_names"] == ["blue", "green", "red"]
    spec["encoder_identity"]["seed"] = 7  # other weights
    (copied / "predict.json").write_text(json.dumps(spec))
    with pytest.raises(da.UserError, match=r"trained with encoder.seed = 7, which is 0 here"):
        da.load_run(copied).predict(picture)


def test_runs_of_earlier_versions_get_what_they_lack_from_their_home(copied: Path, photos: PhotoHome) -> None:
    picture = pictures_of(photos) / "red-1.png"
    (copied / "predict.json").unlink()
    with pytest.raises(da.UserError, match=r"has no predict.json, and its data are not in .*predict once where the home"):
        da.load_run(copied).predict(picture)
    assert len(da.load_run(copied, photos.workspace.home).predict(picture)) == 1
    assert len(da.load_run(copied).predict(picture)) == 1  # it carries it now


def test_files_of_the_encoder_may_lie_in_the_run(tmp_path: Path) -> None:
    there, gone = tmp_path / "there.pth", tmp_path / "elsewhere" / "gone.pth"
    there.touch()
    settings = {"model": "test_vit", "weights": str(there), "layer": "3"}
    assert with_files_of(settings, tmp_path / ENCODER_FOLDER) == settings
    nested = {"weights": str(gone), "settings": f"model={gone},layer=3"}
    with pytest.raises(da.UserError, match=rf"not on this machine: copy it to {tmp_path / ENCODER_FOLDER / 'gone.pth'}"):
        with_files_of(nested, tmp_path / ENCODER_FOLDER)
    carried = tmp_path / ENCODER_FOLDER / "gone.pth"
    carried.parent.mkdir()
    carried.touch()
    moved = with_files_of(nested, tmp_path / ENCODER_FOLDER)
    assert moved == {"weights": str(carried), "settings": f"model={carried},layer=3"}


def test_clips_are_classified_by_their_frames(seda: da.Run, tmp_path: Path) -> None:
    """An animation of one colour has the features of a picture of that colour."""
    frames = [Image.new("RGB", (16, 16), colour) for colour in ((200, 30, 30), (200, 30, 31))]
    frames[0].save(tmp_path / "still.png")
    frames[0].save(tmp_path / "clip.gif", save_all=True, append_images=frames[1:])
    classifier = Classifier.of(seda.folder, seda.home)
    settings = {"encoder": "random_projection", "settings": "width=32", "num_frames": "2"}
    image = {"name": "random_projection", **classifier.spec.encoder_identity}
    identity = {"name": "frames", "modality": "video", "image": image, "num_frames": 2}
    spec = replace(classifier.spec, encoder="frames", encoder_settings=settings, encoder_identity=identity)
    (clip,) = encode_files([str(tmp_path / "clip.gif")], spec.build_encoder(seda.folder), spec.store_dtype)
    (still,) = encode_files([str(tmp_path / "still.png")], classifier.spec.build_encoder(seda.folder), spec.store_dtype)
    np.testing.assert_allclose(clip.features, still.features, atol=0.02)
    (rows,) = replace(classifier, spec=spec).classify_files([str(tmp_path / "clip.gif"), str(tmp_path / "still.png")])
    assert [bool(error) for error in rows.errors] == [False, False]  # a picture is a clip of one frame, as in `extract`


def test_results_come_while_files_are_read(seda: da.Run, monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[int] = []
    prepare = EncoderInputs._prepare
    monkeypatch.setattr(EncoderInputs, "_prepare", lambda self, row: tried.append(row) or prepare(self, row))
    files = [f"nowhere/{number}.png" for number in range(4 * ROWS_AT_ONCE)]
    first = next(Classifier.of(seda.folder, seda.home).classify_files(files, workers=0))
    assert list(first.names) == files[: len(first.names)]
    assert first.errors == ["no such file"] * len(first.names)
    assert len(tried) == len(first.names) < len(files) / 2


def test_other_caches_are_refused(photos: PhotoHome, seda: da.Run) -> None:
    classifier, home = Classifier.of(seda.folder, seda.home), seda.home
    with pytest.raises(da.UserError, match=r"no cache fits --cache 'photo'; .* there are: photos/random_projection-"):
        find_any_cache(home, "photo", classifier.spec)
    texts = find_any_cache(home, f"photos/{photos.caches['text']}", classifier.spec)
    with pytest.raises(da.UserError, match="features of shape"):
        next(classifier.classify_cache(texts, home))
    other = photos.workspace.extract("photos", "random_projection", width=32, seed=5, workers=0, max_failures=0.1)
    with pytest.raises(da.UserError, match=r"made with encoder.seed = 5, and .* was trained with 0"):
        next(classifier.classify_cache(other["random_projection"], home))
    with pytest.raises(da.UserError, match="which were computed elsewhere or by a plug-in"):
        replace(classifier.spec, encoder="imported").build_encoder(seda.folder)


@pytest.mark.parametrize(
    ("file", "changed", "message"),
    [
        (
            "predict.json",
            {"class_names": ["blue"]},
            r"is damaged \(it names 1 classes, and the head has 3\); delete",
        ),
        ("predict.json", {"label_kind": "x"}, r"label_kind is 'x'"),
        ("calibration.json", {"temperature": 0}, r"calibration.json is damaged .*temperature is not above 0\); delete it"),
    ],
)
def test_records_that_do_not_fit_are_refused(copied: Path, file: str, changed: dict[str, Any], message: str) -> None:
    recorded = json.loads((copied / file).read_text()) if (copied / file).is_file() else {"kind": "softmax"}
    (copied / file).write_text(json.dumps(recorded | changed))
    with pytest.raises(da.UserError, match=message):
        Classifier.of(da.load_run(copied).folder, copied)


def test_the_file_that_is_read_is_the_one_that_is_named(tmp_path: Path) -> None:
    """A folder above a link is that of its target."""
    (tmp_path / "target" / "inner").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "target" / "inner")
    (tmp_path / "target" / "a.png").write_bytes(b"right")
    (tmp_path / "a.png").write_bytes(b"wrong")
    manifest = manifest_of_files([str(tmp_path / "link" / ".." / "a.png")], "image")
    assert manifest.media_path(manifest.samples[0]).read_bytes() == b"right"


def test_texts_and_features_of_another_manifest_are_refused(photos: PhotoHome, copied: Path) -> None:
    home = photos.workspace.home
    classifier = Classifier.of(da.load_run(copied).folder, home)
    cache = find_any_cache(home, "photos/random_projection", classifier.spec)
    texts = replace(cache, identity={**cache.identity, "text": {}})
    with pytest.raises(da.UserError, match="texts cannot be classified"):
        next(classifier.classify_cache(texts, home))
    stale = replace(cache, identity={**cache.identity, "manifest": "0" * 64})
    with pytest.raises(da.UserError, match=r"made from another manifest than that of photos .*: diffalign extract photos"):
        next(classifier.classify_cache(stale, home, "val"))


def test_a_run_of_a_fold_logs_reads_of_the_test_split_of_the_whole(photos: PhotoHome, copied: Path) -> None:
    home = photos.workspace.home
    (copied / "test_reads.jsonl").unlink(missing_ok=True)
    classifier = Classifier.of(da.load_run(copied).folder, home)
    cache = find_any_cache(home, "photos/random_projection", classifier.spec)
    of_fold = replace(classifier, spec=replace(classifier.spec, dataset=write_folds(home, "photos", 2)[0]))
    for split in ("val", "test", None):
        next(of_fold.classify_cache(cache, home, split))
    assert len((copied / "test_reads.jsonl").read_text().splitlines()) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere.png"], "none of 1 could be classified; the first: nowhere.png: no such file"),
        (["a*.png"], "no file fits the pattern a*.png"),
        (
            ["s3://bucket/a.png"],
            "s3://… is an address, and pictures and clips are read from files: copy them to a disk, or mount",
        ),
        ([], "give the pictures to classify, or --cache NAME"),
        (["x.png", "--cache", "y"], "give the pictures to classify, or --cache NAME, and not both"),
        (["x.png", "--split", "val"], "--split is one of a --cache"),
        (["x.png", "--out", "x.xlsx"], "choose one of: .csv, .jsonl, .parquet"),
        (["."], "no picture or video is in this folder"),
        (["\x1b]0;x"], r"the first: \x1b]0;x: no such file"),
    ],
)
def test_mistakes_are_one_line(
    arguments: list[str], message: str, copied: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (copied.parent / "empty").mkdir()
    monkeypatch.chdir(copied.parent / "empty")
    assert run(["predict", str(copied), *arguments], monkeypatch) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_files_and_names_of_others_are_inert(
    copied: Path, photos: PhotoHome, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    hostile = ["=1+1.png", "\x1b[31m.png", "\u202egnp.x", "b\udcff.png"]
    (tmp_path / "new").mkdir()
    for name in hostile:
        shutil.copyfile(pictures_of(photos) / "red-1.png", tmp_path / "new" / name)
    (tmp_path / "new" / "broken.png").write_bytes(b"no picture")
    spec = json.loads((copied / "predict.json").read_text())
    (copied / "predict.json").write_text(json.dumps({**spec, "class_names": ["=cmd|' /C calc'!A0", "\x1b]0;x\x07", "plain"]}))
    monkeypatch.chdir(tmp_path / "new")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\0".join(map(os.fsencode, hostile)))))
    assert run(["predict", str(copied), "-", "broken.png", "--top", "3"], monkeypatch) == 0
    table = capsys.readouterr()
    assert not re.search(r"[\x00-\x09\x0b-\x1f\u202e\udc80-\udcff]", table.out + table.err)
    assert table.out.splitlines()[2].startswith(r"\x1b[31m.png")
    assert "failed: not a JPEG" in table.out.splitlines()[5]
    assert "warning: 1 of 5 failed; the first: broken.png: not a JPEG" in table.err
    tables = []
    for suffix in ("csv", "jsonl", "parquet"):
        out = tmp_path / f"out.{suffix}"
        assert run(["predict", str(copied), *hostile[:3], "broken.png", "--top", "9", f"--out={out}"], monkeypatch) == 0
        read: dict[str, Any] = {"csv": pd.read_csv, "jsonl": partial(pd.read_json, lines=True), "parquet": pd.read_parquet}
        tables.append(read[suffix](out))
    assert capsys.readouterr().out.count("file: ") == 3
    pd.testing.assert_frame_equal(tables[1], tables[2], check_dtype=False)
    assert tables[2]["file"].tolist() == [*hostile[:3], "broken.png"]
    assert list(tables[2].columns) == [
        "file",
        *(f"{kind}_{k}" for k in (1, 2, 3) for kind in ("class", "probability")),
        "error",
    ]
    assert tables[2].iloc[3, 1:-1].isna().all()
    np.testing.assert_allclose(tables[2].iloc[:3, 2:-1:2].astype(float).sum(axis=1), 1)
    cells = [cell for row in csv.reader((tmp_path / "out.csv").open(newline="")) for cell in row]
    assert "'=1+1.png" in cells
    assert not [cell for cell in cells if cell.startswith(("=", "+", "@"))]


def test_what_a_terminal_would_obey_is_spelled_out() -> None:
    assert inert("a\x1b[2J\u202e\n\udcff") == r"a\x1b[2J\u202e\n\udcff"
    assert inert("naïve 👩‍🚀 猫") == "naïve 👩‍🚀 猫"


def test_the_commands_of_the_page_run(
    photos: PhotoHome, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As written, in a folder whose home is `artifacts`; a pipe feeds standard input."""
    page = (DOCS / "predict.md").read_text(encoding="utf-8")
    shutil.copytree(photos.workspace.home, tmp_path / "artifacts")
    monkeypatch.chdir(tmp_path)
    settings = [f"--{key}={name}" for key, name in photos.caches.items()]
    training = [f"--train={key}={value}" for key, value in TRAINING.items()]
    assert run(["train-head", "photos", "--method=ema", "--set=width=16", *settings, *training], monkeypatch) == 0
    for name in ("new/cat.png", "new/more/dog.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(pictures_of(photos) / "red-1.png", name)
    (tmp_path / "copied").mkdir()
    lines = [line for block in re.findall(r"```bash\n(.*?)```", page, re.DOTALL) for line in block.splitlines()]
    for line in lines:
        before, _, command = line.rpartition(" | ")
        if before:
            found = subprocess.run(before, shell=True, check=True, capture_output=True).stdout
            monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(found)))
        program, *words = shlex.split(command)
        words = [each for word in words for each in (sorted(glob(word)) if word.startswith("artifacts/") else [word])]
        if program == "diffalign":
            assert run(words, monkeypatch) == 0, (line, capsys.readouterr().err)
        else:
            subprocess.run([program, *words], check=True)
    assert len(lines) == 7
    assert [len(pd.read_csv("labels.csv")), len(pd.read_parquet("labels.parquet"))] == [2, 2]
    assert len(pd.read_json("labels.jsonl", lines=True)) == len(photos.workspace.manifest("photos").split("test"))
    (block,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    names: dict[str, Any] = {}
    exec(block, names)
    assert names["table"]["file"].tolist() == ["new/cat.png", "new/more/dog.png"]
    assert (Path.cwd() / "copied" / "seed0" / "predict.json").is_file()
