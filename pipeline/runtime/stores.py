"""What files are kept in: the folders of a disk, or an object store.

Both are used through one small interface: put, get and delete a whole object, get a range of its bytes, list objects, and put
an object that is not there yet. So the same protocol runs on both.
"""

from __future__ import annotations

import errno
import hashlib
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

from pipeline.runtime.connections import RETRY_SECONDS, ask_repeatedly, connect, find_endpoint, labelled, repeated
from pipeline.runtime.files import file_sha256, sync_folder, write_atomic
from pipeline.runtime.places import Address, Place

Data = bytes | memoryview | str | Iterator[bytes | memoryview]
REQUESTS_IN_FLIGHT = 16  # of one reader or writer
OBJECT_PIECE_BYTES = 2**24  # of an object that are sent or read at a time, if it may be larger than the memory
OBJECT_PIECES_IN_FLIGHT = 4  # that are sent
_ItemT = TypeVar("_ItemT")
_ResultT = TypeVar("_ResultT")


class StoredObject(NamedTuple):
    """An object as a store lists it."""

    place: Place
    num_bytes: int
    modified: float  # seconds since 1970, by the clock of the store
    stamp: str  # another one when the object has other bytes, see `Store.stamp`


class Store(Protocol):
    """Whole objects by place.

    An object that is not there raises a `FileNotFoundError`, a store that does not answer another `OSError`; both have the
    place as `filename`.
    """

    def put(self, place: Any, data: Data) -> None:
        """Write a whole object at once: a reader sees the old content or the new content, even if this process is killed."""
        ...

    def put_if_absent(self, place: Any, data: bytes) -> bool:
        """Write an object that is not there. Of several that try at the same time, one succeeds.

        Returns:
            Whether the object has these bytes now. Who must know that it was the one that wrote them makes them unique.
        """
        ...

    def get(self, place: Any) -> bytes:
        """Return the content of an object."""
        ...

    def get_range(self, place: Any, start: int, num_bytes: int) -> memoryview:
        """Return bytes of an object from `start` on: as many as wanted, or fewer if it ends before."""
        ...

    def stamp(self, place: Any) -> str:
        """Return a text that is another one when the object has other bytes: size and times of a file, else size and ETag."""
        ...

    def size(self, place: Any) -> int:
        """Return the number of bytes of an object."""
        ...

    def list(self, place: Any) -> list[StoredObject]:
        """Return all objects below a place, sorted."""
        ...

    def children(self, place: Any) -> list[str]:
        """Return the names directly below a place that have objects below them, sorted."""
        ...

    def delete(self, place: Any) -> None:
        """Remove an object, if it is there."""
        ...


class FileStore:
    """The `Store` of a disk: an object is a file."""

    def put(self, place: Path, data: Data) -> None:
        write_atomic(place, data)

    def put_if_absent(self, place: Path, data: bytes) -> bool:
        aside = place.with_name(f".{place.name}.{secrets.token_hex(4)}.tmp")
        write_atomic(aside, data)
        try:
            os.link(aside, place)
        except FileExistsError:
            return place.read_bytes() == data
        finally:
            aside.unlink()
        sync_folder(place.parent)
        return True

    def get(self, place: Path) -> bytes:
        return place.read_bytes()

    def get_range(self, place: Path, start: int, num_bytes: int) -> memoryview:
        with place.open("rb") as file:
            return memoryview(os.pread(file.fileno(), num_bytes, start))

    def size(self, place: Path) -> int:
        return place.stat().st_size

    def stamp(self, place: Path) -> str:
        return file_stamp(place.stat())

    def list(self, place: Path) -> list[StoredObject]:
        found = [(file, file.stat()) for file in sorted(place.rglob("*")) if file.is_file()]
        return [StoredObject(file, status.st_size, status.st_mtime, file_stamp(status)) for file, status in found]

    def children(self, place: Path) -> list[str]:
        return sorted(folder.name for folder in place.glob("*") if folder.is_dir())

    def delete(self, place: Path) -> None:
        place.unlink(missing_ok=True)


