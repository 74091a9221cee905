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
    MAX_ID_CHARACTERS,
    NO_OFFSETS,
    FeatureFile,
    block_ranges,
    check_declared_shape,
    id_strings,
    label_read_errors,
    make_block_ends,
    parse_json_object,
    parse_offsets,
    stored_dtype,
)
from pipeline.cache.import_plan import check_id_bytes
from pipeline.runtime.errors import UserError
from pipeline.types import Sample

MAX_IDS_PER_READ = 512
MIN_IDS_PER_READ = 16  # for large files, where each id may be as long as the file
MAX_ID_READ_BYTES = 2**28  # of the ids of one read, if each is as long as the file


def write(path: Path, features: FeatureFile, samples: Sequence[Sample]) -> None:
    """Write features, block by block, with the ids, splits and labels of their samples.

    Raises:
        OSError: the file cannot be written, for example because the disk is full.
    """
    try:
        _write_datasets(path, features, samples)
    except (OSError, RuntimeError) as error:  # HDF5 writes about buffers and offsets, and reports a full disk twice
        number = (isinstance(error, OSError) and error.errno) or errno.EIO
        raise OSError(number, os.strerror(number), str(path)) from error


def _write_datasets(path: Path, features: FeatureFile, samples: Sequence[Sample]) -> None:
    text_dtype = h5py.string_dtype()
    labels = np.empty(len(samples), dtype=object)
    for row, sample in enumerate(samples):
        labels[row] = np.array(sample.labels, dtype=np.int32)
    blocks = zip(block_ranges(features.block_ends), features.read_blocks(features.block_ends), strict=True)
    with h5py.File(path, "w") as file:
        rows = file.create_dataset("features", shape=features.shape, dtype=features.array_dtype)
        rows.attrs["dtype"] = features.dtype
        for (start, stop), block in blocks:
            rows[start:stop] = block
        file.create_dataset("ids", data=features.ids, dtype=text_dtype)
        file.create_dataset("splits", data=[sample.split for sample in samples], dtype=text_dtype)
        file.create_dataset("labels", data=labels, dtype=h5py.vlen_dtype(np.int32))
        if len(features.offsets):
            file.create_dataset("offsets", data=features.offsets)
        file.create_dataset("about", data=json.dumps(features.record, ensure_ascii=False), dtype=text_dtype)


@contextmanager
def read(path: Path) -> Iterator[FeatureFile]:
    """Open a file of `write`, or any HDF5 file with datasets `features` and `ids`.

    Raises:
        UserError: the file cannot be read.
    """
    with ExitStack() as stack:
        with label_read_errors(path, RuntimeError):
            file = stack.enter_context(h5py.File(path, "r"))
            rows = _own_dataset(file, "features")
            record = parse_json_object(str(_own_dataset(file, "about").asstr()[()])) if "about" in file else {}
            dtype = stored_dtype(path, rows.dtype, record)
            check_declared_shape(path, rows.shape or (), rows.dtype.itemsize)
            check_declared_shape(path, rows.chunks or rows.shape, rows.dtype.itemsize)
            offsets = parse_offsets(_column(path, file, "offsets")[:]) if "offsets" in file else NO_OFFSETS
            ids = _read_ids(path, _column(path, file, "ids"))

        def read_blocks(block_ends: Sequence[int]) -> Iterator[np.ndarray]:
            for start, stop in block_ranges(block_ends):
                with label_read_errors(path, RuntimeError):
                    block = rows[start:stop]
                yield block

        yield FeatureFile(ids, offsets, tuple(rows.shape), dtype, record, read_blocks)


def _own_dataset(file: h5py.File, name: str) -> h5py.Dataset:
    """Return a dataset that is stored in the file itself.

    Links, and virtual or external storage, are refused: they could read other files of this machine.
    """
    link = file.get(name, getlink=True)
    if link is None:
        raise UserError(f"there is no dataset {name!r}, only: {', '.join(file) or 'nothing'}")
    item = file[name] if isinstance(link, h5py.HardLink) else None
    if not isinstance(item, h5py.Dataset) or item.is_virtual or item.external:
        raise UserError(f"{name!r} is no dataset of the file itself")
    return item


def _column(path: Path, file: h5py.File, name: str) -> h5py.Dataset:
    """Return a dataset of one dimension; `UserError` when it is longer than the file can hold."""
    column = _own_dataset(file, name)
    if column.ndim != 1 or not 1 <= len(column) <= path.stat().st_size:
        raise UserError(f"{name!r} must be one list of a length that the file can hold, not of shape {column.shape}")
    return column


def _read_ids(path: Path, ids: h5py.Dataset) -> list[str]:
    is_text = h5py.check_string_dtype(ids.dtype) is not None
    if not is_text and ids.dtype.kind not in "iu":
        raise UserError(f"'ids' must be strings or whole numbers, not {ids.dtype}")
    values = ids.asstr("utf-8") if is_text else ids
    is_fixed = ids.dtype.kind != "O"
    if is_fixed and ids.dtype.itemsize > 4 * MAX_ID_CHARACTERS:
        raise UserError(f"'ids' are strings of {ids.dtype.itemsize} bytes; an id has {MAX_ID_CHARACTERS} characters at most")
    ids_per_read = MAX_IDS_PER_READ
    if not is_fixed:  # an id may be as long as the file, and all ids may be that string, which is stored once
        ids_per_read = max(MIN_IDS_PER_READ, min(MAX_IDS_PER_READ, MAX_ID_READ_BYTES // path.stat().st_size))
    sample_ids: list[str] = []
    num_bytes = 0
    for start, stop in block_ranges(make_block_ends(len(ids), ids_per_read)):
        block = id_strings(np.asarray(values[start:stop]).tolist())
        num_bytes += sum(map(len, block))
        check_id_bytes(path, num_bytes)
        sample_ids += block
    return sample_ids
