"""Repair a feature cache: extract again what is damaged or missing, and leave everything else untouched."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.cache import verify
from pipeline.cache.reader import identity_differences, read_failed_ids, read_zarr_attributes
from pipeline.cache.samples import cache_home
from pipeline.cache.writer import TEMPORARY_FILE_PATTERN, remove_temporary_files
from pipeline.data.manifest_files import read_manifest
from pipeline.extraction.extract import NO_SAMPLE_IDS, ExtractionTask, ExtractOptions, plan_extraction, run_extraction
from pipeline.runtime.claims import hold
from pipeline.runtime.errors import UserError
from pipeline.runtime.files import fingerprint
from pipeline.runtime.places import Address, Place, caches_at
from pipeline.runtime.stores import exists


def repair(path: Place, options: ExtractOptions) -> list[str]:
    """Repair a cache from its own identity and provenance, and return what was wrong with it.

    Missing shards are encoded in the batches that the cache was begun with.

    Args:
        path: the place of the cache.
        options: how the extraction runs. Items that have failed before do not count against its `max_failures`.

    Returns:
        One line per problem that was repaired; empty when there was none.

    Raises:
        UserError: the cache cannot be repaired: it is not in the folder of its identity, the manifest, the weights or the
            media are not those that made it, or a library has another release (as in `extract`). Or it still has problems
            after the repair.
    """
    path = Path(os.path.abspath(path)) if isinstance(path, Path) else path
    problems = verify(path)
    if not problems:
        if isinstance(path, Path) and any(
            path.rglob(TEMPORARY_FILE_PATTERN)
        ):  # of a writer that was killed after its last shard
            with hold(path):
                remove_temporary_files(path)
        return []
    group = read_zarr_attributes(path)
    identity, provenance = group["identity"], group["provenance"]
    if not {"settings", "shard_rows"} <= provenance.keys():
        raise UserError(f"{path} was not extracted here: {'; '.join(problems)}; to make it again, run: {provenance['command']}")
    try:
        task = _plan_repair(path, identity, provenance, options)
    except UserError as error:
        raise UserError(f"{path} cannot be mended: {error}; to make it again, run: {provenance['command']}") from error
    # Without this record the cache was never finished: nobody has checked that its failures are few enough.
    was_finished = exists(path / "commits" / "failures.json")
    run_extraction(task, read_failed_ids(path) if was_finished else NO_SAMPLE_IDS)
    if remaining := verify(path):
        raise UserError(f"{path} was extracted again, and still: {'; '.join(remaining)}; is the disk sound?")
    return problems


def _plan_repair(
    path: Place, identity: Mapping[str, Any], provenance: Mapping[str, Any], options: ExtractOptions
) -> ExtractionTask:
    """Return the extraction that made the cache.

    Raises:
        UserError: that extraction would fill another cache today.
    """
    home = cache_home(path)
    settings, compiled, store_dtype = provenance["settings"], identity.get("compiled", False), identity["store_dtype"]
    recorded = {"shard_rows": provenance["shard_rows"], "batch_size": provenance.get("batch_size", 0)}
    options = ExtractOptions(**{**vars(options), **recorded})
    manifest = read_manifest(home, identity["dataset"])
    with caches_at(str(path.parent.parent) if isinstance(path, Address) else ""):
        task = plan_extraction(manifest, identity["encoder"]["name"], settings, home, store_dtype, compiled, options)
    target = task.target
    for field, wanted, found in identity_differences(identity, target.identity):
        raise UserError(f"it was made with {field} = {wanted!r}, which is {found!r} now; bring that back")
    if fingerprint(target.identity) != fingerprint(identity):
        added = ", ".join(field for field, *_ in identity_differences(target.identity, identity))
        raise UserError(f"its identity would have {added} now, which it was made without")
    if not _is_same(path, target.path):
        raise UserError(f"a cache of its identity belongs to {target.path}; move it there")
    return task


def _is_same(first: Place, second: Place) -> bool:
    """Whether two places are one folder, perhaps reached by a link, or one address."""
    if isinstance(first, Path) and isinstance(second, Path):
        return second.exists() and first.samefile(second)
    return first == second