class BucketStore:
    """The `Store` of a bucket of an object store."""

    def __init__(self, bucket: str, endpoint: str = "") -> None:
        self.bucket = connect(bucket, endpoint)

    @repeated
    def put(self, place: Address, data: Data) -> None:
        content = _joined(data)
        with labelled(place) as obstore:
            obstore.put(self.bucket, place.key, content, use_multipart=False)

    def put_if_absent(self, place: Address, data: bytes) -> bool:
        deadline = time.monotonic() + RETRY_SECONDS
        while True:
            with labelled(place) as obstore:
                try:
                    obstore.put(self.bucket, place.key, data, mode="create", use_multipart=False)
                except obstore.exceptions.AlreadyExistsError:
                    return self._has(place, data)  # also true if the answer to an earlier request of ours was lost
                except obstore.exceptions.GenericError:  # it may have been written; the library repeats no such request
                    if time.monotonic() > deadline:
                        raise
                    time.sleep(0.1)
                else:
                    return True

    def renew(self, place: Address, data: bytes) -> bool:
        """Write an object again, so that it is as if it were new, unless it is gone or has other bytes.

        The store compares and writes in one step (`If-Match`), so an object that was removed meanwhile stays so.

        Returns:
            Whether the object has these bytes now.
        """
        with suppress(FileNotFoundError), labelled(place) as obstore:
            found = obstore.get(self.bucket, place.key)
            if bytes(found.bytes()) == data:
                version = {name: found.meta[name] for name in ("e_tag", "version") if found.meta[name]}
                try:
                    obstore.put(self.bucket, place.key, data, mode=version, use_multipart=False)
                except obstore.exceptions.PreconditionError:
                    return self._has(place, data)  # true if the answer to an earlier request of ours was lost
                return True
        return False

    def _has(self, place: Address, data: bytes) -> bool:
        try:
            return self.get(place) == data
        except FileNotFoundError:  # it was there a moment ago
            return False

    @repeated
    def get(self, place: Address) -> bytes:
        with labelled(place) as obstore:
            return bytes(obstore.get(self.bucket, place.key).bytes())

    @repeated
    def get_range(self, place: Address, start: int, num_bytes: int) -> memoryview:
        with labelled(place) as obstore:
            return memoryview(obstore.get_range(self.bucket, place.key, start=start, length=num_bytes))

    @repeated
    def read_unchanged(self, place: Address, start: int, num_bytes: int, stamp: str) -> memoryview:
        """Return bytes of an object as `get_range` does; `ESTALE` if it has another stamp."""
        with labelled(place) as obstore:
            found = obstore.get(self.bucket, place.key, options={"range": (start, start + num_bytes)})
            if _stamp(found.meta) != stamp:
                raise OSError(errno.ESTALE, "it was changed meanwhile; run the same command again", str(place))
            return memoryview(found.bytes())

    @repeated
    def head(self, place: Address) -> StoredObject:
        """Return what the store says about an object."""
        with labelled(place) as obstore:
            return _stored(place.bucket, obstore.head(self.bucket, place.key))

    def size(self, place: Address) -> int:
        return self.head(place).num_bytes

    def stamp(self, place: Address) -> str:
        return self.head(place).stamp

    @repeated
    def list(self, place: Address) -> list[StoredObject]:
        with labelled(place) as obstore:
            pages = list(obstore.list(self.bucket, place.key or None, chunk_size=1000))
        return sorted(_stored(place.bucket, item) for page in pages for item in page)

    @repeated
    def list_folder(self, place: Address) -> tuple[list[StoredObject], list[str]]:
        """Return the objects directly below a place, and the names there that have objects below them; both sorted."""
        with labelled(place) as obstore:
            found = obstore.list_with_delimiter(self.bucket, place.key or None)
        folders = sorted(prefix.rpartition("/")[2] for prefix in found["common_prefixes"])
        return sorted(_stored(place.bucket, item) for item in found["objects"]), folders

    def children(self, place: Address) -> list[str]:
        return self.list_folder(place)[1]

    @repeated
    def delete(self, place: Address) -> None:
        with suppress(FileNotFoundError), labelled(place) as obstore:  # S3 says nothing in this case, others do
            obstore.delete(self.bucket, place.key)


_FILES = FileStore()
_users: dict[str, int] = {}  # "process": the first that has used an object store


def store_of(place: Place) -> Store:
    """Return the store that has a place."""
    return _FILES if isinstance(place, Path) else _bucket_store(place.bucket)


def exists(place: Place) -> bool:
    """Whether there is an object at a place."""
    if isinstance(place, Path):
        return place.is_file()
    try:
        store_of(place).size(place)
    except FileNotFoundError:
        return False
    return True


def find_object(place: Address) -> StoredObject | None:
    """Return what an object store says about an object; None: it is not there."""
    with suppress(FileNotFoundError):
        return _bucket_store(place.bucket).head(place)


def objects_in(place: Address) -> list[StoredObject]:
    """Return the objects of an object store directly below a place, sorted."""
    return _bucket_store(place.bucket).list_folder(place)[0]


def object_sha256(place: Place) -> str:
    """Return the SHA-256 of the content of an object, as 64 hexadecimal digits; only a part of it is in memory."""
    if isinstance(place, Path):
        return file_sha256(place)
    digest = hashlib.sha256()
    for piece in _pieces(place):
        digest.update(piece)
    return digest.hexdigest()


