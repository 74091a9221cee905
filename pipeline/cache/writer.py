"""Write a cache shard by shard. If the process is killed, at most the shards that it was writing are lost."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import zarr
from zarr.abc.buffer import Buffer
from zarr.abc.codec import BytesBytesCodec
from zarr.codecs import Crc32cCodec
from zarr.storage import MemoryStore

from pipeline.cache import layout
from pipeline.cache.layout import Commit, Failure
from pipeline.cache.shards import WRITE_PIECES, StoredFeatures
from pipeline.runtime.claims import DRIVER, check_held
from pipeline.runtime.errors import UserError
from pipeline.runtime.files import sha256
from pipeline.runtime.places import Place
from pipeline.runtime.stores import exists, map_objects, object_sha256, store_of

TEMPORARY_FILE_PATTERN = ".*.tmp"  # files that `write_atomic` has not finished
_PieceT = TypeVar("_PieceT", bound=bytes | memoryview)
FAILURE_COLUMNS = pa.schema([("id", pa.string()), ("stage", pa.string()), ("error", pa.string())])


@dataclass(frozen=True)
class Writer:
    """Writes the shards of one cache. The caller must `hold` the cache, or the part that a shard is."""

    path: Place
    stored: StoredFeatures
    metadata: bytes  # zarr.json

    @staticmethod
    def open(
        path: Place,
        ids: Sequence[str],
        offsets: np.ndarray,
        feature_shape: tuple[int, ...],
        identity: Mapping[str, Any],
        provenance: Mapping[str, Any],
        shard_rows: int = 0,
    ) -> Writer:
        """Start a cache, or continue one.

        A cache that already holds shards keeps its own provenance and shard size. If its metadata, ids or offsets are damaged,
        they are made again.

        Args:
            path: the place of the cache.
            ids: the samples in row order.
            offsets: [N+1] int64: the rows of sample i are offsets[i] .. offsets[i+1]; [0] when every sample has one row.
            feature_shape: shape of one row.
            identity: what the cache is a function of; its hash is in the name of the folder.
            provenance: where the features come from; for a new cache.
            shard_rows: rows per shard, for a new cache; 0: 8,192.

        Raises:
            UserError: damaged files cannot be made again as they were.
        """
        check_held(path, DRIVER)
        remove_temporary_files(path)
        num_rows = int(offsets[-1]) if len(offsets) else len(ids)

        def encode(provenance: Mapping[str, Any]) -> dict[str, bytes]:
            attributes = {
                "kind": "ragged" if len(offsets) else "dense",
                "identity": identity,
                "ids_sha256": layout.ids_sha256(ids),
                "provenance": provenance,
            }
            return _encode_arrays(ids, offsets, (num_rows, *feature_shape), attributes, shard_rows)

        if not layout.list_commits(path):
            _write_arrays(path, encode(provenance))
        elif problems := layout.file_problems(path, "arrays"):
            candidates = map(encode, (_read_provenance(path), provenance))
            restored = next((files for files in candidates if _matches_recorded(path, files)), None)
            if restored is None:
                raise UserError(
                    f"{path}: {problems[0]}, and these options and libraries do not make it again as it was; take those that "
                    f"it was begun with, or remove the folder and run: {provenance['command']}"
                )
            _write_arrays(path, restored)
        return Writer.attach(path)

    @staticmethod
    def attach(path: Place) -> Writer:
        """Return a writer for a cache that `open` has prepared, perhaps in another process.

        Several processes may write at the same time, each of them other shards, which they `hold` as parts.
        """
        return Writer(path, StoredFeatures.open(path), store_of(path).get(path / "zarr.json"))

    @property
    def num_rows(self) -> int:
        """The number of rows of the whole cache."""
        return self.stored.shape[0]

    @property
    def shard_rows(self) -> int:
        """The number of rows of every shard but the last."""
        return self.stored.shard_rows

    @property
    def feature_shape(self) -> tuple[int, ...]:
        """The shape of one row."""
        return self.stored.shape[1:]

    @property
    def provenance(self) -> Mapping[str, Any]:
        """The provenance in zarr.json; it holds for all shards of the cache."""
        return json.loads(self.metadata)["attributes"]["provenance"]

    @property
    def is_finished(self) -> bool:
        """Whether `finish` was called after the last `commit`."""
        return not layout.file_problems(self.path, "failures")

    @property
    def num_shards(self) -> int:
        """The number of shards of the whole cache."""
        return -(-self.num_rows // self.shard_rows)

    def rows(self, shard: int) -> range:
        """Return the row numbers of a shard."""
        return range(shard * self.shard_rows, min((shard + 1) * self.shard_rows, self.num_rows))

    def read_records(self, shards: Iterable[int] | None = None, with_media: bool = False) -> dict[int, Commit]:
        """Return the undamaged commit records by shard. The shards themselves are not looked at.

        Args:
            shards: whose records are read; None: all.
            with_media: keep the digests of the media.
        """

        def read(shard: int) -> Commit | None:
            with contextlib.suppress(UserError, FileNotFoundError):
                return layout.read_commit(self.path, shard, with_media)
            return None

        commits = map_objects(self.path, read, range(self.num_shards) if shards is None else shards)
        return {commit.shard: commit for commit in commits if commit and commit.rows == len(self.rows(commit.shard))}

    def verified_commits(self) -> dict[int, Commit]:
        """Return the commits of all shards that are there and undamaged, without media. Every byte is read."""

        def is_intact(commit: Commit) -> bool:
            with contextlib.suppress(FileNotFoundError):
                return object_sha256(self._shard_path(commit.shard)) == commit.sha256
            return False

        commits = self.read_records()
        intact = map_objects(self.path, is_intact, commits.values())
        return {shard: commit for (shard, commit), is_kept in zip(commits.items(), intact, strict=True) if is_kept}

    def commit(
        self,
        shard: int,
        features: np.ndarray,
        failures: Sequence[Failure],
        *,
        seconds: float,
        batch_size: int,
        device: str,
        media_digests: str = "",
    ) -> Commit:
        """Write a whole shard, then its commit record. The cache counts as incomplete until `finish` is called.

        Args:
            shard: the number of the shard.
            features: all rows of the shard, float32 [rows, *shape]; NaN where an item failed.
            failures: the items that failed.
            seconds: the time that encoding the shard took.
            batch_size: items that were encoded at a time.
            device: what encoded them.
            media_digests: digests of the media files, see `Commit`; "": not known.
        """
        store = store_of(self.path)
        check_held(self.path, part_of(shard))
        store.delete(self.path / "commits" / "failures.json")
        norms, digest = np.empty(len(features)), hashlib.sha256()

        def fill_rows(rows: slice, stored: np.ndarray) -> None:
            layout.copy_values(features[rows], stored)
            norms[rows] = layout.row_norms(stored, self.stored.store_dtype)

        pieces = self.stored.encode_shard(len(features), fill_rows)
        check_held(self.path, part_of(shard))
        store.put(self._shard_path(shard), hash_beside(pieces, digest))
        finite = np.isfinite(norms)
        finite_norms = norms[finite] if finite.any() else np.zeros(1)
        commit = Commit(
            shard=shard,
            rows=len(features),
            num_bytes=self.stored.shard_bytes(len(features)),
            sha256=digest.hexdigest(),
            finite=int(finite.sum()),
            norm_min=float(finite_norms.min()),
            norm_mean=float(finite_norms.mean()),
            norm_max=float(finite_norms.max()),
            seconds=round(seconds, 3),
            batch_size=batch_size,
            device=device,
            failures=tuple(failures),
            media_digests=media_digests,
        )
        check_held(self.path, part_of(shard))
        layout.write_commit(self.path, commit)
        return commit

    def finish(self, commits: Mapping[int, Commit]) -> None:
        """Write failures.parquet with the failures of all shards. Only then can the cache be opened.

        Args:
            commits: the commit of every shard.
        """
        check_held(self.path, DRIVER)
        remove_temporary_files(self.path)
        failures = _encode_failures([commits[shard] for shard in sorted(commits)])
        store_of(self.path).put(self.path / "failures.parquet", failures)
        check_held(self.path, DRIVER)
        layout.write_digests(self.path, "failures", ["failures.parquet"])

    def _shard_path(self, shard: int) -> Place:
        return layout.shard_path(self.path, shard, len(self.stored.shape))


def part_of(shard: int) -> str:
    """Return the part of a cache that a process must `hold` to write a shard."""
    return f"{shard:05d}"


def remove_temporary_files(path: Place) -> None:
    """Remove the temporary files of writers that were killed; an object store has none.

    A writer that only seemed to be dead then fails. This does no harm: its shard has been written again.
    """
    for file in path.rglob(TEMPORARY_FILE_PATTERN) if isinstance(path, Path) else ():
        file.unlink(missing_ok=True)


def hash_beside(pieces: Iterable[_PieceT], digest: hashlib._Hash) -> Iterator[_PieceT]:
    """Yield pieces of a file, and hash them on a thread, which may be `WRITE_PIECES` - 1 pieces behind.

    The digest is complete when there are no more pieces.
    """
    with ThreadPoolExecutor(1) as thread:
        hashing: deque[Future[None]] = deque()
        for piece in pieces:
            if len(hashing) == WRITE_PIECES - 1:
                hashing.popleft().result()
            hashing.append(thread.submit(digest.update, piece))
            yield piece


def _encode_failures(commits: Sequence[Commit]) -> bytes:
    """Return the bytes of failures.parquet: id, stage and error of every failure, in row order."""
    failures = [failure for commit in commits for failure in commit.failures]
    columns = {name: [getattr(failure, name) for failure in failures] for name in FAILURE_COLUMNS.names}
    file = io.BytesIO()
    pq.write_table(pa.table(columns, schema=FAILURE_COLUMNS), file)
    return file.getvalue()


def _read_provenance(path: Place) -> Mapping[str, Any]:
    """Return the provenance in zarr.json, damaged or not; {} if it cannot be read."""
    try:
        return dict(json.loads(store_of(path).get(path / "zarr.json"))["attributes"]["provenance"])
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _matches_recorded(path: Place, files: Mapping[str, bytes]) -> bool:
    """Whether these are the array files for which the shards were written.

    They are compared with the record commits/arrays.json, or with the files that are left if there is no undamaged record.
    """
    try:
        recorded = layout.read_record(path / "commits" / "arrays.json")
    except (UserError, FileNotFoundError):
        recorded = {name: object_sha256(path / name) for name in files if exists(path / name)}
    return "zarr.json" in recorded and all(sha256(files.get(name, b"")) == digest for name, digest in recorded.items())


def _write_arrays(path: Place, files: Mapping[str, bytes]) -> None:
    """Write the array files that are missing or different, and their record commits/arrays.json."""
    for name in sorted(files, key=lambda name: name == "zarr.json"):  # last: with zarr.json the folder is a cache
        if not exists(path / name) or store_of(path).get(path / name) != files[name]:
            store_of(path).put(path / name, files[name])
    if layout.file_problems(path, "arrays"):
        layout.write_digests(path, "arrays", list(files))


def _encode_arrays(
    ids: Sequence[str], offsets: np.ndarray, shape: tuple[int, ...], attributes: Mapping[str, Any], wanted_shard_rows: int
) -> dict[str, bytes]:
    """Return all files of the Zarr group except the shards of features, by path in the cache."""
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
        shards=(layout.rows_per_shard(shape[0], row_bytes, wanted_shard_rows), *shape[1:]),
        compressors=checksum,
        fill_value=layout.BFLOAT16_NAN if store_dtype == "bfloat16" else float("nan"),
        attributes={"store_dtype": store_dtype},
    )
    group.create_array("ids", data=np.array(ids, dtype=np.dtypes.StringDType()), chunks="auto", compressors=checksum)
    if len(offsets):
        group.create_array("offsets", data=offsets, chunks=(len(offsets),), compressors=checksum)
    return {name: buffer.to_bytes() for name, buffer in store.items()}
