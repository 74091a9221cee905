"""Export and import: the imported cache has the same bits, any library reads the file, and other features are joined by id."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch
from helpers.feature_caches import COMMAND, assert_same_cache, make_cache, make_manifest, stored_numbers
from safetensors.numpy import save_file
from safetensors.torch import load_file

from pipeline.cache import info, open_cache, verify
from pipeline.cache.reader import find_cache, read_commits
from pipeline.cache.table import load_split
from pipeline.cache.transfer import export_cache, import_features
from pipeline.data.manifest import Manifest

SUFFIXES = (".h5", ".npy", ".parquet", ".safetensors")
NUM = 1300  # samples; three shards of 512 rows


@pytest.fixture
def manifest(tmp_path: Path) -> Manifest:
    return make_manifest(tmp_path / "home", NUM)


def ragged_offsets(num_samples: int) -> np.ndarray:
    """Return offsets that give each sample 0 to 4 rows."""
    counts = np.random.default_rng(5).integers(0, 5, num_samples)
    return np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize(
    ("store_dtype", "shape", "ragged"),
    [
        ("float16", (6,), False),
        ("float32", (2, 3), False),
        ("bfloat16", (6,), False),
        ("float16", (5,), True),
        ("bfloat16", (2, 2), True),
    ],
)
def test_round_trip_is_exact(
    manifest: Manifest, tmp_path: Path, suffix: str, store_dtype: str, shape: tuple[int, ...], ragged: bool
) -> None:
    offsets = ragged_offsets(NUM) if ragged else None
    rows = int(offsets[-1]) if offsets is not None else NUM
    features = stored_numbers(np.random.default_rng(1), (rows, *shape), store_dtype)
    path = make_cache(tmp_path / "home", manifest, features, offsets=offsets, store_dtype=store_dtype, shard_rows=512)
    file = export_cache(path, tmp_path / f"out{suffix}")
    done = import_features(file, tmp_path / "other")
    assert done.path == tmp_path / "other" / path.relative_to(tmp_path / "home")
    assert (done.samples, done.failed, done.unknown) == (NUM, 1, 0)
    assert verify(done.path) == []
    assert_same_cache(path, done.path)
    before = {file: file.stat().st_mtime_ns for file in done.path.rglob("commits/0*.json")}
    assert import_features(file, tmp_path / "other") == done  # a second import changes nothing
    assert {file: file.stat().st_mtime_ns for file in done.path.rglob("commits/0*.json")} == before


def read_h5(file: Path) -> tuple[np.ndarray, list[str], list[str], list[list[int]]]:
    with h5py.File(file) as opened:
        columns = {name: np.asarray(opened[name]) for name in ("features", "labels")}
        ids, splits = ([value.decode() for value in np.asarray(opened[name])] for name in ("ids", "splits"))
        return columns["features"], ids, splits, [labels.tolist() for labels in columns["labels"]]


def read_npy(file: Path) -> tuple[np.ndarray, list[str], list[str], list[list[int]]]:
    sidecar = json.loads(file.with_suffix(".json").read_text())
    return np.load(file), sidecar["ids"], sidecar["splits"], sidecar["labels"]


def read_parquet(file: Path) -> tuple[np.ndarray, list[str], list[str], list[list[int]]]:
    table = pd.read_parquet(file)
    features = np.stack(table["features"].tolist())
    return features, table["id"].tolist(), table["split"].tolist(), [labels.tolist() for labels in table["labels"]]


def read_safetensors(file: Path) -> tuple[np.ndarray, list[str], list[str], list[list[int]]]:
    from safetensors import safe_open

    with safe_open(file, framework="np") as opened:
        metadata = {key: json.loads(value) for key, value in opened.metadata().items()}
    return load_file(file)["features"].numpy(), metadata["ids"], metadata["splits"], metadata["labels"]


READERS = (read_h5, read_npy, read_parquet, read_safetensors)


@pytest.mark.parametrize(("suffix", "read"), list(zip(SUFFIXES, READERS, strict=True)))
def test_any_library_reads_an_export(
    manifest: Manifest, tmp_path: Path, suffix: str, read: Callable[[Path], tuple[Any, ...]]
) -> None:
    features = stored_numbers(np.random.default_rng(2), (NUM, 4), "float16")
    found, ids, splits, labels = read(
        export_cache(make_cache(tmp_path / "home", manifest, features), tmp_path / f"out{suffix}")
    )
    assert found.dtype == np.float16
    np.testing.assert_array_equal(found, features.astype(np.float16))
    assert ids == [sample.id for sample in manifest.samples]
    assert splits == [sample.split for sample in manifest.samples]
    assert [tuple(sample_labels) for sample_labels in labels] == [sample.labels for sample in manifest.samples]


def test_bfloat16_is_bfloat16_to_torch(manifest: Manifest, tmp_path: Path) -> None:
    features = np.random.default_rng(3).normal(size=(NUM, 4)).astype(np.float32)
    path = make_cache(tmp_path / "home", manifest, features, store_dtype="bfloat16")
    found = load_file(export_cache(path, tmp_path / "out.safetensors"))["features"]
    torch.testing.assert_close(found, torch.from_numpy(features).bfloat16(), rtol=0, atol=0)


def write_h5(file: Path, features: np.ndarray, ids: list[str]) -> None:
    with h5py.File(file, "w") as opened:
        opened.create_dataset("features", data=features, compression="gzip")
        opened.create_dataset("ids", data=[sample_id.encode() for sample_id in ids])


def write_npy(file: Path, features: np.ndarray, ids: list[str]) -> None:
    np.save(file, np.asfortranarray(features))
    file.with_suffix(".txt").write_text("\n".join(ids) + "\n")


def write_npy_json(file: Path, features: np.ndarray, ids: list[str]) -> None:
    np.save(file, features.astype(">f8"))
    file.with_suffix(".json").write_text(json.dumps(ids))


def write_lists(file: Path, features: np.ndarray, ids: list[str]) -> None:
    pd.DataFrame({"id": ids, "features": list(features), "caption": "none", "count": 5}).to_parquet(file, row_group_size=100)


def write_columns(file: Path, features: np.ndarray, ids: list[str]) -> None:
    table = pd.DataFrame(features, columns=[f"f{column}" for column in range(features.shape[1])])
    table.assign(id=ids).to_parquet(file)


def write_metadata(file: Path, features: np.ndarray, ids: list[str]) -> None:
    save_file({"features": features, "other": np.zeros(3)}, file, {"ids": json.dumps(ids)})


def write_sidecar(file: Path, features: np.ndarray, ids: list[str]) -> None:
    save_file({"features": features}, file)
    file.with_suffix(".json").write_text(json.dumps({"ids": ids}))


WRITERS: dict[Callable[[Path, np.ndarray, list[str]], None], str] = {
    write_h5: ".hdf5",
    write_npy: ".npy",
    write_npy_json: ".npy",
    write_lists: ".parquet",
    write_columns: ".parquet",
    write_metadata: ".safetensors",
    write_sidecar: ".safetensors",
}


@pytest.mark.parametrize("write", WRITERS)
def test_features_from_elsewhere_are_joined_by_id(
    manifest: Manifest, tmp_path: Path, write: Callable[[Path, np.ndarray, list[str]], None]
) -> None:
    home, rng = tmp_path / "home", np.random.default_rng(4)
    features = rng.normal(size=(NUM, 7)).astype(np.float32)
    features[11, 3] = np.inf
    order = rng.permutation(NUM)[:-2]  # two samples have no row
    missing = sorted(set(range(NUM)) - set(order.tolist()))
    ids = [manifest.samples[row].id for row in order] + ["stranger", "other"]
    file = tmp_path / f"theirs{WRITERS[write]}"
    write(file, np.concatenate([features[order], np.ones((2, 7), np.float32)]), ids)
    done = import_features(file, home, dataset="toy", name="clip-vit")
    failed = sorted({11, *missing})
    assert (done.samples, done.failed, done.unknown, done.first_unknown) == (NUM, len(failed), 2, "stranger")
    assert verify(done.path) == []
    cache = find_cache(home, manifest, "clip-vit")
    assert cache.path == done.path
    expected = features.copy()
    expected[failed] = np.nan
    np.testing.assert_array_equal(cache.read([sample.id for sample in manifest.samples]), expected)
    failures = [failure for commit in read_commits(done.path)[0] for failure in commit.failures]
    assert [failure.row for failure in failures] == failed
    assert {failure.stage for failure in failures} == {"import"}
    assert {f.error for f in failures} == {"a feature is not finite as float32", f"{file.name} has no row of it"}
    assert cache.identity["encoder"]["modality"] == "image"
    options = "--dataset toy --name clip-vit --modality media --store-dtype same --max-failures 0.05"
    assert cache.provenance["command"] == f"diffalign cache import {file.name} {options}"
    table = load_split(manifest, {"image": cache}, "train", torch.device("cpu"), "mean")
    rows = [int(sample_id.rsplit("/")[1]) for sample_id in table.ids]
    assert rows == [row for row, sample in enumerate(manifest.samples) if sample.split == "train" and row not in failed]
    np.testing.assert_array_equal(table.columns["image"].numpy(), features[rows])


def test_the_identity_follows_features_ids_and_number_format(manifest: Manifest, tmp_path: Path) -> None:
    features = np.random.default_rng(5).normal(size=(NUM, 3)).astype(np.float16)
    ids = [sample.id for sample in manifest.samples]

    def imported(change: float, names: list[str], store_dtype: Any = "same") -> str:
        write_npy(tmp_path / "theirs.npy", features + np.float16(change), names)
        done = import_features(tmp_path / "theirs.npy", tmp_path / "home", dataset="toy", name="x", store_dtype=store_dtype)
        return info(done.path)["store_dtype"] + done.path.name

    swapped = [ids[1], ids[0], *ids[2:]]
    names = {
        imported(0, ids),
        imported(1, ids),
        imported(0, swapped),
        imported(0, ids, "float32"),
        imported(0, ids, "bfloat16"),
    }
    assert len(names) == 5
    assert imported(0, ids) in names
    assert sorted(name[:7] for name in names) == ["bfloat1", "float16", "float16", "float16", "float32"]


def test_numbers_too_large_for_the_store_are_failures_up_to_the_share(manifest: Manifest, tmp_path: Path) -> None:
    features = np.ones((NUM, 3), np.float32)
    features[:10] = 1e5
    write_npy(tmp_path / "big.npy", features, [sample.id for sample in manifest.samples])

    def run(max_failures: float) -> int:
        arguments: dict[str, Any] = {"dataset": "toy", "name": "big", "store_dtype": "float16", "max_failures": max_failures}
        return import_features(tmp_path / "big.npy", tmp_path / "home", **arguments).failed

    with pytest.raises(ValueError, match=r"10 of 1300 samples .* more than --max-failures 0.005 .* not finite as float16"):
        run(0.005)
    assert not list((tmp_path / "home" / "caches").rglob("zarr.json"))
    assert run(0.01) == 10
    write_npy(tmp_path / "big.npy", features[700:], [sample.id for sample in manifest.samples[700:]])
    with pytest.raises(ValueError, match=r"700 of 1300 samples .* more than --max-failures 0.5 .*: big.npy has no row of it"):
        run(0.5)


def test_an_import_completes_a_cache_and_removes_only_a_cache_that_it_has_started(manifest: Manifest, tmp_path: Path) -> None:
    home = tmp_path / "home"
    features = np.random.default_rng(6).normal(size=(NUM, 4)).astype(np.float32)
    path = make_cache(home, manifest, features, shard_rows=512)
    file = export_cache(path, tmp_path / "out.h5")
    other = make_cache(tmp_path / "other", manifest, features, shard_rows=1024, shards=[1])
    with h5py.File(file, "r+") as opened:
        rows = opened["features"]
        assert isinstance(rows, h5py.Dataset)
        good = rows[5]
        rows[5] = 7.0
    for target_home in (tmp_path / "other", tmp_path / "fresh"):
        with pytest.raises(ValueError, match=r"out.h5 is damaged: rows 0 to \d+ are not those that were exported"):
            import_features(file, target_home)
    assert info(other)["shards"] == {"committed": 1, "total": 2}
    assert not list((tmp_path / "fresh").rglob("zarr.json"))
    with h5py.File(file, "r+") as opened:
        opened["features"][5] = good  # pyright: ignore[reportIndexIssue]
    assert import_features(file, tmp_path / "other").path == other
    assert open_cache(other).read(["ä/00005"]).tolist() == open_cache(path).read(["ä/00005"]).tolist()


def test_an_export_that_cannot_be_made_is_refused(manifest: Manifest, tmp_path: Path) -> None:
    home = tmp_path / "home"
    path = make_cache(home, manifest, np.ones((NUM, 2), np.float32))
    with pytest.raises(ValueError, match=r"choose one of: \.h5, \.hdf5, \.npy, \.parquet, \.safetensors"):
        export_cache(path, tmp_path / "out.csv")
    (tmp_path / "out.json").write_text("{}")
    with pytest.raises(ValueError, match=r"out.json is there already; remove it, or export to another name"):
        export_cache(path, tmp_path / "out.npy")
    part = make_cache(home, manifest, np.ones((NUM, 2), np.float32), store_dtype="float32", shards=[])
    with pytest.raises(ValueError, match="is incomplete: 0 of 1 shards"):
        export_cache(part, tmp_path / "part.npy")
    make_manifest(home, NUM + 1)
    with pytest.raises(ValueError, match=f"belongs to another manifest of toy .* {COMMAND}"):
        export_cache(path, tmp_path / "new.npy")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["home", "out.json"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "does not say which cache it was exported from; .* give --dataset and --name"),
        ({"name": "x"}, "needs a dataset .* give --dataset"),
        ({"name": "../x", "dataset": "toy"}, "'../x' cannot name imported features"),
        ({"name": "timm", "dataset": "toy"}, "'timm' cannot name imported features"),
        ({"name": "x", "dataset": "none"}, "run: diffalign prepare none"),
        ({"name": "x", "dataset": "toy", "max_failures": 2.0}, "a share of the samples"),
    ],
)
def test_an_import_says_what_it_needs(manifest: Manifest, tmp_path: Path, arguments: dict[str, Any], message: str) -> None:
    write_npy(tmp_path / "theirs.npy", np.ones((NUM, 2)), [sample.id for sample in manifest.samples])
    with pytest.raises(ValueError, match=message):
        import_features(tmp_path / "theirs.npy", tmp_path / "home", **arguments)


def test_caches_are_found_by_encoder_folder_and_fingerprint(manifest: Manifest, tmp_path: Path) -> None:
    home = tmp_path / "home"
    path = make_cache(home, manifest, np.ones((NUM, 2), np.float32), name="a-b")
    digits = open_cache(path).fingerprint
    for name in ("a-b", path.name, digits[:12], digits):
        assert find_cache(home, manifest, name).path == path
    for name in ("a", "b", digits[:11], digits[:13], path.name[:-1]):
        with pytest.raises(ValueError, match=r"no cache of toy named '.*' \(there are: a-b-"):
            find_cache(home, manifest, name)


def test_a_parquet_of_large_row_groups_is_read_in_batches(manifest: Manifest, tmp_path: Path) -> None:
    file = tmp_path / "theirs.parquet"
    features = np.random.default_rng(8).normal(size=(NUM, 5)).astype(np.float32)
    write_lists(file, features, [sample.id for sample in manifest.samples])
    assert pq.read_metadata(file).num_row_groups == 13
    done = import_features(file, tmp_path / "home", dataset="toy", name="theirs")
    np.testing.assert_array_equal(open_cache(done.path).read([sample.id for sample in manifest.samples]), features)
