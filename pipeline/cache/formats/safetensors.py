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
    blame,
    check_declared,
    document,
    id_strings,
    offsets_of,
    sidecar,
    spans,
    stored_dtype,
)
from pipeline.types import Sample

NAMES = {"float16": "F16", "float32": "F32", "bfloat16": "BF16"}
DTYPES = {
    "F64": "<f8",
    "F32": "<f4",
    "F16": "<f2",
    "BF16": "<u2",
    "I64": "<i8",
    "I32": "<i4",
    "I16": "<i2",
    "I8": "|i1",
    "U8": "|u1",
}
MAX_HEADER = 100_000_000  # bytes; the library refuses larger ones


def write(path: Path, features: FeatureFile, samples: Sequence[Sample]) -> None:
    """Write features, shard by shard, and what is known of their samples: the library's own writer needs them all in memory.

    `ValueError` when ids and labels are more than the format's header can hold.
    """
    described = {
        "ids": features.ids,
        "splits": [sample.split for sample in samples],
        "labels": [sample.labels for sample in samples],
        "about": features.about,
    }
    num_bytes = int(np.prod(features.shape)) * features.array_dtype.itemsize
    start = features.offsets.nbytes
    header = {
        "__metadata__": {key: json.dumps(value, ensure_ascii=False) for key, value in described.items()},
        "offsets": {"dtype": "I64", "shape": features.offsets.shape, "data_offsets": [0, start]},
        "features": {"dtype": NAMES[features.dtype], "shape": features.shape, "data_offsets": [start, start + num_bytes]},
    }
    encoded = json.dumps(header, ensure_ascii=False).encode()
    encoded += b" " * (-len(encoded) % 8)
    if len(encoded) > MAX_HEADER:
        raise ValueError(
            f"the ids and labels need {len(encoded)} bytes, a safetensors header holds {MAX_HEADER}; export to .h5"
        )
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        file.write(features.offsets.astype("<i8").data)
        for block in features.blocks(features.block_ends):
            file.write(np.ascontiguousarray(block, features.array_dtype).data)


@contextmanager
def read(path: Path) -> Iterator[FeatureFile]:
    """The features of a file of `write`, or of any with a tensor `features` and ids in metadata or `sidecar`.

    `ValueError` when it cannot be read.
    """
    with blame(path, SafetensorError):
        with safe_open(path, framework="np") as file:  # the library checks the header against the file
            tensors, metadata = list(file.keys()), file.metadata() or {}
            if "features" not in tensors:
                raise ValueError(f"there is no tensor 'features', only: {', '.join(tensors) or 'nothing'}")
            offsets = offsets_of(file.get_tensor("offsets") if "offsets" in tensors else [])
        about = document(metadata["about"]) if "about" in metadata else {}
        ids = id_strings(json.loads(metadata["ids"]) if "ids" in metadata else sidecar(path)["ids"])
        dtype, rows = _map(path)

    def blocks(block_ends: Sequence[int]) -> Iterator[np.ndarray]:
        for start, stop in spans(block_ends):
            yield np.array(rows[start:stop])

    yield FeatureFile(ids, offsets, rows.shape, dtype, about, blocks)


def _map(path: Path) -> tuple[str, np.ndarray]:
    """`FeatureFile.dtype`, and the features, not read yet: NumPy has no bfloat16, so the library cannot hand them out."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        tensor = json.loads(file.read(length))["features"]
    if tensor["dtype"] not in DTYPES:
        raise ValueError(f"features are {tensor['dtype']}; choose one of: {', '.join(DTYPES)}")
    raw = np.dtype(DTYPES[tensor["dtype"]])
    check_declared(path, tensor["shape"], raw.itemsize)
    rows = np.memmap(path, raw, "r", 8 + length + tensor["data_offsets"][0], tuple(tensor["shape"]))
    return "bfloat16" if tensor["dtype"] == "BF16" else stored_dtype(path, raw, {}), rows
