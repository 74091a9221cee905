"""Find media of val and test that have the same bytes as media of train."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath

import numpy as np

from pipeline.data.manifest import Manifest
from pipeline.data.media_digests import media_digests
from pipeline.data.readers import media_file
from pipeline.data.tar_members import find_member, local_file
from pipeline.runtime.files import file_sha256
from pipeline.runtime.places import Address, Place
from pipeline.types import SPLITS

MAX_COMPARED_BYTES = 2**30  # of media files that may be copies of each other; more take too long to read


def warn_about_copies(manifest: Manifest, home: Path) -> list[str]:
    """Return a warning if a media file of val or test has the same bytes as one of train.

    Only files of equal size are read, and none if they are more than `MAX_COMPARED_BYTES` together.
    """
    sizes = np.fromiter(_media_sizes(manifest), np.int64, len(manifest.samples))
    is_train = manifest.columns.split_codes == SPLITS.index("train")
    shared = np.intersect1d(sizes[is_train], sizes[~is_train])
    positions = np.flatnonzero(np.isin(sizes, shared))
    if sizes[positions].sum() > MAX_COMPARED_BYTES:
        return []
    media = manifest.columns.strings("media").take(positions)
    digests = _media_digests(manifest, home, dict(zip(media, positions.tolist(), strict=True)))
    pairs = list(zip(positions.tolist(), media, strict=True))
    originals = {digests[name]: position for position, name in pairs if is_train[position]}
    copies = [
        (position, originals[digests[name]])
        for position, name in pairs
        if not is_train[position] and digests[name] in originals
    ]
    if not copies:
        return []
    first, original = (manifest.samples[position] for position in copies[0])
    return [
        f"{len(copies)} media files of val and test have the same bytes as one of train, the first: {first.id!r} of "
        f"{first.split} and {original.id!r}; leave them out, or put them in one group"
    ]


def _media_digests(manifest: Manifest, home: Path, positions: Mapping[str, int]) -> dict[str, str]:
    """Return a digest of the content of media, by their paths, of which the positions of samples are given."""
    if isinstance(manifest.media_root, Address):
        found = media_digests([str(manifest.media_root / name) for name in positions], home)
        return {name: digest.hex() for name, digest in zip(positions, found, strict=True)}
    digests = {}
    for name, position in positions.items():
        with local_file(manifest.media_path(manifest.samples[position])) as file:
            digests[name] = file_sha256(file)
    return digests


def _media_sizes(manifest: Manifest) -> Iterator[int]:
    """Yield the size of each sample's file; several samples of one file often stand together."""
    size, last = 0, ""
    for media in manifest.columns.strings("media"):
        if media != last:
            path, last = str(_media_place(manifest.media_root, media)), media
            member = find_member(path)
            size = member.size if member else os.stat(path).st_size
        yield size


def _media_place(root: Place, media: str) -> Place:
    return media_file(root, PurePosixPath(media)) if isinstance(root, Path) else root / media
