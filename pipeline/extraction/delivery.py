"""Give workers that share no disk with the client what they need: the manifest of a dataset and files of the encoder.

They lie beside the caches in the object store, under the digest of their contents, so that a worker gets what the client has or
nothing:

    <caches>/files/<sha256>             one file
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from pipeline.data.manifest_files import manifest_path
from pipeline.encoders._factory import local_files, with_absolute_paths
from pipeline.runtime.errors import UserError
from pipeline.runtime.files import file_sha256
from pipeline.runtime.places import Address
from pipeline.runtime.stores import exists, fetch_file, send_file

MANIFEST_FILES = ("parquet", "meta.json", "location.json")


@dataclass(frozen=True)
class Delivery:
    """Files in an object store: those of a manifest, and those that settings of an encoder name."""

    caches: Address
    manifest: tuple[tuple[str, str], ...]  # name in <home>/manifests -> SHA-256
    encoder: tuple[tuple[str, str, str], ...]  # (path on the client, path below it or "", SHA-256)

    @staticmethod
    def send(caches: Address, home: Path, dataset: str, settings: Mapping[str, Any]) -> Delivery:
        """Put what is not there yet into the store."""
        tables = [manifest_path(home, dataset, suffix) for suffix in MANIFEST_FILES]
        roots = local_files(with_absolute_paths(settings))
        files = [(root, file) for root in roots for file in ([root] if root.is_file() else sorted(root.rglob("*")))]
        files = [(root, file) for root, file in files if file.is_file()]
        digests = {file: file_sha256(file) for file in [*tables, *(file for _, file in files)]}

        for file, digest in digests.items():
            if not exists(caches / "files" / digest):
                send_file(file, caches / "files" / digest)
        return Delivery(
            caches,
            tuple((file.name, digests[file]) for file in tables),
            tuple((str(root), "" if file == root else str(file.relative_to(root)), digests[file]) for root, file in files),
        )

    def receive(self) -> tuple[Path, dict[str, str]]:
        """Fetch the files into a folder of this process, which is removed when it ends.

        Returns:
            A home with the manifest, and for each path on the client its path here.

        Raises:
            UserError: a file in the store is damaged.
        """
        folder = Path(_folder().name)
        for name, digest in self.manifest:
            self._fetch(digest, folder / "home" / "manifests" / name)
        paths = {}
        for root, below, digest in self.encoder:
            here = folder / "encoder" / str(len(set(paths) - {root})) / Path(root).name
            paths.setdefault(root, str(here))
            self._fetch(digest, Path(paths[root]) / below)
        return folder / "home", paths

    def _fetch(self, digest: str, file: Path) -> None:
        if file.is_file() and file_sha256(file) == digest:
            return
        place = self.caches / "files" / digest
        fetch_file(place, file)
        if file_sha256(file) != digest:
            raise UserError(f"{place} is damaged (its sha256 does not fit); remove it, and run the same command again")


def replace_paths(value: Any, paths: Mapping[str, str]) -> Any:
    """Return JSON values in whose texts some paths stand in place of others, also before a slash, or as a word of a command."""
    if not paths:
        return value
    names = "|".join(map(re.escape, sorted(paths, key=len, reverse=True)))
    pattern = re.compile(rf"(?<![\w.-])(?:{names})(?![\w.-])")  # no part of a longer name

    def replace(value: Any) -> Any:
        if isinstance(value, str):
            return pattern.sub(lambda found: paths[found[0]], value)
        if isinstance(value, Mapping):
            return {replace(key): replace(item) for key, item in value.items()}
        return [replace(item) for item in value] if isinstance(value, list | tuple) else value

    return replace(value)


@cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    """The folder of this process."""
    return tempfile.TemporaryDirectory(prefix="diffalign-")
