"""Files as other programs write them are imported as they are meant, or refused with the remedy; rows are joined by id."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pandas as pd
import pytest
import torch
from helpers.feature_caches import make_cache, make_manifest, stored_numbers
from safetensors import safe_open
from safetensors.numpy import save_file

from pipeline.cache import open_cache
from pipeline.cache.transfer import export_cache, import_features
from pipeline.data.manifest import Manifest
from pipeline.data.manifest_files import write_manifest

NUM = 60
FEATURES = np.random.default_rng(0).normal(size=(NUM, 3)).astype(np.float32)
SUFFIXES = (".h5", ".npy", ".parquet", ".safetensors")


@pytest.fixture
def manifest(tmp_path: Path) -> Manifest:
    return make_manifest(tmp_path, NUM)


def imported(file: Path, manifest: Manifest) -> np.ndarray:
    """Import a file of features, and return the features of all samples."""
    done = import_features(file, file.parent, dataset="toy", name="theirs")
    assert (done.failed, done.unknown) == (0, 0)
    return open_cache(done.path).read([sample.id for sample in manifest.samples])


# --- ids ---


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
@pytest.mark.parametrize("suffix", [".txt", ".json"])
def test_ids_as_windows_programs_write_them(
    manifest: Manifest, tmp_path: Path, encoding: str, line_end: str, suffix: str
) -> None:
    ids = [sample.id for sample in manifest.samples]
    text = line_end.join(ids) + line_end if suffix == ".txt" else json.dumps(ids, indent=1).replace("\n", line_end)
    np.save(tmp_path / "f.npy", FEATURES)
    (tmp_path / f"f{suffix}").write_bytes(text.encode(encoding))
    np.testing.assert_array_equal(imported(tmp_path / "f.npy", manifest), FEATURES)


def test_utf_16_is_refused(manifest: Manifest, tmp_path: Path) -> None:
    np.save(tmp_path / "f.npy", FEATURES)
    (tmp_path / "f.txt").write_text("\n".join(sample.id for sample in manifest.samples), encoding="utf-16")
    with pytest.raises(ValueError, match=r"f\.npy cannot be read: 'utf-8' codec"):
        imported(tmp_path / "f.npy", manifest)


def write_h5(file: Path, features: np.ndarray, ids: list[str]) -> None:
    with h5py.File(file, "w") as opened:
        opened.create_dataset("features", data=features)
        opened.create_dataset("ids", data=ids, dtype=h5py.string_dtype())


def write_npy(file: Path, features: np.ndarray, ids: list[str]) -> None:
    np.save(file, features)
    file.with_suffix(".json").write_text(json.dumps(ids))


def write_parquet(file: Path, features: np.ndarray, ids: list[str]) -> None:
    pd.DataFrame({"id": ids, "features": list(features)}).to_parquet(file)


def write_safetensors(file: Path, features: np.ndarray, ids: list[str]) -> None:
    save_file({"features": features}, file, {"ids": json.dumps(ids)})


WRITERS: dict[str, Callable[[Path, np.ndarray, list[str]], None]] = {
    ".h5": write_h5,
    ".npy": write_npy,
    ".parquet": write_parquet,
    ".safetensors": write_safetensors,
}


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_byte_order_mark_is_no_part_of_the_first_id(manifest: Manifest, tmp_path: Path, suffix: str) -> None:
    ids = [sample.id for sample in manifest.samples]
    WRITERS[suffix](tmp_path / f"f{suffix}", FEATURES, [f"\ufeff{ids[0]}", *ids[1:]])
    np.testing.assert_array_equal(imported(tmp_path / f"f{suffix}", manifest), FEATURES)
    WRITERS[suffix](tmp_path / f"g{suffix}", FEATURES[[0, *range(NUM)]], [f"\ufeff{ids[0]}", *ids])
    done = import_features(tmp_path / f"g{suffix}", tmp_path, dataset="toy", name="both")
    assert (done.unknown, done.first_unknown) == (1, f"\ufeff{ids[0]}")


# --- number formats ---


def bfloat16_bits(dtype: torch.dtype) -> np.ndarray:
    return torch.from_numpy(FEATURES).bfloat16().view(dtype).numpy()


@pytest.mark.parametrize("dtype", [torch.uint16, torch.int16])
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_bits_of_bfloat16_are_refused_with_the_remedy(
    manifest: Manifest, tmp_path: Path, suffix: str, dtype: torch.dtype
) -> None:
    bits, ids = bfloat16_bits(dtype), [sample.id for sample in manifest.samples]
    WRITERS[suffix](tmp_path / f"f{suffix}", bits, ids)
    with pytest.raises(ValueError, match=rf"f\{suffix}: features of type u?int16 look like the bits of bfloat16; .* int32"):
        imported(tmp_path / f"f{suffix}", manifest)
    mended = torch.from_numpy(bits).view(torch.bfloat16).float().numpy()  # the remedy of the message
    WRITERS[suffix](tmp_path / f"mended{suffix}", mended, ids)
    np.testing.assert_allclose(imported(tmp_path / f"mended{suffix}", manifest), FEATURES, rtol=2**-8)
    WRITERS[suffix](tmp_path / f"whole{suffix}", bits.astype(np.int32), ids)
    np.testing.assert_array_equal(imported(tmp_path / f"whole{suffix}", manifest), bits.astype(np.float32))


def test_raw_bfloat16_of_numpy_is_refused_with_the_remedy(manifest: Manifest, tmp_path: Path) -> None:
    """As NumPy saves the arrays of ml_dtypes, of JAX and TensorFlow."""
    write_npy(tmp_path / "f.npy", bfloat16_bits(torch.uint16).view("V2"), [sample.id for sample in manifest.samples])
    with pytest.raises(ValueError, match=r"features of type \|V2 look like the bits of bfloat16"):
        imported(tmp_path / "f.npy", manifest)


# --- labels among the features ---


@pytest.mark.parametrize("label", ["label", "y", "target", "score", "f_label", "g0", "0"])
@pytest.mark.parametrize("place", [0, 3])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_float_column_beside_the_features_is_refused(
    manifest: Manifest, tmp_path: Path, label: str, place: int, dtype: type
) -> None:
    table = pd.DataFrame(FEATURES, columns=["f0", "f1", "f2"])
    table.insert(place, label, np.array([sample.labels[0] for sample in manifest.samples], dtype))
    table.insert(0, "id", [sample.id for sample in manifest.samples])
    table.to_parquet(tmp_path / "f.parquet")
    message = rf"column '{label}' is not numbered like a feature \(f0, f1, …\), and may be a label: leave it out, or put"
    with pytest.raises(ValueError, match=message):
        imported(tmp_path / "f.parquet", manifest)
    table.drop(columns=label).to_parquet(tmp_path / "without.parquet")
    np.testing.assert_array_equal(imported(tmp_path / "without.parquet", manifest), FEATURES)


@pytest.mark.parametrize(
    "names", [["0", "1", "2"], ["emb_000", "emb_001", "emb_002"], ["768", "7", "10"], ["dim.1", "dim.2", "dim.3"]]
)
def test_numbered_columns_are_features(manifest: Manifest, tmp_path: Path, names: list[str]) -> None:
    table = pd.DataFrame(FEATURES, columns=names)
    table.assign(id=[sample.id for sample in manifest.samples]).to_parquet(tmp_path / "f.parquet")
    np.testing.assert_array_equal(imported(tmp_path / "f.parquet", manifest), FEATURES)


def test_columns_without_numbers_and_labels_alone_are_refused(manifest: Manifest, tmp_path: Path) -> None:
    ids = [sample.id for sample in manifest.samples]
    for names in (["mean", "deviation"], ["label"]):
        pd.DataFrame(FEATURES[:, : len(names)], columns=names).assign(id=ids).to_parquet(tmp_path / "f.parquet")
        with pytest.raises(ValueError, match=f"column '{names[0]}' is not numbered like a feature \\(f0, f1"):
            imported(tmp_path / "f.parquet", manifest)


def test_labels_beside_a_column_of_lists_are_left_out(manifest: Manifest, tmp_path: Path) -> None:
    table = pd.DataFrame({"id": [sample.id for sample in manifest.samples], "label": 1.0, "features": list(FEATURES)})
    table.to_parquet(tmp_path / "f.parquet")
    np.testing.assert_array_equal(imported(tmp_path / "f.parquet", manifest), FEATURES)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_label_among_the_numbers_is_said(
    manifest: Manifest, tmp_path: Path, suffix: str, capsys: pytest.CaptureFixture[str]
) -> None:
    labels = np.array([sample.labels[0] for sample in manifest.samples])
    codes = np.array([7, 3, 12, 0, 5])[labels]  # the numbers of classes in another program
    ids = [sample.id for sample in manifest.samples]
    WRITERS[suffix](tmp_path / f"f{suffix}", np.column_stack([FEATURES, codes]).astype(np.float32), ids)
    import_features(tmp_path / f"f{suffix}", tmp_path, dataset="toy", name="theirs")
    assert "number 3 of each row in " in (said := capsys.readouterr().err)
    assert "is the label itself: save the features without it" in said
    innocent = np.column_stack([FEATURES, codes == 7, labels % 2, np.zeros(NUM), np.arange(NUM), codes + (np.arange(NUM) == 4)])
    WRITERS[suffix](tmp_path / f"g{suffix}", innocent.astype(np.float32), ids)
    import_features(tmp_path / f"g{suffix}", tmp_path, dataset="toy", name="ours")
    assert "label" not in capsys.readouterr().err


# --- the order of rows ---


@pytest.fixture
def shuffled(tmp_path: Path) -> Manifest:
    """The manifest of 1,300 samples in random order of splits: its table is sorted by split, the rows of caches are not."""
    return make_manifest(tmp_path, 1300)


def read_export(file: Path) -> tuple[np.ndarray, list[str], list[str]]:
    """Return features, ids and splits by the libraries of the formats alone."""
    if file.suffix == ".h5":
        with h5py.File(file) as opened:
            columns: Any = {name: np.asarray(opened[name]) for name in ("features", "ids", "splits")}
        ids, splits = ([value.decode() for value in columns[name]] for name in ("ids", "splits"))
        return columns["features"], ids, splits
    if file.suffix == ".parquet":
        table = pd.read_parquet(file)
        return np.stack(table["features"].tolist()), table["id"].tolist(), table["split"].tolist()
    if file.suffix == ".npy":
        sidecar = json.loads(file.with_suffix(".json").read_text())
        return np.load(file), sidecar["ids"], sidecar["splits"]
    with safe_open(file, framework="np") as opened:
        metadata = opened.metadata()
        return opened.get_tensor("features"), json.loads(metadata["ids"]), json.loads(metadata["splits"])


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_an_export_can_have_the_order_of_the_manifest(
    shuffled: Manifest, tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.cache.exchange.EXCHANGE_BLOCK_BYTES", 1)  # blocks of 512 rows
    features = stored_numbers(np.random.default_rng(1), (1300, 4), "float16")
    path = make_cache(tmp_path, shuffled, features, shard_rows=512)
    with (tmp_path / "manifests" / "toy.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    found, ids, splits = read_export(export_cache(path, tmp_path / f"m{suffix}", "manifest"))
    assert ids == [row["sample_id"] for row in rows]
    assert ids != open_cache(path).ids
    assert splits == [row["split"] for row in rows]
    np.testing.assert_array_equal(found, features[[int(row["source_row"]) for row in rows]].astype(np.float16))
    with pytest.raises(
        ValueError, match=r"has the order of the manifest, and makes no cache again: export without --order, or"
    ):
        import_features(tmp_path / f"m{suffix}", tmp_path / "other")
    done = import_features(tmp_path / f"m{suffix}", tmp_path, dataset="toy", name="again")
    again = open_cache(done.path)
    np.testing.assert_array_equal(again.read([sample.id for sample in shuffled.samples]), features)
    assert again.failed_ids == open_cache(path).failed_ids == {shuffled.samples[3].id}


def test_several_rows_of_a_sample_stay_together(shuffled: Manifest, tmp_path: Path) -> None:
    counts = np.random.default_rng(5).integers(0, 5, 1300)
    offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    features = stored_numbers(np.random.default_rng(1), (int(offsets[-1]), 2), "bfloat16")
    path = make_cache(tmp_path, shuffled, features, offsets=offsets, store_dtype="bfloat16", shard_rows=512)
    export_cache(path, tmp_path / "m.h5", "manifest")
    with h5py.File(tmp_path / "m.h5") as opened:
        bits, starts, about = (np.asarray(opened[name]) for name in ("features", "offsets", "about"))
        ids = [value.decode() for value in np.asarray(opened["ids"])]
    found = torch.from_numpy(bits.view(np.int16)).view(torch.bfloat16).float().numpy()
    row_of = {sample.id: row for row, sample in enumerate(shuffled.samples)}
    for position, sample_id in enumerate(ids):
        row = row_of[sample_id]
        np.testing.assert_array_equal(found[starts[position] : starts[position + 1]], features[offsets[row] : offsets[row + 1]])
    failures = json.loads(about.item())["failures"]
    assert [failure["row"] for failure in failures] == np.flatnonzero(np.isnan(found).any(axis=1)).tolist()


def test_a_feature_is_that_of_its_id_wherever_it_lies(
    shuffled: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By `Cache.read`, and by the program of docs/features.md, which needs Zarr alone."""
    features = np.random.default_rng(3).normal(size=(1300, 3)).astype(np.float32)
    path = make_cache(tmp_path / "artifacts", shuffled, features, store_dtype="float32")
    write_manifest(shuffled, tmp_path / "artifacts")
    ids = [sample.id for sample in shuffled.samples]
    cache = open_cache(path)
    for order in (ids, ids[::-1], ids[700:705] * 2):
        np.testing.assert_array_equal(cache.read(order), np.stack([features[ids.index(each)] for each in order]))
    page = (Path(__file__).parents[2] / "docs" / "features.md").read_text(encoding="utf-8")
    (program,) = re.findall(r"```python\n(import pandas.*?)```", page, re.DOTALL)
    program = program.replace("efficientnet_lite-0123456789ab", path.name).replace("openmoji", "toy")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(program, names)
    assert list(names["table"]["sample_id"]) != ids
    np.testing.assert_array_equal(names["array"], cache.read(list(names["table"]["sample_id"])))
