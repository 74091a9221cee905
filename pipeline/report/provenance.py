"""Where the numbers come from: reads of the test split, data and licence, feature caches, versions, settings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pipeline.data.manifest import Manifest, split_counts
from pipeline.report.blocks import Block, Folded, Grid, Heading, Text
from pipeline.report.results import Results, plural
from pipeline.runtime.files import canonical_json

LONGEST = 400  # characters of a value that are shown


def test_reads(results: Results) -> list[Block]:
    """How often the runs have read the test split."""
    rows = []
    total = 0
    for head in results.heads:
        lines = [json.loads(line) for run in head.runs for line in _log(run.path / "test_reads.jsonl")]
        total += len(lines)
        for name in sorted({line["evaluation"] for line in lines}):
            times = sorted(line["time"] for line in lines if line["evaluation"] == name)
            rows.append((head.label, name, str(len(times)), times[0], times[-1]))
    if not total:
        return [Text("These runs have never read the test split.")]
    columns = ("method", "evaluation", "reads", "first", "last")
    grid = Grid(columns, tuple(rows), "One read is one seed evaluated once; a finished evaluation is not repeated.", words=2)
    return [Folded(f"The test split was read {plural(total, 'time')}", (grid,))]


def _log(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.is_file() else []


def provenance(results: Results, manifest: Manifest) -> list[Block]:
    """Data, caches, versions and settings."""
    facts = {key: _show(value) for key, value in sorted(manifest.meta.items())}
    counts = ", ".join(f"{count} {split}" for split, count in split_counts(manifest).items())
    data = {"dataset": manifest.dataset, "classes": str(len(manifest.class_names)), "samples": counts}
    rows = tuple({**data, **facts, "manifest": manifest.fingerprint()}.items())
    blocks: list[Block] = [
        Heading("Provenance"),
        Grid(("field", "value"), rows, "Licence and attribution as in the manifest.", words=2),
    ]
    return [*blocks, _versions(results), *_caches(results), *_settings(results)]


def _versions(results: Results) -> Block:
    found: dict[str, set[str]] = {}
    sources = [record["versions"] for row in results.rows for record in row.records]
    for versions in [*sources, *(cache["provenance"].get("versions", {}) for cache in results.caches)]:
        for library, version in versions.items():
            found.setdefault(str(library), set()).add(str(version))
    shown = ", ".join(f"{library} {' and '.join(sorted(versions))}" for library, versions in sorted(found.items()))
    return Text(f"Versions: {shown}." if shown else "Versions: none recorded.")


def _caches(results: Results) -> list[Block]:
    """One folded table per cache that a run reads."""
    used = {digest for head in results.heads for digest in head.config.caches.values()}
    blocks: list[Block] = []
    for cache in (cache for cache in results.caches if cache["fingerprint"] in used):
        keys = ("samples", "rows", "feature_shape", "store_dtype", "failed", "fingerprint", "identity")
        rows = tuple((key, _show(cache[key])) for key in keys)
        blocks.append(Folded(f"Features: {Path(cache['path']).name}", (Grid(("field", "value"), rows, "", words=2),)))
    gone = sorted(used - {cache["fingerprint"] for cache in results.caches})
    return [*blocks, *(Text(f"The feature cache {digest} is not in this home any more.") for digest in gone)]


def _settings(results: Results) -> list[Block]:
    """One folded table per configuration."""
    blocks: list[Block] = []
    for head in results.heads:
        config = head.config
        rows = [("method", config.method), ("config", config.fingerprint()), ("runs", head.runs[0].path.parent.name)]
        rows.append(("seeds", ", ".join(str(run.seed) for run in head.runs)))
        rows.append(("validation metric", f"{head.score:.2f}"))
        rows += [(key, _show(value)) for key, value in sorted(config.settings.items())]
        rows += [(f"training {key}", _show(value)) for key, value in sorted(config.training.items())]
        rows += [(f"{key} features", digest) for key, digest in sorted(config.caches.items())]
        blocks.append(Folded(f"Settings: {head.label}", (Grid(("field", "value"), tuple(rows), "", words=2),)))
    return blocks


def _show(value: Any) -> str:
    text = value if isinstance(value, str) else canonical_json(value)
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}…"
