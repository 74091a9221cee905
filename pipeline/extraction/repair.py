"""Mend a cache from what it says about itself: what is damaged or missing is extracted again, and nothing else is touched."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.cache import verify
from pipeline.cache.reader import identity_differences, known_failures, read_group
from pipeline.cache.samples import home_of
from pipeline.cache.writer import LEFTOVERS, remove_leftovers
from pipeline.data import manifest as manifests
from pipeline.extraction.extract import NO_FAILURES, ExtractOptions, Task, carry_out, plan_extraction
from pipeline.runtime.files import fingerprint, lock


def repair(path: Path, effort: ExtractOptions) -> list[str]:
    """What was wrong with a cache, one line each, all of it mended; empty when there was nothing.

    What is left to do is done as the cache was begun, in its batches; of the effort's `max_failures` only items that have
    not failed before take their share. `ValueError` when it cannot be mended: its place is not where its identity belongs, the
    manifest, the weights or the media are not those that made it, or a library is of another release (as in `extract`); and
    when something is wrong with it afterwards.
    """
    path = Path(os.path.abspath(path))
    problems = verify(path)
    if not problems:
        if any(path.rglob(LEFTOVERS)):  # of a writer that was killed when nothing else was left to do
            with lock(path):
                remove_leftovers(path)
        return []
    group = read_group(path)
    identity, provenance = group["identity"], group["provenance"]
    if not {"settings", "shard_rows"} <= provenance.keys():
        raise ValueError(
            f"{path} was not extracted here: {'; '.join(problems)}; to make it again, run: {provenance['command']}"
        )
    try:
        task = _task(path, identity, provenance, effort)
    except ValueError as error:
        raise ValueError(f"{path} cannot be mended: {error}; to make it again, run: {provenance['command']}") from error
    accepted = (path / "commits" / "failures.json").is_file()  # else its failures were never found to be few enough
    carry_out(task, known_failures(path) if accepted else NO_FAILURES)
    if left := verify(path):
        raise ValueError(f"{path} was extracted again, and still: {'; '.join(left)}; is the disk sound?")
    return problems


def _task(path: Path, identity: Mapping[str, Any], provenance: Mapping[str, Any], effort: ExtractOptions) -> Task:
    """What made the cache, as it was made; `ValueError` when that would fill another one."""
    home = home_of(path)
    settings, compiled = provenance["settings"], identity.get("compiled", False)
    begun = {"shard_rows": provenance["shard_rows"], "batch_size": provenance.get("batch_size", 0)}
    effort = ExtractOptions(**{**vars(effort), **begun})
    manifest = manifests.read_manifest(home, identity["dataset"])
    task = plan_extraction(manifest, identity["encoder"]["name"], settings, home, identity["store_dtype"], compiled, effort)
    target = task.target
    for field, wanted, found in identity_differences(identity, target.identity):
        raise ValueError(f"it was made with {field} = {wanted!r}, which is {found!r} now; bring that back")
    if fingerprint(target.identity) != fingerprint(identity):
        added = ", ".join(field for field, *_ in identity_differences(target.identity, identity))
        raise ValueError(f"its identity would have {added} now, which it was made without")
    if not target.path.exists() or not path.samefile(target.path):
        raise ValueError(f"a cache of its identity belongs to {target.path}; move it there")
    return task
