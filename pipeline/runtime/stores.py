"""What files are kept in: the folders of a disk, or an object store.

Both are used through one small interface: put, get and delete a whole object, get a range of its bytes, list objects, and put
an object that is not there yet. So the same protocol runs on both. Only this module imports obstore, an extra package, which
takes credentials and endpoints from the environment; they are never logged or stored.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar
from urllib.parse import urlsplit

from pipeline.runtime.errors import UserError
from pipeline.runtime.files import file_sha256, sync_folder, write_atomic
from pipeline.runtime.places import Address, Place

logger = logging.getLogger(__name__)

Data = bytes | memoryview | str | Iterator[bytes | memoryview]
REQUESTS_IN_FLIGHT = 16  # of one reader or writer
HASHED_BYTES = 2**24  # of an object that are read at a time to hash it
REQUEST_TIMEOUT = "120s"  # of one request; a shard has at most 256 MiB
RETRY_SECONDS = 60.0  # time in which a request that fails is repeated
ENDPOINT_VARIABLES = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT")
CREDENTIAL_VARIABLES = {"s3": "AWS_", "gs": "GOOGLE_", "az": "AZURE_"}  # how their names begin
_ItemT = TypeVar("_ItemT")
_ResultT = TypeVar("_ResultT")


class StoredObject(NamedTuple):
    """An object as a store lists it."""

    place: Place
    num_bytes: int
    modified: float  # seconds since 1970, by the clock of the store


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

    def list(self, place: Path) -> list[StoredObject]:
        found = [(file, file.stat()) for file in sorted(place.rglob("*")) if file.is_file()]
        return [StoredObject(file, status.st_size, status.st_mtime) for file, status in found]

    def children(self, place: Path) -> list[str]:
        return sorted(folder.name for folder in place.glob("*") if folder.is_dir())

    def delete(self, place: Path) -> None:
        place.unlink(missing_ok=True)


class BucketStore:
    """The `Store` of a bucket of an object store."""

    def __init__(self, bucket: str, endpoint: str = "") -> None:
        self.bucket = _connect(bucket, endpoint)

    def put(self, place: Address, data: Data) -> None:
        content = _joined(data)
        with _labelled(place) as obstore:
            obstore.put(self.bucket, place.key, content, use_multipart=False)

    def put_if_absent(self, place: Address, data: bytes) -> bool:
        deadline = time.monotonic() + RETRY_SECONDS
        while True:
            with _labelled(place) as obstore:
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
        with suppress(FileNotFoundError), _labelled(place) as obstore:
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

    def get(self, place: Address) -> bytes:
        with _labelled(place) as obstore:
            return bytes(obstore.get(self.bucket, place.key).bytes())

    def get_range(self, place: Address, start: int, num_bytes: int) -> memoryview:
        with _labelled(place) as obstore:
            return memoryview(obstore.get_range(self.bucket, place.key, start=start, length=num_bytes))

    def size(self, place: Address) -> int:
        with _labelled(place) as obstore:
            return obstore.head(self.bucket, place.key)["size"]

    def list(self, place: Address) -> list[StoredObject]:
        with _labelled(place) as obstore:
            pages = list(obstore.list(self.bucket, place.key or None, chunk_size=1000))
        found = [
            StoredObject(Address(place.bucket, item["path"]), item["size"], item["last_modified"].timestamp())
            for page in pages
            for item in page
        ]
        return sorted(found)

    def children(self, place: Address) -> list[str]:
        with _labelled(place) as obstore:
            found = obstore.list_with_delimiter(self.bucket, place.key or None)
        return sorted(prefix.rpartition("/")[2] for prefix in found["common_prefixes"])

    def delete(self, place: Address) -> None:
        with suppress(FileNotFoundError), _labelled(place) as obstore:  # S3 says nothing in this case, others do
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


def object_sha256(place: Place) -> str:
    """Return the SHA-256 of the content of an object, as 64 hexadecimal digits; only a part of it is in memory."""
    if isinstance(place, Path):
        return file_sha256(place)
    store, digest = store_of(place), hashlib.sha256()
    size = store.size(place)
    for start in range(0, size, HASHED_BYTES):
        digest.update(store.get_range(place, start, min(HASHED_BYTES, size - start)))
    return digest.hexdigest()


def renew_object(place: Address, data: bytes) -> bool:
    """Write an object of an object store again, unless it is gone or has other bytes; return whether it has these now."""
    return _bucket_store(place.bucket).renew(place, data)


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

    bucket: Any = _bucket_store(place.bucket).bucket
    return StorePath(ObjectStore(bucket, read_only=True), place.key)


def _bucket_store(bucket: str) -> BucketStore:
    return _open_bucket(bucket, os.getpid(), _endpoint(bucket))


@cache
def _open_bucket(bucket: str, process: int, endpoint: str) -> BucketStore:
    """Return the store of a bucket for one process; it is opened once.

    Raises:
        OSError: the process was forked from one that uses object stores: the threads of the library are not in it.
    """
    if _users.setdefault("process", process) != process:
        raise OSError(errno.EIO, "a forked process cannot use an object store that its parent uses", bucket)
    return BucketStore(bucket, endpoint)


def _endpoint(bucket: str) -> str:
    """Return the address of a server that speaks the protocol of S3; "": the provider's own."""
    return next(filter(None, map(os.environ.get, ENDPOINT_VARIABLES)), "") if bucket.startswith("s3://") else ""


