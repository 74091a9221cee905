"""Write a cache shard by shard so that a kill at any moment loses at most the shard in work."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import zarr
from zarr.abc.buffer import Buffer
from zarr.abc.codec import BytesBytesCodec
from zarr.buffer import cpu
from zarr.codecs import Crc32cCodec
from zarr.storage import MemoryStore

from pipeline.cache import layout
from pipeline.cache.layout import Commit, Failure
from pipeline.runtime.files import sha256, write_atomic

LEFTOVERS = ".*.tmp"  # what `write_atomic` calls a file that is not whole yet
FAILURE_COLUMNS = pa.schema([("id", pa.string()), ("stage", pa.string()), ("error", pa.string())])


@dataclass(frozen=True)
class Writer:
    """Writes the shards of one cache; use it under `lock`."""

    path: Path
    num_rows: int
    shard_rows: int
    feature_shape: tuple[int, ...]
    store_dtype: str
    arrays: Mapping[str, bytes]  # metadata, ids and offsets as Zarr writes them

    @staticmethod
    def open(
        path: Path,
        ids: Sequence[str],
        offsets: np.ndarray,
        feature_shape: tuple[int, ...],
        identity: Mapping[str, Any],
        provenance: Mapping[str, Any],
        shard_rows: int = 0,
    ) -> Writer:
        """Start a cache, or take up one that was started.

        `offsets` [N+1] int64 says which rows of features belong to which sample; empty [0] when every sample has one row.
        `provenance` and `shard_rows` (0: 8,192) are for a new cache; one that holds shards keeps its own, and files that are
        damaged are made again: `ValueError` when that does not give what was there.
        """
        remove_leftovers(path)
        num_rows = int(offsets[-1]) if len(offsets) else len(ids)

        def encoded(origin: Mapping[str, Any]) -> dict[str, bytes]:
            attributes = {
                "kind": "ragged" if len(offsets) else "dense",
                "identity": identity,
                "ids_sha256": layout.ids_sha256(ids),
                "provenance": origin,
            }
            return _encode_arrays(ids, offsets, (num_rows, *feature_shape), attributes, shard_rows)

        if not any((path / "commits").glob("[0-9]*.json")):
            _write_arrays(path, encoded(provenance))
        elif problems := layout.file_problems(path, "arrays"):
            again = next((files for files in map(encoded, (_origin(path), provenance)) if _is_what_was(path, files)), None)
            if again is None:
                raise ValueError(
                    f"{path}: {problems[0]}, and these options and libraries do not make it again as it was; take those that "
                    f"it was begun with, or remove the folder and run: {provenance['command']}"
                )
            _write_arrays(path, again)
        return Writer.join(path)

    @staticmethod
    def join(path: Path) -> Writer:
        """Write to a cache that another process has opened and holds: whole shards, each by one process."""
        arrays = {name: (path / name).read_bytes() for name in layout.read_record(path / "commits" / "arrays.json")}
        array = zarr.open_array(path / "features", mode="r")
        assert array.shards is not None
        return Writer(path, array.shape[0], array.shards[0], array.shape[1:], str(array.attrs["store_dtype"]), arrays)

    @property
    def provenance(self) -> Mapping[str, Any]:
        """Where the shards come from that it holds."""
        return json.loads(self.arrays["zarr.json"])["attributes"]["provenance"]

    @property
    def is_finished(self) -> bool:
        """Whether `finish` was the last that was done."""
        return not layout.file_problems(self.path, "failures")

    @property
    def num_shards(self) -> int:
        """Shards of the whole cache."""
        return -(-self.num_rows // self.shard_rows)

    def rows(self, shard: int) -> range:
        """The rows of a shard."""
        return range(shard * self.shard_rows, min((shard + 1) * self.shard_rows, self.num_rows))

    def records(self) -> dict[int, Commit]:
        """What was recorded of the shards, whatever has become of them since."""
        commits = {}
        for shard in range(self.num_shards):
            with contextlib.suppress(ValueError, FileNotFoundError):
                commits[shard] = layout.read_commit(self.path, shard)
        return {shard: commit for shard, commit in commits.items() if commit.rows == len(self.rows(shard))}

    def committed(self) -> dict[int, Commit]:
        """The shards that are real and undamaged; every byte is read."""
        commits = {}
        for shard, commit in self.records().items():
            with contextlib.suppress(FileNotFoundError):
                if layout.file_sha256(self._file(shard)) == commit.sha256:
                    commits[shard] = commit
        return commits

    def commit(
        self,
        shard: int,
        features: np.ndarray,
        failures: Sequence[Failure],
        *,
        seconds: float,
        batch_size: int,
        device: str,
        media_sizes: str = "",
    ) -> Commit:
        """Write a whole shard, features float32 [rows, *shape] with NaN where an item failed, then its record.

        From then on the cache counts as incomplete until `finish`.
        """
        (self.path / "commits" / "failures.json").unlink(missing_ok=True)
        stored = layout.to_stored(features, self.store_dtype)
        lengths = layout.norms(stored, self.store_dtype)
        finite = np.isfinite(lengths)
        norms = lengths[finite] if finite.any() else np.zeros(1)
        data = self._encode(shard, stored)
        with ThreadPoolExecutor(1) as beside:
            digest = beside.submit(sha256, data)
            write_atomic(self._file(shard), data)
        commit = Commit(
            shard=shard,
            rows=len(stored),
            num_bytes=len(data),
            sha256=digest.result(),
            finite=int(finite.sum()),
            norm_min=float(norms.min()),
            norm_mean=float(norms.mean()),
            norm_max=float(norms.max()),
            seconds=round(seconds, 3),
            batch_size=batch_size,
            device=device,
            failures=tuple(failures),
            media_sizes=media_sizes,
        )
        layout.write_commit(self.path, commit)
        return commit

    def finish(self, commits: Mapping[int, Commit]) -> None:
        """Gather the failures of all shards into failures.parquet; without it a cache does not open."""
        remove_leftovers(self.path)
        write_atomic(self.path / "failures.parquet", _encode_failures([commits[shard] for shard in sorted(commits)]))
        layout.write_digests(self.path, "failures", ["failures.parquet"])

    def _file(self, shard: int) -> Path:
        return layout.shard_path(self.path, shard, 1 + len(self.feature_shape))

    def _encode(self, shard: int, stored: np.ndarray) -> memoryview:
        """The bytes Zarr writes for a shard."""
        start = self.rows(shard).start
        store = _memory_store({"features/zarr.json": self.arrays["features/zarr.json"]})
        with zarr.config.set({"array.write_empty_chunks": True}):  # a shard of nothing but failures has a file too
            zarr.open_array(MemoryStore(store), path="features", mode="r+")[start : start + len(stored)] = stored
        return store[self._file(shard).relative_to(self.path).as_posix()].as_numpy_array().data


def remove_leftovers(path: Path) -> None:
    """Remove what writers left that were killed; one that only seemed to be dead fails then, and its shard has been redone."""
    for leftover in path.rglob(LEFTOVERS):
        leftover.unlink(missing_ok=True)


def _encode_failures(commits: Sequence[Commit]) -> bytes:
    """failures.parquet: id, stage, error of every failure in row order."""
    failures = [failure for commit in commits for failure in commit.failures]
    columns = {name: [getattr(failure, name) for failure in failures] for name in FAILURE_COLUMNS.names}
    file = io.BytesIO()
    pq.write_table(pa.table(columns, schema=FAILURE_COLUMNS), file)
    return file.getvalue()


def _origin(path: Path) -> Mapping[str, Any]:
    """The provenance that stands in zarr.json, whether it is damaged or not."""
    try:
        return dict(json.loads((path / "zarr.json").read_bytes())["attributes"]["provenance"])
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _is_what_was(path: Path, files: Mapping[str, bytes]) -> bool:
    """Whether these are the arrays that the shards were written for: as recorded, or without a record what is left of them."""
    try:
        known = layout.read_record(path / "commits" / "arrays.json")
    except (ValueError, FileNotFoundError):
        known = {name: layout.file_sha256(path / name) for name in files if (path / name).is_file()}
    return "zarr.json" in known and all(sha256(files.get(name, b"")) == digest for name, digest in known.items())


def _write_arrays(path: Path, files: Mapping[str, bytes]) -> None:
    """Write the files that are not there like that already, and the record of them."""
    for name in sorted(files, key=lambda name: name == "zarr.json"):  # the group last: a folder is a cache once it is there
        if not (path / name).is_file() or (path / name).read_bytes() != files[name]:
            write_atomic(path / name, files[name])
    if layout.file_problems(path, "arrays"):
        layout.write_digests(path, "arrays", list(files))


def _encode_arrays(
    ids: Sequence[str], offsets: np.ndarray, shape: tuple[int, ...], attributes: Mapping[str, Any], wanted_shard_rows: int
) -> dict[str, bytes]:
    """Every file of the group but the shards of features."""
    store: dict[str, Buffer] = {}
    group = zarr.create_group(MemoryStore(store), zarr_format=3, attributes=dict(attributes))
    checksum: list[BytesBytesCodec] = [Crc32cCodec()]
    store_dtype = str(attributes["identity"]["store_dtype"])
    dtype = np.dtype("uint16" if store_dtype == "bfloat16" else store_dtype)
    row_bytes = dtype.itemsize * int(np.prod(shape[1:]))
    group.create_array(
        "features",
        shape=shape,
        dtype=dtype,
        chunks=(layout.CHUNK_ROWS, *shape[1:]),
        shards=(layout.shard_rows(shape[0], row_bytes, wanted_shard_rows), *shape[1:]),
        compressors=checksum,
        fill_value=layout.BFLOAT16_NAN if store_dtype == "bfloat16" else float("nan"),
        attributes={"store_dtype": store_dtype},
    )
    group.create_array("ids", data=np.array(ids, dtype=np.dtypes.StringDType()), chunks="auto", compressors=checksum)
    if len(offsets):
        group.create_array("offsets", data=offsets, chunks=(len(offsets),), compressors=checksum)
    return {name: buffer.to_bytes() for name, buffer in store.items()}


def _memory_store(files: Mapping[str, bytes]) -> dict[str, Buffer]:
    return {name: cpu.Buffer.from_bytes(data) for name, data in files.items()}
