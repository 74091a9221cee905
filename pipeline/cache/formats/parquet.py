"""Parquet: one row per sample with `id`, `split`, `labels` and `features`; `about` is JSON in the metadata of the schema.

If samples have several rows of features, `features` is a list of lists, and `count` is the length of the outer list.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.cache.exchange import (
    NO_OFFSETS,
    FeatureFile,
    block_ranges,
    check_declared_shape,
    id_strings,
    label_read_errors,
    parse_json_object,
    stored_dtype,
)
from pipeline.cache.import_plan import check_id_bytes
from pipeline.runtime.errors import UserError
from pipeline.types import Sample

READ_BUFFER_BYTES = 2**20  # without a buffer, whole column chunks are read
DECODE_BATCH_BYTES = 2**20  # of features that are decoded at a time
IDS_PER_BATCH = 4096  # decoded at a time
DELTA_IDS_PER_BATCH = 64  # in delta encodings, where a few bytes may stand for a long id


def write(path: Path, features: FeatureFile, samples: Sequence[Sample]) -> None:
    """Write features, one row group per block, with the ids, splits and labels of their samples."""
    width, is_ragged = prod(features.shape[1:]), len(features.offsets) > 0
    vector_type = pa.list_(pa.from_numpy_dtype(features.array_dtype), width)
    columns = [("id", pa.string()), ("split", pa.string()), ("labels", pa.list_(pa.int32()))]
    columns += [("count", pa.int64()), ("features", pa.list_(vector_type))] if is_ragged else [("features", vector_type)]
    schema = pa.schema(columns, metadata={"about": json.dumps(features.record, ensure_ascii=False)})
    offsets = features.offsets if is_ragged else np.arange(len(samples) + 1)
    group_ends = _row_group_ends(offsets, features.block_ends[0])
    blocks = features.read_blocks([int(offsets[stop]) for stop in group_ends])
    with pq.ParquetWriter(path, schema, compression="none", use_dictionary=False, write_statistics=False) as file:
        for (start, stop), block in zip(block_ranges(group_ends), blocks, strict=True):
            vectors: pa.Array = pa.FixedSizeListArray.from_arrays(pa.array(block.reshape(-1)), width)
            if is_ragged:
                group_offsets = (offsets[start : stop + 1] - offsets[start]).astype(np.int32)
                vectors = pa.ListArray.from_arrays(pa.array(group_offsets), vectors)
            values: dict[str, Any] = {
                "id": features.ids[start:stop],
                "split": [sample.split for sample in samples[start:stop]],
                "labels": [sample.labels for sample in samples[start:stop]],
                "count": np.diff(offsets[start : stop + 1]),
                "features": vectors,
            }
            file.write_table(pa.table({name: values[name] for name in schema.names}, schema=schema))


def _row_group_ends(offsets: np.ndarray, num_rows: int) -> list[int]:
    """Return the sample after the last of each row group. A group has about `num_rows` rows of features."""
    cuts = np.searchsorted(offsets, np.arange(num_rows, offsets[-1], num_rows))
    return [*np.unique(cuts[(cuts > 0) & (cuts < len(offsets) - 1)]).tolist(), len(offsets) - 1]


@contextmanager
def read(path: Path) -> Iterator[FeatureFile]:
    """Open a file of `write`, or any Parquet file with a column `id` and features.

    The features are a column `features` of lists of numbers, or, without it, all other columns: one float each, with names
    that are numbered alike, such as f0, f1, f2.

    Raises:
        UserError: the file cannot be read.
    """
    with ExitStack() as stack:
        with label_read_errors(path, pa.ArrowException):
            file = stack.enter_context(pq.ParquetFile(path, buffer_size=READ_BUFFER_BYTES))
            schema, num_samples = file.schema_arrow, file.metadata.num_rows
            record = parse_json_object((schema.metadata or {}).get(b"about", b"{}"))
            if "id" not in schema.names:
                raise UserError(f"there is no column 'id', only: {', '.join(schema.names)}")
            columns = ["features"] if "features" in schema.names else [name for name in schema.names if name != "id"]
            raw, width = _feature_dtype(schema, columns), _feature_width(file, columns)
            dtype = stored_dtype(path, raw, record)
            check_declared_shape(path, (max(num_samples, 1), width), raw.itemsize)
            ids = _read_ids(path, file.metadata)
            offsets = NO_OFFSETS
            if columns == ["features"] and _is_nested(schema.field("features").type) and "count" in schema.names:
                offsets = np.cumsum([0, *file.read(columns=["count"]).column("count").to_pylist()], dtype=np.int64)
            num_rows = int(offsets[-1]) if len(offsets) else num_samples
            shape = (num_rows, *(record.get("feature_shape", []) or [width]))
            check_declared_shape(path, shape, raw.itemsize)
            if prod(shape[1:]) != width:
                raise UserError(f"a row has {width} numbers, its record says {list(shape[1:])}")

        def read_blocks(block_ends: Sequence[int]) -> Iterator[np.ndarray]:
            sample_bytes = width * raw.itemsize * num_rows // num_samples
            batch_rows = max(1, DECODE_BATCH_BYTES // max(1, sample_bytes))
            with label_read_errors(path, pa.ArrowException):
                batches = file.iter_batches(batch_size=batch_rows, columns=columns)
            return _regroup(path, _batch_arrays(path, batches, width), block_ends, shape[1:])

        yield FeatureFile(ids, offsets, shape, dtype, record, read_blocks)


def _read_ids(path: Path, metadata: pq.FileMetaData) -> list[str]:
    """Return the ids. Their size is checked before they are decoded, and before strings of a dictionary are copied."""
    groups = [metadata.row_group(group) for group in range(metadata.num_row_groups)]
    columns = [group.column(position) for group in groups for position in range(group.num_columns)]
    chunks = [column for column in columns if column.path_in_schema == "id"]
    check_id_bytes(path, sum(chunk.total_uncompressed_size for chunk in chunks))
    # Delta encodings cannot be read as a dictionary.
    is_delta = any("DELTA" in encoding for chunk in chunks for encoding in chunk.encodings)
    ids: list[str] = []
    num_bytes = 0
    read_dictionary = [] if is_delta else ["id"]
    with pq.ParquetFile(path, metadata=metadata, buffer_size=READ_BUFFER_BYTES, read_dictionary=read_dictionary) as file:
        for batch in file.iter_batches(batch_size=DELTA_IDS_PER_BATCH if is_delta else IDS_PER_BATCH, columns=["id"]):
            num_bytes += _decoded_bytes(batch.column(0))
            check_id_bytes(path, num_bytes)
            ids += id_strings(batch.column(0).to_pylist())
    return ids


def _decoded_bytes(ids: pa.Array) -> int:
    """Return the bytes of all strings, when strings of a dictionary are copied for each row."""
    if not isinstance(ids, pa.DictionaryArray):
        return ids.nbytes
    lengths = pc.call_function("binary_length", [ids.dictionary]).take(ids.indices)
    return pc.call_function("sum", [lengths]).as_py() or 0


def _leaf_type(kind: pa.DataType) -> pa.DataType:
    """Return the type of the values of a list, or of a list of lists."""
    is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    return _leaf_type(kind.value_type) if is_list else kind


def _is_nested(kind: pa.DataType) -> bool:
    """Whether a list type holds lists: each sample has several rows of features."""
    return _leaf_type(kind.value_type) != kind.value_type


def _feature_dtype(schema: pa.Schema, columns: Sequence[str]) -> np.dtype:
    """Return the dtype of the features.

    Columns of one number each must be floats, and numbered: whole numbers, and columns with a name of their own, are probably
    labels or row numbers.

    Raises:
        UserError: a column holds something else or is named otherwise, or there is no column.
    """
    for name in columns:
        kind = schema.field(name).type
        leaf = _leaf_type(kind)
        if name == "features" and leaf != kind and (pa.types.is_integer(leaf) or pa.types.is_floating(leaf)):
            return np.dtype(leaf.to_pandas_dtype())
        if name == "features" or not pa.types.is_floating(kind):
            expected = "lists of numbers" if name == "features" else "floating point numbers; leave out what is no feature"
            raise UserError(f"column {name!r} holds {kind} instead of {expected}")
    if not columns:
        raise UserError("there is no column of features")
    if columns != ["features"]:
        _check_numbered(columns)
    return np.result_type(*(schema.field(name).type.to_pandas_dtype() for name in columns))


def _check_numbered(columns: Sequence[str]) -> None:
    """Refuse columns that are not numbered alike: one of them may be a label or a score, also as a float."""
    prefixes = {name: re.sub(r"[0-9]+$", "", name) for name in columns}
    numbered = Counter(prefix for name, prefix in prefixes.items() if prefix != name)
    common = max(numbered, key=numbered.__getitem__, default="f")
    others = [name for name in columns if prefixes[name] == name or prefixes[name] != common]
    if others:
        raise UserError(
            f"column {others[0]!r} is not numbered like a feature ({common}0, {common}1, …), and may be a label: leave it out, "
            "or put the features into one column `features` of lists"
        )


def _feature_width(file: pq.ParquetFile, columns: Sequence[str]) -> int:
    """Return the numbers in a row of features.

    It is the number of columns, the size of the fixed-size list, or the mean length of the lists.
    """
    if columns != ["features"]:
        return len(columns)
    kind = file.schema_arrow.field("features").type
    inner = kind.value_type if _is_nested(kind) else kind
    if pa.types.is_fixed_size_list(inner):
        return inner.list_size
    num_values = 0
    for group in range(file.num_row_groups):
        chunks = file.metadata.row_group(group)
        for position in range(chunks.num_columns):
            if chunks.column(position).path_in_schema.startswith("features."):
                num_values += chunks.column(position).num_values
    return max(1, num_values // max(1, file.metadata.num_rows))


def _batch_arrays(path: Path, batches: Iterator[pa.RecordBatch], width: int) -> Iterator[np.ndarray]:
    """Yield record batches as arrays [rows, width]."""
    while True:
        with label_read_errors(path, pa.ArrowException):
            batch = next(batches, None)
            if batch is None:
                return
            if batch.schema.names != ["features"]:
                array = np.stack([column.to_numpy(zero_copy_only=False) for column in batch.columns], axis=1)
            else:
                array = _list_array(batch.column(0), width)
        yield array


def _list_array(column: pa.Array, width: int) -> np.ndarray:
    """Return a column of lists as an array [rows, width]."""
    lists = column.flatten() if _is_nested(column.type) else column
    values = lists.flatten()
    if column.null_count or lists.null_count or values.null_count:
        raise UserError("a row of `features` is null; leave it out")
    lengths = pc.call_function("list_value_length", [lists]).to_numpy(zero_copy_only=False)
    if (lengths != width).any():
        raise UserError(f"not every row of `features` has {width} numbers")
    return values.to_numpy(zero_copy_only=False).reshape(len(lists), width)


def _regroup(
    path: Path, arrays: Iterator[np.ndarray], block_ends: Sequence[int], shape: tuple[int, ...]
) -> Iterator[np.ndarray]:
    """Cut consecutive arrays [rows, width] of any length into blocks [rows, *shape] that end at `block_ends`."""
    waiting: list[np.ndarray] = []
    for start, stop in block_ranges(block_ends):
        while sum(map(len, waiting)) < stop - start:
            array = next(arrays, None)
            if array is None:
                raise UserError(f"{path} has fewer rows of features than it declares")
            waiting.append(array)
        joined = np.concatenate(waiting)
        yield joined[: stop - start].reshape(-1, *shape)
        waiting = [joined[stop - start :]]
