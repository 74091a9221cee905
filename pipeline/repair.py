"""Mend a cache from what it says about itself: what is damaged or missing is extracted again, and nothing else is touched."""

from __future__ import annotations

from pathlib import Path

from pipeline import manifest as manifests
from pipeline.cache import verify
from pipeline.cache.reader import differences, read_group
from pipeline.cache.writer import LEFTOVERS, remove_leftovers
from pipeline.extract import Effort, carry_out, plan
from pipeline.runs import fingerprint, lock


def repair(path: Path, effort: Effort) -> list[str]:
    """What was wrong with a cache, one line each, all of it mended; empty when there was nothing.

    `ValueError` when the manifest, the weights or the libraries are not those that made it, so that it cannot be mended.
    """
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
    home = path.absolute().parents[2]
    manifest = manifests.read(home, identity["dataset"])
    name = identity["encoder"]["name"]
    effort = Effort(**{**vars(effort), "shard_rows": provenance["shard_rows"]})
    compiled = identity.get("compiled", False)
    task = plan(manifest, name, provenance["settings"], home, identity["store_dtype"], compiled, effort)
    for field, wanted, found in differences(identity, task.identity):
        raise ValueError(
            f"{path} was made with {field} = {wanted!r}, which is {found!r} now: it cannot be mended; "
            f"bring that back, or make another cache: {provenance['command']}"
        )
    assert fingerprint(task.identity) == fingerprint(identity)
    carry_out(task)
    return problems