def _pieces(place: Address) -> Iterator[memoryview]:
    """Yield the content of an object of an object store."""
    store = store_of(place)
    size = store.size(place)
    for start in range(0, size, OBJECT_PIECE_BYTES):
        yield store.get_range(place, start, min(OBJECT_PIECE_BYTES, size - start))


def send_file(file: Path, place: Address) -> None:
    """Write a file of any size to an object store; only a part of it is in memory, and the object is there when it is whole."""
    with labelled(place) as obstore:
        bucket = _bucket_store(place.bucket).bucket
        obstore.put(bucket, place.key, file, chunk_size=OBJECT_PIECE_BYTES, max_concurrency=OBJECT_PIECES_IN_FLIGHT)


def fetch_file(place: Address, file: Path) -> None:
    """Write an object of any size to a file; only a part of it is in memory."""
    write_atomic(file, _pieces(place))


def file_stamp(status: os.stat_result) -> str:
    """Return the size of a file and the times of its content and of its inode in ns.

    A program can set back the former time, not the latter.
    """
    return f"{status.st_size} {status.st_mtime_ns} {status.st_ctime_ns}"


def renew_object(place: Address, data: bytes) -> bool:
    """Write an object of an object store again, unless it is gone or has other bytes; return whether it has these now."""
    return _bucket_store(place.bucket).renew(place, data)


def read_unchanged(place: Address, start: int, num_bytes: int, stamp: str) -> memoryview:
    """Return bytes of an object of an object store that still has this stamp.

    Raises:
        OSError: the object has other bytes now (`ESTALE`), or as in `Store`.
    """
    return _bucket_store(place.bucket).read_unchanged(place, start, num_bytes, stamp)


def remove_objects(place: Place, first: str = "", kept: str = "") -> None:
    """Remove all objects below a place.

    Args:
        place: the place; a folder is removed with them.
        first: the name of the object without which the others count as removed; in an object store it goes before them.
        kept: in an object store, a name whose objects stay: those by which this process says that it is the only one here.
    """
    if isinstance(place, Path):
        shutil.rmtree(place)
        return
    store = store_of(place)
    if first:
        store.delete(place / first)
    found = [each.place for each in store.list(place)]
    map_objects(place, store.delete, [each for each in found if not (kept and str(each).startswith(f"{place / kept}/"))])


def map_objects(place: Place, function: Callable[[_ItemT], _ResultT], items: Iterable[_ItemT]) -> list[_ResultT]:
    """Return the results of a function that reads or writes objects at or below a place.

    Requests to an object store are in flight together.
    """
    todo: Sequence[_ItemT] = list(items)
    if isinstance(place, Path) or len(todo) < 2:
        return list(map(function, todo))
    with ThreadPoolExecutor(REQUESTS_IN_FLIGHT) as threads:
        return list(threads.map(function, todo))


def zarr_source(place: Place) -> Any:
    """Return what `zarr.open_array` and `zarr.open_group` take in place of a folder."""
    if isinstance(place, Path):
        return place
    from zarr.storage import ObjectStore, StorePath

    class LabelledStore(ObjectStore[Any]):
        async def get(self, key: str, prototype: Any, byte_range: Any = None) -> Any:
            get = super().get
            return await ask_repeatedly(Address(place.bucket, key), lambda: get(key, prototype, byte_range))

    return StorePath(LabelledStore(_bucket_store(place.bucket).bucket, read_only=True), place.key)


def _bucket_store(bucket: str) -> BucketStore:
    return _open_bucket(bucket, os.getpid(), find_endpoint(bucket))


@cache
def _open_bucket(bucket: str, process: int, endpoint: str) -> BucketStore:
    """Return the store of a bucket for one process; it is opened once.

    Raises:
        OSError: the process was forked from one that uses object stores: the threads of the library are not in it.
    """
    if _users.setdefault("process", process) != process:
        raise OSError(errno.EIO, "a forked process cannot use an object store that its parent uses", bucket)
    return BucketStore(bucket, endpoint)


def _joined(data: Data) -> bytes:
    """Return data as bytes. The pieces of an iterator are copied one by one, because they are overwritten."""
    if isinstance(data, str):
        return data.encode()
    return bytes(data) if isinstance(data, bytes | memoryview) else b"".join(bytes(piece) for piece in data)


def _stored(bucket: str, meta: Mapping[str, Any]) -> StoredObject:
    return StoredObject(Address(bucket, meta["path"]), meta["size"], meta["last_modified"].timestamp(), _stamp(meta))


def _stamp(meta: Mapping[str, Any]) -> str:
    """Return the stamp of an object; a store without ETags gives its size alone.

    Azure puts ETags in quotes when it gives an object, and not when it lists it.
    """
    return f"{meta['size']} {(meta['e_tag'] or '').strip(chr(34))}".strip()
