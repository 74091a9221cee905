"""HDF5: datasets `features`, `ids`, `splits`, `labels`, `offsets` (several rows per sample) and `about`, a JSON document."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import h5py
import numpy as np

from pipeline.cache.exchange import (
    ID_LIMIT,
    NO_OFFSETS,
    FeatureFile,
    blame,
    check_declared,
    document,
    ends,
    id_strings,
    offsets_of,
    spans,
    stored_dtype,
)
from pipeline.cache.incoming import check_id_bytes
from pipeline.types import Sample

ID_BLOCK = 512  # ids that are read at a time
SMALL_ID_BLOCK = 16  # when each could be so long as the file is
ID_BLOCK_BYTES = 2**28


def write(path: Path, features: FeatureFile, samples: Sequence[Sample]) -> None:
    """Write features, shard by shard, and what is known of their samples; `OSError` when the disk does not take it."""
    try:
        _write(path, features, samples)
    except (OSError, RuntimeError) as error:  # HDF5 tells of buffers and offsets, and of a full disk twice
        number = (isinstance(error, OSError) and error.errno) or errno.EIO
        raise OSError(number, os.strerror(number), str(path)) from error


def _write(path: Path, features: FeatureFile, samples: Sequence[Sample]) -> None:
    text = h5py.string_dtype()
    labels = np.empty(len(samples), dtype=object)
    for row, sample in enumerate(samples):
        labels[row] = np.array(sample.labels, dtype=np.int32)
    blocks = zip(spans(features.block_ends), features.blocks(features.block_ends), strict=True)
    with h5py.File(path, "w") as file:
        rows = file.create_dataset("features", shape=features.shape, dtype=features.array_dtype)
        rows.attrs["dtype"] = features.dtype
        for (start, stop), block in blocks:
            rows[start:stop] = block
        file.create_dataset("ids", data=features.ids, dtype=text)
        file.create_dataset("splits", data=[sample.split for sample in samples], dtype=text)
        file.create_dataset("labels", data=labels, dtype=h5py.vlen_dtype(np.int32))
        if len(features.offsets):
            file.create_dataset("offsets", data=features.offsets)
        file.create_dataset("about", data=json.dumps(features.about, ensure_ascii=False), dtype=text)


@contextmanager
def read(path: Path) -> Iterator[FeatureFile]:
    """The features of a file of `write`, or of any with datasets `features` and `ids`; `ValueError` when it cannot be read."""
    with ExitStack() as stack:
        with blame(path, RuntimeError):
            file = stack.enter_context(h5py.File(path, "r"))
            rows = _dataset(file, "features")
            about = document(str(_dataset(file, "about").asstr()[()])) if "about" in file else {}
            dtype = stored_dtype(path, rows.dtype, about)
            check_declared(path, rows.shape or (), rows.dtype.itemsize)
            check_declared(path, rows.chunks or rows.shape, rows.dtype.itemsize)
            offsets = offsets_of(_column(path, file, "offsets")[:]) if "offsets" in file else NO_OFFSETS
            ids = _ids(path, _column(path, file, "ids"))

        def blocks(block_ends: Sequence[int]) -> Iterator[np.ndarray]:
            for start, stop in spans(block_ends):
                with blame(path, RuntimeError):
                    block = rows[start:stop]
                yield block

        yield FeatureFile(ids, offsets, tuple(rows.shape), dtype, about, blocks)


def _dataset(file: h5py.File, name: str) -> h5py.Dataset:
    """A dataset that lies in the file itself: links and virtual or external storage could read other files of this machine."""
    link = file.get(name, getlink=True)
    if link is None:
        raise ValueError(f"there is no dataset {name!r}, only: {', '.join(file) or 'nothing'}")
    item = file[name] if isinstance(link, h5py.HardLink) else None
    if not isinstance(item, h5py.Dataset) or item.is_virtual or item.external:
        raise ValueError(f"{name!r} is no dataset of the file itself")
    return item


def _column(path: Path, file: h5py.File, name: str) -> h5py.Dataset:
    column = _dataset(file, name)
    if column.ndim != 1 or not 1 <= len(column) <= path.stat().st_size:
        raise ValueError(f"{name!r} must be one list of a length that the file can hold, not of shape {column.shape}")
    return column


def _ids(path: Path, ids: h5py.Dataset) -> list[str]:
    is_text = h5py.check_string_dtype(ids.dtype) is not None
    if not is_text and ids.dtype.kind not in "iu":
        raise ValueError(f"'ids' must be strings or whole numbers, not {ids.dtype}")
    values = ids.asstr("utf-8") if is_text else ids
    is_fixed = ids.dtype.kind != "O"
    if is_fixed and ids.dtype.itemsize > 4 * ID_LIMIT:
        raise ValueError(f"'ids' are strings of {ids.dtype.itemsize} bytes; an id has {ID_LIMIT} characters at most")
    # of any length: many may be one and the same string, stored once
    block_rows = ID_BLOCK if is_fixed else max(SMALL_ID_BLOCK, min(ID_BLOCK, ID_BLOCK_BYTES // path.stat().st_size))
    names: list[str] = []
    num_bytes = 0
    for start, stop in spans(ends(len(ids), block_rows)):
        block = id_strings(np.asarray(values[start:stop]).tolist())
        num_bytes += sum(map(len, block))
        check_id_bytes(path, num_bytes)
        names += block
    return names
