"""The media files behind the rows of a shard: the digests of their contents in its commit record, and which have changed."""

from __future__ import annotations

import base64
import hashlib
import os
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from pipeline.cache import layout
from pipeline.cache.layout import Commit, Failure
from pipeline.cache.samples import cache_home
from pipeline.data.manifest import Manifest
from pipeline.data.media_digests import NO_DIGEST, media_digests
from pipeline.data.remote_tars import stamps_of
from pipeline.data.tar_members import file_on_disk
from pipeline.runtime.places import Place, is_address
from pipeline.runtime.stores import file_stamp
from pipeline.types import Sample

MAX_NAMED_FILES = 10


@dataclass(frozen=True)
class ShardMedia:
    """The media files of a shard. Rows that failed have none: no features were made of their files."""

    cache: Place
    root: str  # absolute, or an address
    samples: Sequence[Sample]  # of the rows
    failed: Collection[int]  # positions in `samples`
    prepare_command: str  # that reads the media anew

    @staticmethod
    def of_rows(
        cache: Place, manifest: Manifest, samples: Sequence[Sample], start: int, failures: Sequence[Failure]
    ) -> ShardMedia:
        """Return the media of the rows that begin with row `start`, whose samples these are."""
        root = os.path.abspath(manifest.media_root) if isinstance(manifest.media_root, Path) else str(manifest.media_root)
        return ShardMedia(cache, root, samples, {failure.row - start for failure in failures}, manifest.prepare_command)

    @property
    def files(self) -> list[str]:
        """The absolute path of each row's file; "" of a row that failed."""
        return [
            "" if position in self.failed else os.path.join(self.root, sample.media)
            for position, sample in enumerate(self.samples)
        ]

    def digests(self) -> str:
        """Return the digest of each row's file as a commit record has them, see `Commit.media_digests`."""
        return base64.b64encode(b"".join(media_digests(self.files, cache_home(self.cache)))).decode()

    def stamp(self) -> str:
        """Return the SHA-256 of the sizes and times of all files: another one when a file was changed or replaced."""
        total = hashlib.sha256()
        files = [file_on_disk(os.path.join(self.root, sample.media)) for sample in self.samples]
        for stamp in stamps_of(dict.fromkeys(files)).values() if is_address(self.root) else map(_stamp, files):
            total.update(f"{stamp}\n".encode())
        return total.hexdigest()

    def problem(self, commit: Commit) -> str:
        """Return one line with its remedy when files are not those that the shard was made of, else "".

        Files that are gone are no problem. Records of older versions have one digest of all sizes: it can be compared only
        while all files are there.
        """
        if commit.media_sizes:
            is_changed = self._sizes() not in ("", commit.media_sizes)
            what = f"some of samples {self.samples[0].id!r} to {self.samples[-1].id!r} have another size"
        else:
            changed = self._changed(commit.media_digests)
            more = f" and {len(changed) - MAX_NAMED_FILES} more" if len(changed) > MAX_NAMED_FILES else ""
            is_changed, what = bool(changed), f"{', '.join(changed[:MAX_NAMED_FILES])}{more}"
        if not is_changed:
            return ""
        if is_address(self.root):  # whose tar files have other stamps then, so that they are not read before
            remedy = f"run: {self.prepare_command}; features of the new ones are another cache"
        else:
            remedy = f"remove the cache (diffalign cache rm {self.cache}) and extract it anew"
        return f"media files have changed since {self.cache} was made of them: {what}; bring the earlier ones back, or {remedy}"

    def renew(self, commit: Commit) -> None:
        """Give the record of an older version, whose sizes fit, the digests of the files."""
        if commit.media_sizes and self._sizes():
            layout.write_commit(self.cache, replace(commit, media_sizes="", media_digests=self.digests()))

    def _changed(self, recorded: str) -> list[str]:
        """Return the names of the files that have other contents than recorded; of each name one."""
        if not recorded or recorded == (current := self.digests()):
            return []
        pairs = zip(self.samples, _split(recorded), _split(current), strict=True)
        return list(
            dict.fromkeys(sample.media.as_posix() for sample, old, new in pairs if old != new and NO_DIGEST not in (old, new))
        )

    def _sizes(self) -> str:
        """Return the SHA-256 of the files' sizes; "" when one is missing."""
        total = hashlib.sha256()
        for file in filter(None, self.files):
            try:
                total.update(b"%d\n" % os.stat(file).st_size)
            except OSError:
                return ""
        return total.hexdigest()


def _stamp(file: str) -> str:
    try:
        return file_stamp(os.stat(file))
    except (OSError, ValueError):
        return ""


def _split(digests: str) -> list[bytes]:
    joined, size = base64.b64decode(digests), len(NO_DIGEST)
    return [joined[start : start + size] for start in range(0, len(joined), size)]
