"""Parquet: a row per sample with `id`, `split`, `labels`, `features` (`count` of them when there are several), and `about`."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.cache.exchange import NO_OFFSETS, FeatureFile, blame, check_declared, document, id_strings, spans, stored_dtype
from pipeline.cache.incoming import check_id_bytes
from pipeline.types import Sample

READ_BUFFER = 2**20  # bytes; without it whole column chunks are read
BATCH_BYTES = 2**20  # of features that are decoded at a time
ID_BATCH = 4096  # ids that are decoded at a time
SMALL_ID_BATCH = 64  # when a few bytes may stand for each of them


def write(path: Path, features: FeatureFile, samples: Sequence[Sample]) -> None:
    """Write features, a row group per shard, with what is known of their samples."""
    width, is_ragged = prod(features.shape[1:]), len(features.offsets) > 0
    vector = pa.list_(pa.from_numpy_dtype(features.array_dtype), width)
    columns = [("id", pa.string()), ("split", pa.string()), ("labels", pa.list_(pa.int32()))]
    columns += [("count", pa.int64()), ("features", pa.list_(vector))] if is_ragged else [("features", vector)]
    schema = pa.schema(columns, metadata={"about": json.dumps(features.about, ensure_ascii=False)})
    offsets = features.offsets if is_ragged else np.arange(len(samples) + 1)
    groups = _groups(offsets, features.block_ends[0])
    blocks = features.blocks([int(offsets[stop]) for stop in groups])
    with pq.ParquetWriter(path, schema, compression="none", use_dictionary=False, write_statistics=False) as file:
        for (start, stop), block in zip(spans(groups), blocks, strict=True):
            vectors: pa.Array = pa.FixedSizeListArray.from_arrays(pa.array(block.reshape(-1)), width)
            if is_ragged:
                own = (offsets[start : stop + 1] - offsets[start]).astype(np.int32)
                vectors = pa.ListArray.from_arrays(pa.array(own), vectors)
            values: dict[str, Any] = {
                "id": features.ids[start:stop],
                "split": [sample.split for sample in samples[start:stop]],
                "labels": [sample.labels for sample in samples[start:stop]],
                "count": np.diff(offsets[start : stop + 1]),
                "features": vectors,
            }
            file.write_table(pa.table({name: values[name] for name in schema.names}, schema=schema))


def _groups(offsets: np.ndarray, num_rows: int) -> list[int]:
    """Samples after the last of each group, so that a group has about `num_rows` rows of features."""
    cuts = np.searchsorted(offsets, np.arange(num_rows, offsets[-1], num_rows))
    return [*np.unique(cuts[(cuts > 0) & (cuts < len(offsets) - 1)]).tolist(), len(offsets) - 1]


@contextmanager
def read(path: Path) -> Iterator[FeatureFile]:
    """The features of a file of `write`, or of any with `id` and either `features`, lists of numbers, or columns of floats.

    `ValueError` when it cannot be read.
    """
    with ExitStack() as stack:
        with blame(path, pa.ArrowException):
            file = stack.enter_context(pq.ParquetFile(path, buffer_size=READ_BUFFER))
            schema, num_samples = file.schema_arrow, file.metadata.num_rows
            about = document((schema.metadata or {}).get(b"about", b"{}"))
            if "id" not in schema.names:
                raise ValueError(f"there is no column 'id', only: {', '.join(schema.names)}")
            columns = ["features"] if "features" in schema.names else [name for name in schema.names if name != "id"]
            raw, width = _numbers(schema, columns), _width(file, columns)
            dtype = stored_dtype(path, raw, about)
            check_declared(path, (max(num_samples, 1), width), raw.itemsize)
            ids = _ids(path, file.metadata)
            offsets = NO_OFFSETS
            if columns == ["features"] and _is_nested(schema.field("features").type) and "count" in schema.names:
                offsets = np.cumsum([0, *file.read(columns=["count"]).column("count").to_pylist()], dtype=np.int64)
            num_rows = int(offsets[-1]) if len(offsets) else num_samples
            shape = (num_rows, *(about.get("feature_shape", []) or [width]))
            check_declared(path, shape, raw.itemsize)
            if prod(shape[1:]) != width:
                raise ValueError(f"a row has {width} numbers, its record says {list(shape[1:])}")

        def blocks(block_ends: Sequence[int]) -> Iterator[np.ndarray]:
            sample_bytes = width * raw.itemsize * num_rows // num_samples
            batch_rows = max(1, BATCH_BYTES // max(1, sample_bytes))
            with blame(path, pa.ArrowException):
                batches = file.iter_batches(batch_size=batch_rows, columns=columns)
            return _regroup(path, _arrays(path, batches, width), block_ends, shape[1:])

        yield FeatureFile(ids, offsets, shape, dtype, about, blocks)


def _ids(path: Path, metadata: pq.FileMetaData) -> list[str]:
    """The ids; their size is checked before they are decoded, and before a dictionary's long ones are copied out."""
    groups = [metadata.row_group(group) for group in range(metadata.num_row_groups)]
    columns = [group.column(position) for group in groups for position in range(group.num_columns)]
    chunks = [column for column in columns if column.path_in_schema == "id"]
    check_id_bytes(path, sum(chunk.total_uncompressed_size for chunk in chunks))
    is_delta = any("DELTA" in encoding for chunk in chunks for encoding in chunk.encodings)  # not read as a dictionary
    ids: list[str] = []
    num_bytes = 0
    with pq.ParquetFile(path, metadata=metadata, buffer_size=READ_BUFFER, read_dictionary=[] if is_delta else ["id"]) as file:
        for batch in file.iter_batches(batch_size=SMALL_ID_BATCH if is_delta else ID_BATCH, columns=["id"]):
            num_bytes += _spelled_bytes(batch.column(0))
            check_id_bytes(path, num_bytes)
            ids += id_strings(batch.column(0).to_pylist())
    return ids


