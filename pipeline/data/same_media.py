"""The sizes of media, and media of val and test that have the same bytes as media of train."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipeline.data.keys import contains, run_starts
from pipeline.data.manifest import Manifest
from pipeline.data.media_digests import media_digests
from pipeline.data.readers import media_sizes
from pipeline.data.tar_members import find_member, local_file
from pipeline.runtime.files import file_sha256
from pipeline.types import SPLITS

MAX_COMPARED_BYTES = 2**30  # of media files that may be copies of each other; more take too long to read


def media_sizes_of(manifest: Manifest) -> NDArray[np.int64]:
    """Return the size of the media file of each sample in bytes; -1: there is none.

    Tar files in an object store are not looked at: the paths of their members say the sizes.

    Raises:
        UserError: a symbolic link leads out of the folder of media and may not, or a file cannot be looked at.
    """
    media, root = manifest.columns.strings("media"), manifest.media_root
    starts = run_starts(media)  # several samples of one file often stand together

    def where(run: int) -> str:
        return manifest.source_location(int(starts[run]))

    if isinstance(root, Path):
        sizes = media_sizes(root, media.at(starts), where, manifest.meta.get("follows_links", False), find_member)
    else:
        members = (find_member(str(root / name)) for name in media.at(starts))
        sizes = np.fromiter((member.size if member else -1 for member in members), np.int64, len(starts))
    return np.repeat(sizes, np.diff(np.append(starts, len(media))))


def warn_about_copies(manifest: Manifest, home: Path, sizes: NDArray[np.int64]) -> list[str]:
    """Return a warning if a media file of val or test has the same bytes as one of train.

    Only files of equal size are read, and none if they are more than `MAX_COMPARED_BYTES` together.

    Args:
        manifest: the manifest.
        home: where digests of media in an object store are remembered.
        sizes: the size of the media file of each sample in bytes.
    """
    media = manifest.columns.strings("media")
    starts = run_starts(media)  # of the samples of one file, which are in one split
    counts = np.diff(np.append(starts, len(sizes)))
    sizes, is_train = sizes[starts], manifest.columns.split_codes[starts] == SPLITS.index("train")
    runs = np.flatnonzero(np.where(is_train, contains(sizes[~is_train], sizes), contains(sizes[is_train], sizes)))
    if (sizes[runs] * counts[runs]).sum() > MAX_COMPARED_BYTES:
        return []
    digests = dict(zip(runs.tolist(), _media_digests(manifest, home, starts[runs]), strict=True))
    originals = {digest: run for run, digest in digests.items() if is_train[run]}
    copies = [run for run, digest in digests.items() if not is_train[run] and digest in originals]
    if not copies:
        return []
    last = originals[digests[copies[0]]]
    first, original = (manifest.samples[int(position)] for position in (starts[copies[0]], starts[last] + counts[last] - 1))
    return [
        f"{counts[copies].sum()} media files of val and test have the same bytes as one of train, the first: {first.id!r} of "
        f"{first.split} and {original.id!r}; leave them out, or put them in one group"
    ]


def _media_digests(manifest: Manifest, home: Path, positions: NDArray[np.int64]) -> list[str]:
    """Return a digest of the content of the media of the samples at some positions."""
    if not isinstance(manifest.media_root, Path):
        names = manifest.columns.strings("media").take(positions)
        return [digest.hex() for digest in media_digests([str(manifest.media_root / name) for name in names], home)]
    digests: dict[str, str] = {}
    for position in positions.tolist():
        sample = manifest.samples[position]
        name = sample.media.as_posix()
        if name not in digests:
            with local_file(manifest.media_path(sample)) as file:
                digests[name] = file_sha256(file)
    return [digests[name] for name in manifest.columns.strings("media").take(positions)]
