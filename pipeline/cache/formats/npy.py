"""NumPy: <stem>.npy with the features, and <stem>.json with `ids`, `splits`, `labels`, `offsets` and `about`."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from math import prod
from pathlib import Path

import numpy as np

from pipeline.cache.exchange import FeatureFile, blame, check_declared, id_strings, offsets_of, sidecar, spans, stored_dtype
from pipeline.types import Sample


def write(path: Path, features: FeatureFile, samples: Sequence[Sample]) -> None:
    """Write features, shard by shard, and beside them what is known of their samples."""
    described = {
        "ids": features.ids,
        "splits": [sample.split for sample in samples],
        "labels": [sample.labels for sample in samples],
        "offsets": features.offsets.tolist(),
        "about": features.about,
    }
    header = {"descr": features.array_dtype.str, "fortran_order": False, "shape": features.shape}
    path.with_suffix(".json").write_text(json.dumps(described, ensure_ascii=False), encoding="utf-8")
    with path.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
        for block in features.blocks(features.block_ends):
            file.write(np.ascontiguousarray(block, features.array_dtype).data)


@contextmanager
def read(path: Path) -> Iterator[FeatureFile]:
    """The features of a file of `write`, or of any with ids beside it (`sidecar`); `ValueError` when it cannot be read."""
    with blame(path):
        described = sidecar(path)
        about = described.get("about", {})
        raw = _map(path, about)
        offsets = offsets_of(described.get("offsets", []))
        ids = id_strings(described["ids"])

    def blocks(block_ends: Sequence[int]) -> Iterator[np.ndarray]:
        for start, stop in spans(block_ends):
            yield np.array(raw[start:stop])

    yield FeatureFile(ids, offsets, raw.shape, stored_dtype(path, raw.dtype, about), about, blocks)


def _map(path: Path, about: dict[str, object]) -> np.ndarray:
    """The array of the file, not read yet; nothing in it is ever unpickled."""
    with path.open("rb") as file:
        version = np.lib.format.read_magic(file)
        read_header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
        if version not in read_header:
            raise ValueError(f"version {version} of the npy format is for structured arrays")
        shape, fortran_order, dtype = read_header[version](file)
        stored_dtype(path, dtype, about)
        check_declared(path, shape, dtype.itemsize)
        held, needed = path.stat().st_size - file.tell(), prod(shape) * dtype.itemsize
        if held != needed:
            raise ValueError(f"{path} holds {held} bytes of features, its shape {list(shape)} needs {needed}")
        return np.memmap(file, dtype, "r", file.tell(), shape, "F" if fortran_order else "C")