def _spelled_bytes(ids: pa.Array) -> int:
    """Bytes of strings when each is spelled out."""
    if not isinstance(ids, pa.DictionaryArray):
        return ids.nbytes
    lengths = pc.call_function("binary_length", [ids.dictionary]).take(ids.indices)
    return pc.call_function("sum", [lengths]).as_py() or 0


def _leaf(kind: pa.DataType) -> pa.DataType:
    is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    return _leaf(kind.value_type) if is_list else kind


def _is_nested(kind: pa.DataType) -> bool:
    """Whether a list holds lists: a sample with several rows of features."""
    return _leaf(kind.value_type) != kind.value_type


def _numbers(schema: pa.Schema, columns: Sequence[str]) -> np.dtype:
    """What the features are made of; columns of their own must be floats: whole numbers are rather labels or row numbers."""
    for name in columns:
        kind = schema.field(name).type
        leaf = _leaf(kind)
        if name == "features" and leaf != kind and (pa.types.is_integer(leaf) or pa.types.is_floating(leaf)):
            return np.dtype(leaf.to_pandas_dtype())
        if name == "features" or not pa.types.is_floating(kind):
            wanted = "lists of numbers" if name == "features" else "floating point numbers; leave out what is no feature"
            raise ValueError(f"column {name!r} holds {kind} instead of {wanted}")
    if not columns:
        raise ValueError("there is no column of features")
    return np.result_type(*(schema.field(name).type.to_pandas_dtype() for name in columns))


def _width(file: pq.ParquetFile, columns: Sequence[str]) -> int:
    """Numbers in a row of features: those of a fixed-size list, as many as all lists have on average, or the columns."""
    if columns != ["features"]:
        return len(columns)
    kind = file.schema_arrow.field("features").type
    inner = kind.value_type if _is_nested(kind) else kind
    if pa.types.is_fixed_size_list(inner):
        return inner.list_size
    values = 0
    for group in range(file.num_row_groups):
        chunks = file.metadata.row_group(group)
        for position in range(chunks.num_columns):
            if chunks.column(position).path_in_schema.startswith("features."):
                values += chunks.column(position).num_values
    return max(1, values // max(1, file.metadata.num_rows))


def _arrays(path: Path, batches: Iterator[pa.RecordBatch], width: int) -> Iterator[np.ndarray]:
    """Batches as arrays [rows, width]."""
    while True:
        with blame(path, pa.ArrowException):
            batch = next(batches, None)
            if batch is None:
                return
            if batch.schema.names != ["features"]:
                array = np.stack([column.to_numpy(zero_copy_only=False) for column in batch.columns], axis=1)
            else:
                array = _vectors(batch.column(0), width)
        yield array


def _vectors(column: pa.Array, width: int) -> np.ndarray:
    lists = column.flatten() if _is_nested(column.type) else column
    values = lists.flatten()
    if column.null_count or lists.null_count or values.null_count:
        raise ValueError("a row of `features` is null; leave it out")
    lengths = pc.call_function("list_value_length", [lists]).to_numpy(zero_copy_only=False)
    if (lengths != width).any():
        raise ValueError(f"not every row of `features` has {width} numbers")
    return values.to_numpy(zero_copy_only=False).reshape(len(lists), width)


def _regroup(
    path: Path, pieces: Iterator[np.ndarray], block_ends: Sequence[int], shape: tuple[int, ...]
) -> Iterator[np.ndarray]:
    """Blocks [rows, *shape] that end where they should, out of pieces that end anywhere."""
    waiting: list[np.ndarray] = []
    for start, stop in spans(block_ends):
        while sum(map(len, waiting)) < stop - start:
            piece = next(pieces, None)
            if piece is None:
                raise ValueError(f"{path} has fewer rows of features than it declares")
            waiting.append(piece)
        joined = np.concatenate(waiting)
        yield joined[: stop - start].reshape(-1, *shape)
        waiting = [joined[stop - start :]]
