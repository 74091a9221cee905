"""Say where the numbers of a report come from: test split reads, data and licence, caches, versions, settings."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from pipeline.data.manifest import Manifest, split_counts
from pipeline.report.blocks import Block, CollapsibleSection, Heading, Paragraph, Table
from pipeline.report.results import DatasetResults, plural
from pipeline.runtime.files import canonical_json, read_lines
from pipeline.runtime.runs import TEST_READS
from pipeline.runtime.settings import flatten

MAX_VALUE_CHARS = 400  # longer values are cut


def split_read_blocks(results: DatasetResults) -> list[Block]:
    """Return how often, and when, the runs have read the test split; removed runs count."""
    reads: dict[tuple[str, str], list[str]] = {}  # label of the head, evaluation -> times
    labels = {head.runs[0].path.parent.name: head.label for head in results.heads}
    for head in results.heads:
        for line in (line for run in head.runs for line in read_lines(run.path / TEST_READS)):
            read = json.loads(line)
            reads.setdefault((head.label, read["evaluation"]), []).append(read["time"])
    for read in results.removed_test_reads:
        name = read["run"].partition("/")[0]
        reads.setdefault((labels.get(name, f"{name} (removed)"), read["evaluation"]), []).append(read["time"])
    if not reads:
        return [Paragraph("These runs have never read the test split.")]
    num_reads = sum(map(len, reads.values()))
    rows = [(*key, str(len(times)), min(times), max(times)) for key, times in reads.items()]
    columns = ("method", "evaluation", "reads", "first", "last")
    caption = "One read is one seed evaluated once; a finished evaluation is not repeated."
    caption += (
        f" Of these, {plural(len(results.removed_test_reads), 'read')} are by runs that have been removed since."
        if results.removed_test_reads
        else ""
    )
    table = Table(columns, tuple(rows), caption, num_text_columns=2, key="reads of test")
    return [CollapsibleSection(f"The test split was read {plural(num_reads, 'time')}", (table,))]


def provenance_blocks(results: DatasetResults, manifest: Manifest) -> list[Block]:
    """Return the section about data, caches, versions and settings."""
    counts = ", ".join(f"{count} {split}" for split, count in split_counts(manifest).items())
    data = {"dataset": manifest.dataset, "classes": str(len(manifest.class_names)), "samples": counts}
    rows = {**data, **_flat_values(dict(sorted(manifest.meta.items()))), "manifest": manifest.fingerprint()}
    caption = "Licence and attribution as in the manifest."
    return [
        Heading("Provenance"),
        _fields(rows, caption),
        *_versions(results),
        *_cache_sections(results),
        *_settings_sections(results),
    ]


def _fields(rows: Mapping[str, str], caption: str = "") -> Table:
    return Table(("field", "value"), tuple(rows.items()), caption, num_text_columns=2)


def _flat_values(values: Mapping[str, Any], name: str = "") -> dict[str, str]:
    """Return nested facts as one line each: the names of what they are inside of, and the value as text."""
    rows = {}
    for key, value in values.items():
        own = f"{name} · {key}" if name else str(key)
        rows |= _flat_values(value, own) if isinstance(value, Mapping) and value else {own: _format_value(value)}
    return rows


def _versions(results: DatasetResults) -> list[Block]:
    found: dict[str, set[str]] = {}
    sources = [record["versions"] for row in results.rows for record in row.records]
    for versions in [*sources, *(cache["provenance"].get("versions", {}) for cache in results.caches)]:
        for library, version in versions.items():
            found.setdefault(str(library), set()).add(str(version))
    if not found:
        return [Paragraph("Versions: none recorded.")]
    rows = {library: " and ".join(sorted(versions)) for library, versions in sorted(found.items())}
    table = Table(("library", "version"), tuple(rows.items()), "Of all extractions and evaluations.", 2, key="versions")
    return [CollapsibleSection(f"Versions: {', '.join(map(' '.join, rows.items()))}", (table,))]


def _cache_sections(results: DatasetResults) -> list[Block]:
    """One collapsible table per cache that a run reads, and a sentence for each such cache that is gone."""
    used = {digest for head in results.heads for digest in head.config.caches.values()}
    blocks: list[Block] = []
    for cache in (cache for cache in results.caches if cache["fingerprint"] in used):
        keys = ("samples", "rows", "feature_shape", "store_dtype", "failed", "fingerprint", "identity")
        name = Path(cache["path"]).name
        table = replace(_fields(_flat_values({key: cache[key] for key in keys})), key=f"features {name}")
        blocks.append(CollapsibleSection(f"Features: {name}", (table,)))
    gone = sorted(used - {cache["fingerprint"] for cache in results.caches})
    return [*blocks, *(Paragraph(f"The feature cache {digest} is not in this home any more.") for digest in gone)]


def _settings_sections(results: DatasetResults) -> list[Block]:
    """One collapsible table per configuration."""
    blocks: list[Block] = []
    for head in results.heads:
        config = head.config
        rows = [("method", config.method), ("config", config.fingerprint()), ("runs", head.runs[0].path.parent.name)]
        rows.append(("seeds", ", ".join(str(run.seed) for run in head.runs)))
        rows.append(("validation metric", f"{head.val_metric:.2f}"))
        rows += [(key, _format_value(value)) for key, value in sorted(flatten(config.settings).items())]
        rows += [(f"training {key}", _format_value(value)) for key, value in sorted(config.training.items())]
        rows += [(f"{key} features", digest) for key, digest in sorted(config.caches.items())]
        table = Table(("field", "value"), tuple(rows), "", 2, key=f"settings {head.runs[0].path.parent.name}")
        blocks.append(CollapsibleSection(f"Settings: {head.label}", (table,)))
    return blocks


def _format_value(value: Any) -> str:
    text = value if isinstance(value, str) else canonical_json(value)
    return text if len(text) <= MAX_VALUE_CHARS else f"{text[:MAX_VALUE_CHARS]}…"
