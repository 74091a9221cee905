"""NumPy: <stem>.npy with the features, and <stem>.json with `ids`, `splits`, `labels`, `offsets` and `about`."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from math import prod
from pathlib import Path

import numpy as np

from pipeline.cache.exchange import (
    FeatureFile,
    block_ranges,
    check_declared_shape,
    id_strings,
    label_read_errors,
    parse_offsets,
    read_sidecar,
    stored_dtype,
)
from pipeline.runtime.errors import UserError
from pipeline.types import Sample


def write(path: Path, features: FeatureFile, samples: Sequence[Sample]) -> None:
    """Write features, block by block, and a JSON file with the ids, splits and labels of their samples."""
    described = {
        "ids": features.ids,
        "splits": [sample.split for sample in samples],
        "labels": [sample.labels for sample in samples],
        "offsets": features.offsets.tolist(),
        "about": features.record,
    }
    header = {"descr": features.array_dtype.str, "fortran_order": False, "shape": features.shape}
    path.with_suffix(".json").write_text(json.dumps(described, ensure_ascii=False), encoding="utf-8")
    with path.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
        for block in features.read_blocks(features.block_ends):
            file.write(np.ascontiguousarray(block, features.array_dtype).data)


@contextmanager
def read(path: Path) -> Iterator[FeatureFile]:
    """Open a file of `write`, or any .npy file with its ids in a file beside it, see `read_sidecar`.

    Raises:
        UserError: the file cannot be read.
    """
    with label_read_errors(path):
        described = read_sidecar(path)
        record = described.get("about", {})
        raw = _map_features(path, record)
        offsets = parse_offsets(described.get("offsets", []))
        ids = id_strings(described["ids"])

    def read_blocks(block_ends: Sequence[int]) -> Iterator[np.ndarray]:
        for start, stop in block_ranges(block_ends):
            yield np.array(raw[start:stop])

    yield FeatureFile(ids, offsets, raw.shape, stored_dtype(path, raw.dtype, record), record, read_blocks)


def _map_features(path: Path, record: dict[str, object]) -> np.ndarray:
    """Map the array of the file into memory without reading it. Nothing in the file is ever unpickled."""
    with path.open("rb") as file:
        version = np.lib.format.read_magic(file)
        read_header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
        if version not in read_header:
            raise UserError(f"version {version} of the npy format is for structured arrays")
        shape, fortran_order, dtype = read_header[version](file)
        stored_dtype(path, dtype, record)
        check_declared_shape(path, shape, dtype.itemsize)
        num_bytes, expected_bytes = path.stat().st_size - file.tell(), prod(shape) * dtype.itemsize
        if num_bytes != expected_bytes:
            raise UserError(f"{path} holds {num_bytes} bytes of features, its shape {list(shape)} needs {expected_bytes}")
        return np.memmap(file, dtype, "r", file.tell(), shape, "F" if fortran_order else "C")