def _check_endpoint(bucket: str, endpoint: str) -> None:
    """Refuse what is no address of a server, or has credentials in it. It may be a secret, so no message repeats it.

    Raises:
        UserError: it is refused.
    """
    try:
        parts = urlsplit(endpoint)
        is_right = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
    except ValueError:  # of the port, or of an IPv6 address
        is_right = False
    if not is_right or not endpoint.isascii() or set(endpoint) & set("@?# ") or not endpoint.isprintable():
        raise UserError(
            f"{bucket}: AWS_ENDPOINT_URL must be http://host:port or https://host, without credentials; put these into "
            "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        )


def _connect(bucket: str, endpoint: str) -> Any:
    """Return the connection to a bucket; nothing is asked of it yet.

    Raises:
        UserError: obstore is not installed, or the environment has no right endpoint or credentials.
    """
    try:
        from obstore.exceptions import BaseError
        from obstore.store import from_url
    except ImportError as error:
        raise UserError(f"{bucket} needs the package obstore: pip install obstore") from error
    options: dict[str, Any] = {"client_options": {"timeout": REQUEST_TIMEOUT, "connect_timeout": "10s"}}
    if endpoint:
        _check_endpoint(bucket, endpoint)
        options["endpoint"] = endpoint
        options["client_options"]["allow_http"] = endpoint.startswith("http://")
    backoff = {"init_backoff": timedelta(seconds=0.1), "max_backoff": timedelta(seconds=5), "base": 2}
    options["retry_config"] = {"max_retries": 20, "retry_timeout": timedelta(seconds=RETRY_SECONDS), "backoff": backoff}
    try:
        return from_url(bucket, **options)
    except (BaseError, ValueError):  # the text may be that of a variable
        variables = CREDENTIAL_VARIABLES[bucket.partition(":")[0]]
        raise UserError(
            f"{bucket} cannot be opened with the credentials in the environment; are the variables {variables}… right?"
        ) from None


@contextmanager
def _labelled(place: Address) -> Iterator[Any]:
    """Yield the module obstore; its errors in the block become an `OSError` that names the place."""
    import obstore

    try:
        yield obstore
    except FileNotFoundError as error:
        raise FileNotFoundError(errno.ENOENT, "there is no such object", str(place)) from error
    except obstore.exceptions.BaseError as error:
        logger.debug("%s: %s", place, type(error).__name__)
        raise OSError(errno.EIO, _reason(error), str(place)) from None  # its long text has settings of the connection


def _reason(error: Exception) -> str:
    """Return one line about an error of the library, with its remedy.

    The first line of the library's text has the address of the request; `_check_endpoint` lets none with credentials through.
    """
    import obstore

    if isinstance(error, obstore.exceptions.PermissionDeniedError | obstore.exceptions.UnauthenticatedError):
        return "access is refused; are the credentials in the environment those of this bucket?"
    line = " ".join(str(error).split("\n")[0].split())
    return f"{line[:300]}; are the bucket's name, AWS_ENDPOINT_URL and AWS_REGION right, and does the store answer?"


def _joined(data: Data) -> bytes:
    """Return data as bytes. The pieces of an iterator are copied one by one, because they are overwritten."""
    if isinstance(data, str):
        return data.encode()
    return bytes(data) if isinstance(data, bytes | memoryview) else b"".join(bytes(piece) for piece in data)
