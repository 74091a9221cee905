"""Find media of val and test that have the same bytes as media of train, and samples of one file with different labels."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipeline.data.columns import compute, numpy_array
from pipeline.data.keys import contains, first_positions, run_starts
from pipeline.data.manifest import Manifest
from pipeline.data.media_digests import media_digests
from pipeline.data.readers import media_sizes
from pipeline.data.sample_columns import SampleColumns, json_lists
from pipeline.data.tar_members import find_member, local_file
from pipeline.runtime.files import file_sha256
from pipeline.runtime.places import Address
from pipeline.types import SPLITS

MAX_COMPARED_BYTES = 2**30  # of media files that may be copies of each other; more take too long to read


def sample_media_sizes(manifest: Manifest) -> NDArray[np.int64]:
    """Return the size of the media file of each sample in bytes; -1: there is none.

    Raises:
        UserError: as `readers.media_sizes`.
    """
    media, root = manifest.columns.strings("media"), manifest.media_root
    starts = run_starts(media.blocks())  # several samples of one file often stand together

    def where(run: int) -> str:
        return manifest.source_location(int(starts[run]))

    files = media.at(starts)
    if isinstance(root, Path):
        sizes = media_sizes(root, files, where, manifest.meta.get("follows_links", False), find_member)
    else:  # tar files in an object store have just been read
        members = (find_member(str(root / name)) for name in files)
        sizes = np.fromiter((member.size if member else -1 for member in members), np.int64, len(files))
    return np.repeat(sizes, np.diff(np.append(starts, len(media))))


def warn_about_labels(manifest: Manifest) -> list[str]:
    """Return a warning if samples have the media file of another sample, but other labels."""
    starts = _starts_of_pairs(manifest.columns)
    pairs = manifest.columns.select(starts)
    first = first_positions(pairs.strings("media"))
    again = np.flatnonzero(first < np.arange(len(first)))
    different, start = [np.zeros(0, np.int64)], 0
    blocks = (pairs.select(positions).blocks(["labels"]) for positions in (again, first[again]))
    for block, other in zip(*blocks, strict=True):
        differs = compute.not_equal(json_lists(block.column(0)), json_lists(other.column(0)))
        different.append(start + np.flatnonzero(numpy_array(differs).astype(np.bool_)))
        start += len(block)
    found = again[np.concatenate(different)]
    if not len(found):
        return []
    num_samples = np.diff(np.append(starts, len(manifest.columns)))[found].sum()
    places = (int(starts[found[0]]), int(starts[first[found[0]]]))
    one, other = (f"{manifest.columns.ids[place]!r} ({manifest.source_location(place)})" for place in places)
    return [
        f"{num_samples} samples have the file of an earlier sample, and other labels, the first: {one} has the file of {other}"
        "; correct the labels, because a head learns both; if a file has several labels, give its rows one id and say --set "
        "labels=multi --set merge_rows=true"
    ]


def _starts_of_pairs(samples: SampleColumns) -> NDArray[np.int64]:
    """Return the positions of the samples that have another file, or other labels, than the sample before them."""
    blocks = (block.columns for block in samples.blocks(["media", "labels"]))
    return run_starts(compute.binary_join_element_wise(media, json_lists(labels), "") for media, labels in blocks)


def warn_about_copies(manifest: Manifest, home: Path, sizes: NDArray[np.int64]) -> list[str]:
    """Return a warning if a media file of val or test has the same bytes as one of train.

    Only files of equal size are read, and none if they are more than `MAX_COMPARED_BYTES` together.

    Args:
        manifest: the manifest.
        home: the folder of all artifacts.
        sizes: the size of the media file of each sample in bytes.
    """
    media = manifest.columns.strings("media")
    starts = run_starts(media.blocks())  # of the samples of one file, which are in one split
    counts = np.diff(np.append(starts, len(sizes)))
    sizes, is_train = sizes[starts], manifest.columns.split_codes[starts] == SPLITS.index("train")
    runs = np.flatnonzero(np.where(is_train, contains(sizes[~is_train], sizes), contains(sizes[is_train], sizes)))
    if (sizes[runs] * counts[runs]).sum() > MAX_COMPARED_BYTES:
        return []
    names = media.take(starts[runs])
    digest_of = _media_digests(manifest, home, dict(zip(names, starts[runs].tolist(), strict=True)))
    digests = {run: digest_of[name] for run, name in zip(runs.tolist(), names, strict=True)}
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


def _media_digests(manifest: Manifest, home: Path, positions: Mapping[str, int]) -> dict[str, str]:
    """Return a digest of the content of media, by their paths, of which the positions of samples are given."""
    if isinstance(manifest.media_root, Address):
        found = media_digests([str(manifest.media_root / name) for name in positions], home)
        return {name: digest.hex() for name, digest in zip(positions, found, strict=True)}
    digests = {}
    for name, sample in zip(positions, manifest.columns.select(list(positions.values())), strict=True):
        with local_file(manifest.media_path(sample)) as file:
            digests[name] = file_sha256(file)
    return digests
