"""Features of media files that belong to no dataset: decoded, encoded and rounded as stage 1 does it, and stored nowhere."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from pipeline.cache.layout import from_stored, to_stored
from pipeline.data.media_digests import read_digest
from pipeline.data.media_files import manifest_of_files
from pipeline.encoders._encoder import Encoder
from pipeline.extraction.extract import default_batch_size
from pipeline.extraction.inputs import EncoderInputs, MemorySafeEncoder, make_input_rows
from pipeline.extraction.throughput import ThroughputMeter
from pipeline.extraction.workers import choose_workers, encode_batches
from pipeline.runtime.device import default_device


class EncodedFiles(NamedTuple):
    """Some files and their features."""

    files: Sequence[str]
    features: np.ndarray  # float32 [B, *feature_shape] with the precision of the store; NaN where a file failed
    digests: list[bytes]  # of the files' contents, see `media_digests`
    errors: list[str]  # why a file failed, without its name; "": it did not


def encode_files(files: Sequence[str], encoder: Encoder, store_dtype: str, workers: int = -1) -> Iterator[EncodedFiles]:
    """Yield the features of files in batches, in the order of the files; only a few batches are in memory.

    Args:
        files: paths of at least one file.
        encoder: the encoder, which reads pictures or clips.
        store_dtype: the number format of the cache whose features are wanted.
        workers: processes; -1: one per core, 0: only this process.

    Raises:
        UserError: as in `encode_batches`; a file that cannot be read is no error, but a row of NaN.
    """
    manifest = manifest_of_files(files, encoder.modality)
    inputs = EncoderInputs(manifest, encoder, make_input_rows(manifest, encoder.modality), store_dtype)
    batches = inputs.batches(range(len(files)), default_batch_size(inputs))
    meter = ThroughputMeter(choose_workers(workers, len(files)), default_device().type)
    for batch in encode_batches(inputs, batches, MemorySafeEncoder(encoder), meter):
        rows: list[int] = batch.rows.tolist()
        errors = {failure.row: failure.error for failure in batch.failures}
        paths = [manifest.media_path(manifest.samples[row]) for row in rows]
        yield EncodedFiles(
            files=[files[row] for row in rows],
            features=from_stored(to_stored(batch.features, store_dtype), store_dtype),
            digests=[read_digest(path) for path in paths],
            errors=[errors.get(row, "").removeprefix(f"{path.name}: ") for row, path in zip(rows, paths, strict=True)],
        )
