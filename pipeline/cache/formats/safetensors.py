"""Safetensors: tensors `features` and `offsets`; `ids`, `splits`, `labels` and `about` are JSON in the metadata."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open

from pipeline.cache.exchange import (
    FeatureFile,
    block_ranges,
    check_declared_shape,
    id_strings,
    label_read_errors,
    parse_json_object,
    parse_offsets,
    read_sidecar,
    stored_dtype,
)
from pipeline.runtime.errors import UserError
from pipeline.types import Sample

SAFETENSORS_NAMES = {"float16": "F16", "float32": "F32", "bfloat16": "BF16"}
SAFETENSORS_DTYPES = {  # NumPy dtypes, of bfloat16 that of its bits
    "F64": "<f8",
    "F32": "<f4",
    "F16": "<f2",
    "BF16": "<u2",
    "I64": "<i8",
    "I32": "<i4",
    "I16": "<i2",
    "U16": "<u2",
    "I8": "|i1",
    "U8": "|u1",
}
MAX_HEADER_BYTES = 100_000_000  # bytes; the library refuses larger ones


def write(path: Path, features: FeatureFile, samples: Sequence[Sample]) -> None:
    """Write features, block by block, with the ids, splits and labels of their samples.

    The library's own writer is not used, because it needs all features in memory.

    Raises:
        UserError: the ids and labels are larger than the header of a safetensors file can be.
    """
    described = {
        "ids": features.ids,
        "splits": [sample.split for sample in samples],
        "labels": [sample.labels for sample in samples],
        "about": features.record,
    }
    num_bytes = int(np.prod(features.shape)) * features.array_dtype.itemsize
    start = features.offsets.nbytes
    header = {
        "__metadata__": {key: json.dumps(value, ensure_ascii=False) for key, value in described.items()},
        "offsets": {"dtype": "I64", "shape": features.offsets.shape, "data_offsets": [0, start]},
        "features": {
            "dtype": SAFETENSORS_NAMES[features.dtype],
            "shape": features.shape,
            "data_offsets": [start, start + num_bytes],
        },
    }
    encoded = json.dumps(header, ensure_ascii=False).encode()
    encoded += b" " * (-len(encoded) % 8)
    if len(encoded) > MAX_HEADER_BYTES:
        raise UserError(
            f"the ids and labels need {len(encoded)} bytes, a safetensors header holds {MAX_HEADER_BYTES}; export to .h5"
        )
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        file.write(features.offsets.astype("<i8").data)
        for block in features.read_blocks(features.block_ends):
            file.write(np.ascontiguousarray(block, features.array_dtype).data)


@contextmanager
def read(path: Path) -> Iterator[FeatureFile]:
    """Open a file of `write`, or any safetensors file with a tensor `features` and its ids in the metadata or in a sidecar.

    Raises:
        UserError: the file cannot be read.
    """
    with label_read_errors(path, SafetensorError):
        with safe_open(path, framework="np") as file:  # the library checks the header against the file
            tensors, metadata = list(file.keys()), file.metadata() or {}
            if "features" not in tensors:
                raise UserError(f"there is no tensor 'features', only: {', '.join(tensors) or 'nothing'}")
            offsets = parse_offsets(file.get_tensor("offsets") if "offsets" in tensors else [])
        record = parse_json_object(metadata["about"]) if "about" in metadata else {}
        ids = id_strings(json.loads(metadata["ids"]) if "ids" in metadata else read_sidecar(path)["ids"])
        dtype, rows = _map_features(path)

    def read_blocks(block_ends: Sequence[int]) -> Iterator[np.ndarray]:
        for start, stop in block_ranges(block_ends):
            yield np.array(rows[start:stop])

    yield FeatureFile(ids, offsets, rows.shape, dtype, record, read_blocks)


def _map_features(path: Path) -> tuple[str, np.ndarray]:
    """Map the features into memory without reading them, and return them after their `FeatureFile.dtype`.

    The library cannot do this: NumPy has no bfloat16.
    """
    with path.open("rb") as file:
        header_bytes = int.from_bytes(file.read(8), "little")
        tensor = json.loads(file.read(header_bytes))["features"]
    if tensor["dtype"] not in SAFETENSORS_DTYPES:
        raise UserError(f"features are {tensor['dtype']}; choose one of: {', '.join(SAFETENSORS_DTYPES)}")
    raw = np.dtype(SAFETENSORS_DTYPES[tensor["dtype"]])
    check_declared_shape(path, tensor["shape"], raw.itemsize)
    rows = np.memmap(path, raw, "r", 8 + header_bytes + tensor["data_offsets"][0], tuple(tensor["shape"]))
    return "bfloat16" if tensor["dtype"] == "BF16" else stored_dtype(path, raw, {}), rows
