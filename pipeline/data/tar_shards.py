"""The tar files below a folder, or below an address of an object store, that a pattern names."""

from __future__ import annotations

import errno
import fnmatch
import glob
import itertools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, cast

from pipeline.data.remote_tars import ObjectFile, explain_changes
from pipeline.runtime.errors import UserError
from pipeline.runtime.places import Address, Place
from pipeline.runtime.stores import REQUESTS_IN_FLIGHT, StoredObject, find_object, map_objects, objects_in, store_of

_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d{1,9})\.\.(\d{1,9})")
_SPECIAL = re.compile(r"[*?\[]")
_MAX_SHARDS = 1_000_000


@dataclass(frozen=True)
class TarShards:
    """The tar files, by their names below the root: of a range all, in its order; of a pattern those that are there."""

    root: Place
    names: Sequence[str]
    objects: Mapping[str, StoredObject] = field(default_factory=dict)  # of an object store, by name

    @staticmethod
    def find(root: Place, pattern: str) -> TarShards:
        """Return the shards that a pattern (**, *, ?), a range {000000..000009} or both name.

        Raises:
            UserError: there is none, or some of a range are missing.
        """
        wanted = dict.fromkeys(PurePosixPath(name).as_posix() for name in _expand_braces(pattern))
        if any(name.startswith("/") or name == "." or ".." in name.split("/") for name in wanted):
            raise UserError(
                f"shards is {pattern!r}; it names tar files below --root, such as shards/train-{{000000..000009}}.tar"
            )
        objects = _find_objects(root, wanted) if isinstance(root, Address) else {}
        names: dict[str, None] = {}
        missing: list[str] = []
        for name in wanted:
            found = _expand_pattern(root, name, objects) if glob.has_magic(name) else [name]
            missing += [
                each for each in found if each not in objects and not (isinstance(root, Path) and (root / each).is_file())
            ]
            names |= dict.fromkeys(found)
        if missing or not names:
            count = f"{len(missing)} of {len(names)} shards are missing, the first: {missing[0]}; bring" if missing else ""
            what = f"{count or 'there is no shard; put'} them there"
            raise UserError(f"{root}: {what}, or say with --set shards which tar files are meant, now {pattern!r}")
        odd = next((name for name in names if isinstance(root, Address) and set(name) & set("@?#")), "")
        if odd:
            raise UserError(f"{root / odd} has @, ? or # in its name, which an address must not have: rename the object")
        other = next((name for name in names if not name.endswith(".tar")), "")
        if other:
            raise UserError(
                f"{root / other} does not end with .tar: plain tar files are read; unpack a compressed one with gunzip"
            )
        return TarShards(root, list(names), {name: objects[name] for name in names if name in objects})

    @property
    def stamps(self) -> dict[str, str]:
        """The stamps of the tar files in an object store."""
        return {name: found.stamp for name, found in self.objects.items()}

    @contextmanager
    def open(self, name: str) -> Iterator[BinaryIO]:
        """Open a shard for reading; one in an object store is read ahead.

        Raises:
            UserError: it was changed since it was found, or is gone.
        """
        if isinstance(self.root, Path):
            with (self.root / name).open("rb") as file:
                yield file
            return
        place, found = self.root / name, self.objects[name]
        with (
            ThreadPoolExecutor(REQUESTS_IN_FLIGHT) as threads,
            explain_changes(place, "run the same command again"),
            closing(ObjectFile(place, found.num_bytes, found.stamp, threads)) as file,
        ):
            yield cast(BinaryIO, file)


def _find_objects(root: Address, wanted: Iterable[str]) -> dict[str, StoredObject]:
    """Return the objects that names and patterns may mean, by their names below the root; no more is listed than patterns need.

    Raises:
        UserError: an object that would be listed has a name that no address can have.
    """
    patterns = dict.fromkeys(name for name in wanted if glob.has_magic(name))
    names = dict.fromkeys(name for name in wanted if name not in patterns)
    found: list[Any] = list(filter(None, map_objects(root, find_object, [root / name for name in names])))
    if names and not found:  # an answer to HEAD says nothing of a bucket that is not there
        objects_in(root / next(iter(names)))
    for folder, has_folders in {_fixed_folder(pattern) for pattern in patterns}:
        place = root / folder
        try:
            found += store_of(place).list(place) if has_folders else objects_in(place)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            remedy = "or say in shards which tar files are meant, such as train-{000000..000009}.tar"
            raise UserError(f"{error.filename}: {error.strerror}, {remedy}") from error
    return {each.place.relative_to(root).as_posix(): each for each in found}


def _fixed_folder(pattern: str) -> tuple[str, bool]:
    """Return the folder that a pattern begins with, and whether what it means may lie in folders of that."""
    folder = _SPECIAL.split(pattern)[0].rpartition("/")[0]
    rest = pattern[len(folder) :].strip("/")
    return folder, "/" in rest or rest == "**"


def _expand_pattern(root: Place, pattern: str, names: Iterable[str]) -> list[str]:
    """Return the files of a folder, or the names of objects, that fit a pattern, sorted."""
    if isinstance(root, Path):
        return sorted(name for name in glob.glob(pattern, root_dir=root, recursive=True) if not (root / name).is_dir())
    return sorted(name for name in names if _fits(name.split("/"), pattern.split("/")))


def _fits(name: Sequence[str], pattern: Sequence[str]) -> bool:
    """Whether the parts of a path fit those of a pattern as in `glob.glob`: ** stands for folders, * for no hidden file."""
    if not pattern or (not name and pattern[0] != "**"):
        return not name and not pattern
    if pattern[0] == "**" and _fits(name, pattern[1:]):
        return True
    is_fitting = bool(name) and fnmatch.fnmatchcase(name[0], pattern[0]) and (name[0][:1] != "." or pattern[0][:1] == ".")
    return is_fitting and _fits(name[1:], pattern if pattern[0] == "**" else pattern[1:])


def _expand_braces(pattern: str) -> Iterator[str]:
    """Yield the names that a pattern with {a..b} and {a,b} stands for."""
    parts = _BRACES.split(pattern)
    choices = [_choices(part) if number % 2 else [part] for number, part in enumerate(parts)]
    for number, chosen in enumerate(itertools.product(*choices)):
        if number >= _MAX_SHARDS:
            raise UserError(f"shards is {pattern!r}, which are more than {_MAX_SHARDS} tar files")
        yield "".join(chosen)


def _choices(inside: str) -> Sequence[str]:
    match = _RANGE.fullmatch(inside)
    if not match:
        return inside.split(",")
    first, last = int(match[1]), int(match[2])
    if not 0 <= last - first < _MAX_SHARDS:
        raise UserError(f"the range {{{inside}}} in shards is empty, or has more than {_MAX_SHARDS} numbers")
    return [str(number).zfill(len(match[1])) for number in range(first, last + 1)]
