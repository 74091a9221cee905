"""Where files lie: a folder or file of a disk, or an address in an object store.

Caches may lie in an object store; manifests, runs and reports lie in the home, a folder. Which store has the caches of a home
is said by --caches or the environment variable DIFFALIGN_CACHES.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, TypeAlias

from pipeline.runtime.errors import UserError

CACHES_VARIABLE = "DIFFALIGN_CACHES"
HOME_VARIABLE = "DIFFALIGN_HOME"
DEFAULT_HOME = Path("artifacts")
SCHEMES = ("s3", "gs", "az")
_ADDRESS = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/+([^/]*)/*(.*)", re.DOTALL)  # the letter of a disk, C:/, is none
_TYPO = re.compile(rf"({'|'.join(SCHEMES)})(?://|:(?!/))", re.IGNORECASE)  # s3//bucket, s3:bucket


@dataclass(frozen=True, order=True, slots=True)
class Address:
    """An object of an object store, or all objects whose keys begin with this key and a slash."""

    bucket: str  # with its scheme: "s3://bucket"
    key: str  # no slash at either end; "": the whole bucket

    def __str__(self) -> str:
        return f"{self.bucket}/{self.key}"

    def __truediv__(self, name: str) -> Address:
        return Address(self.bucket, f"{self.key}/{name}".strip("/"))

    @property
    def name(self) -> str:
        """The last part of the key."""
        return self.key.rpartition("/")[2]

    @property
    def parent(self) -> Address:
        """The address without the last part of its key."""
        return Address(self.bucket, self.key.rpartition("/")[0])

    def absolute(self) -> Address:
        """The address itself; so that a `Place` has this method."""
        return self

    def relative_to(self, other: Address) -> PurePosixPath:
        """The rest of the key behind that of an address above this one."""
        return PurePosixPath(self.key).relative_to(other.key)


# In truth `Path | Address`. `Any` lets code that has its caches on a disk take a place for a path without asking each time.
Place: TypeAlias = Path | Any


def is_address(text: object) -> bool:
    """Whether a text is an address, such as s3://bucket/prefix, and no path."""
    return isinstance(text, Address) or bool(_ADDRESS.match(str(text)))


def parse_place(text: str | Place) -> Place:
    """Return the place that a user has written.

    Raises:
        UserError: it is the address of a service that is not supported, has credentials or ".." in it, or lacks a : or /.
    """
    if isinstance(text, Address):
        return text
    if typo := _TYPO.match(str(text)):
        raise UserError(f"{typo[0]}… is no address: give one such as {typo[1]}://bucket/prefix, or for a folder ./{typo[0]}…")
    if not (found := _ADDRESS.fullmatch(str(text))):
        return Path(text)
    scheme, bucket, key = found.groups()
    known = ", ".join(f"{scheme}://bucket/prefix" for scheme in SCHEMES)
    if scheme.lower() in ("http", "https"):  # it may have a password in it, so it is not repeated
        raise UserError(
            f"{scheme}://… is no address of an object store: give one such as {known}; a server that speaks the protocol of S3 "
            "goes into the variable AWS_ENDPOINT_URL (http://host:port). There is no room for credentials in them: put these "
            "into AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        )
    if not _is_free_of_secrets(bucket, key):  # so it is not repeated
        raise UserError(
            f"an address {scheme}://… has no room for credentials, nor for : @ ? #: give it without them, and put them into "
            "the environment (AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, GOOGLE_SERVICE_ACCOUNT, AZURE_STORAGE_ACCOUNT_KEY)"
        )
    if scheme not in SCHEMES or not bucket:
        raise UserError(f"{scheme}://{bucket}/{key} is no address of an object store: give one such as {known}")
    parts = [part for part in key.split("/") if part not in ("", ".")]
    if ".." in parts:
        raise UserError(f"{scheme}://{bucket}/{key} has '..' in it, which no object store follows; give the address itself")
    return Address(f"{scheme}://{bucket}", "/".join(parts))


def absolute_text(place: Place) -> str:
    """Return a place as text that means it from anywhere, without symbolic links."""
    return str(place.resolve() if isinstance(place, Path) else place)


def check_local(path: str | Path, label: str) -> Path:
    """Return a path as a `Path`; refuse an address such as s3://bucket, of which `Path` would make a folder named "s3:".

    Args:
        path: the path.
        label: how the message calls it.

    Raises:
        UserError: it is an address.
    """
    if found := _ADDRESS.fullmatch(str(path)):
        scheme, bucket, key = found.groups()
        address = f"{scheme}://{bucket}{'/' if key else ''}{key}" if _is_free_of_secrets(bucket, key) else f"{scheme}://…"
        raise UserError(
            f"{label} {address} is an address, and manifests, runs and reports are kept in folders: give a folder of a disk of "
            "this machine, of NFS, or of a bucket that is mounted (rclone mount, s3fs, gcsfuse); caches alone may be in an "
            f"object store: --caches {address}"
        )
    return Path(path)


def _is_free_of_secrets(bucket: str, key: str) -> bool:
    """Whether no part of an address can be a password or the signature of a link: key:password@bucket, ?sig=…, #sig=…"""
    return not set(bucket) & set(":@?#") and not set(key) & set("@?#")


_homes: dict[Place, Path] = {}  # place of caches -> the home that they belong to


def caches_place(home: Path) -> Place:
    """Return where the caches of a home are: <home>/caches, unless the environment names another place.

    From then on `home_of_caches` knows the home.
    """
    place = parse_place(os.environ.get(CACHES_VARIABLE) or home / "caches")
    _homes[_without_dots(place)] = home.absolute()
    return place


def home_of_caches(place: Place) -> Path | None:
    """Return the home whose caches are at a place; of an address that was not asked for, that of the environment."""
    if isinstance(place, Address):
        return _homes.get(place) or Path(os.environ.get(HOME_VARIABLE) or DEFAULT_HOME)
    return _homes.get(_without_dots(place))


def _without_dots(place: Place) -> Place:
    return Path(os.path.abspath(place)) if isinstance(place, Path) else place


def place_with_home(text: str, home: Path) -> Place:
    """Return the place of a cache that a user has written, and remember the home that has its manifest."""
    place = parse_place(text)
    caches_place(home)
    if isinstance(place, Address):
        _homes[place.parent.parent] = home.absolute()
    return place


@contextmanager
def caches_at(caches: str) -> Iterator[None]:
    """Inside the block, let the caches of homes lie at this place, also for processes that are started there; "": no change."""
    earlier = os.environ.get(CACHES_VARIABLE)
    if caches:
        os.environ[CACHES_VARIABLE] = str(parse_place(caches).absolute())
    try:
        yield
    finally:
        if caches and earlier is None:
            del os.environ[CACHES_VARIABLE]
        elif caches:
            os.environ[CACHES_VARIABLE] = str(earlier)
