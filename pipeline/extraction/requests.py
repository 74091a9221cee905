"""How many requests an extraction sends to an object store: counted from its protocol, nothing is sent.

A cache in a bucket has the objects that one on a disk has as files (`cache.layout`). The counts are those of an extraction that
begins with an empty place and meets no errors: a request that is repeated is counted once. A test compares them with the
requests that are really sent.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import astuple, dataclass

import numpy as np
import zarr
from zarr.storage import MemoryStore

from pipeline.data.remote_tars import RANGE_BYTES
from pipeline.runtime.claims import RENEWALS_PER_LEASE, lease_seconds
from pipeline.runtime.stores import OBJECT_PIECE_BYTES

ZARR_OPEN = 3  # objects that Zarr asks for to open an array: of the third format and of the second


@dataclass(frozen=True, kw_only=True)
class Requests:
    """Numbers of requests by kind."""

    put: int = 0  # conditional ones too
    get: int = 0  # HEAD too
    list: int = 0
    delete: int = 0

    def __add__(self, other: Requests) -> Requests:
        return Requests(
            put=self.put + other.put, get=self.get + other.get, list=self.list + other.list, delete=self.delete + other.delete
        )

    def __mul__(self, times: int) -> Requests:
        put, get, listed, delete = (times * number for number in astuple(self))
        return Requests(put=put, get=get, list=listed, delete=delete)


HOLD = Requests(put=1, get=1, list=2, delete=1)  # `claims.hold`, without its renewals
RENEWAL = Requests(put=1, get=1)
ATTACH = Requests(get=1 + ZARR_OPEN)  # `Writer.attach`
COMMIT = Requests(put=2, get=3, delete=1)  # `Writer.commit`: three times it asks whether its claim is still there


@dataclass(frozen=True, kw_only=True)
class CacheSize:
    """What decides how many objects a cache has."""

    num_samples: int
    num_shards: int
    ids_bytes: int  # of all ids together
    is_ragged: bool = False  # of texts: any number of rows per sample, and there are offsets

    @property
    def array_files(self) -> Sequence[int]:
        """The bytes, roughly, of each object beside the shards and their records: metadata, ids, offsets."""
        num_chunks = -(-self.num_samples // ids_per_chunk(self.num_samples))
        files = [1, 1, 1, *[math.ceil(self.ids_bytes / num_chunks) + 1] * num_chunks]
        return [*files, 1, 8 * (self.num_samples + 1)] if self.is_ragged else files

    def hashing(self) -> Requests:
        """Return the requests of hashing all of these objects, see `stores.object_sha256`."""
        return Requests(get=sum(1 + -(-size // OBJECT_PIECE_BYTES) for size in self.array_files))

    def opening(self) -> Requests:
        """Return the requests of opening the complete cache, see `reader.open_cache`."""
        record, failures = 1, 4
        offsets = ZARR_OPEN + 1 if self.is_ragged else 0
        known = Requests(get=1 + record + len(self.array_files) + failures + 2 * ZARR_OPEN + offsets)
        return known + self.hashing() + Requests(get=2) * self.num_shards

    def beginning(self) -> Requests:
        """Return the requests of writing the metadata and looking for records that are there, see `extract.start_or_resume`."""
        files = len(self.array_files)
        written = Requests(list=1, get=files + 2, put=files + 1)
        looks = 1 if self.is_ragged else 2  # of media the digests are compared before
        return written + self.hashing() + ATTACH + Requests(get=looks) * self.num_shards

    def finishing(self) -> Requests:
        """Return the requests of `Writer.finish`, and of reading which samples have failed."""
        return Requests(put=2, get=2 + 2 + 1)


def ids_per_chunk(num_samples: int) -> int:
    """Return the number of ids that Zarr puts into one object."""
    ids = zarr.create_array(MemoryStore(), shape=(num_samples,), dtype=np.dtypes.StringDType(), chunks="auto")
    return ids.chunks[0]


def extraction_requests(size: CacheSize, seconds: float) -> Requests:
    """Return the requests of an extraction by one process, up to the opened cache.

    Args:
        size: the cache.
        seconds: how long it takes; a claim is renewed until it ends.
    """
    return HOLD + size.beginning() + COMMIT * size.num_shards + size.finishing() + size.opening() + renewals(seconds)


def shared_requests(size: CacheSize, seconds: float, num_workers: int, num_files: int) -> Requests:
    """Return the requests of an extraction by workers that share nothing but the store, if few samples fail.

    Args:
        size: the cache.
        seconds: how long it takes; each worker, and who has started them, renews a claim until it ends.
        num_workers: workers.
        num_files: files that are delivered to them: three of the manifest, and those of the encoder.
    """
    delivery = Requests(put=1, get=1) * num_files + Requests(get=2 * num_files) * num_workers  # if they have up to 16 MiB
    client = HOLD * 2 + size.beginning() + size.finishing() + size.opening()
    shard = HOLD + ATTACH + COMMIT
    return delivery + client + shard * size.num_shards + renewals(seconds) * (num_workers + 1)


def media_requests(num_bytes: float, num_tars: int, num_shards: int, num_machines: int) -> Requests:
    """Return the requests for media in tar files in an object store, if these have little else and no medium is long.

    Each part of a tar that a shard of the cache needs is asked for its stamp before and after, and for the digests. One machine
    reads a tar from start to end, several read it part by part.

    Args:
        num_bytes: of the media.
        num_tars: tar files.
        num_shards: shards of the cache.
        num_machines: machines that share out the shards.
    """
    num_parts = num_tars + num_shards - 1
    num_runs = num_tars if num_machines == 1 else num_parts
    return Requests(get=3 * num_parts + num_runs * math.ceil(num_bytes / num_runs / RANGE_BYTES))


def renewals(seconds: float) -> Requests:
    """Return the requests that keep a claim for this time."""
    return RENEWAL * int(seconds / (lease_seconds() / RENEWALS_PER_LEASE))
