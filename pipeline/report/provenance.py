"""Say where the numbers of a report come from: test split reads, data and licence, caches, versions, settings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pipeline.data.manifest import Manifest, split_counts
from pipeline.report.blocks import Block, CollapsibleSection, Heading, Paragraph, Table
from pipeline.report.results import DatasetResults, plural
from pipeline.runtime.files import canonical_json
from pipeline.runtime.settings import flatten

MAX_VALUE_CHARS = 400  # longer values are cut


def split_read_blocks(results: DatasetResults) -> list[Block]:
    """Return how often, and when, the runs have read the test split."""
    rows = []
    num_reads = 0
    for head in results.heads:
        reads = [json.loads(line) for run in head.runs for line in _read_lines(run.path / "test_reads.jsonl")]
        num_reads += len(reads)
        for evaluation_name in sorted({read["evaluation"] for read in reads}):
            times = sorted(read["time"] for read in reads if read["evaluation"] == evaluation_name)
            rows.append((head.label, evaluation_name, str(len(times)), times[0], times[-1]))
    if not num_reads:
        return [Paragraph("These runs have never read the test split.")]
    columns = ("method", "evaluation", "reads", "first", "last")
    caption = "One read is one seed evaluated once; a finished evaluation is not repeated."
    table = Table(columns, tuple(rows), caption, num_text_columns=2)
    return [CollapsibleSection(f"The test split was read {plural(num_reads, 'time')}", (table,))]


def _read_lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.is_file() else []


def provenance_blocks(results: DatasetResults, manifest: Manifest) -> list[Block]:
    """Return the section about data, caches, versions and settings."""
    meta = {key: _format_value(value) for key, value in sorted(manifest.meta.items())}
    counts = ", ".join(f"{count} {split}" for split, count in split_counts(manifest).items())
    data = {"dataset": manifest.dataset, "classes": str(len(manifest.class_names)), "samples": counts}
    rows = tuple({**data, **meta, "manifest": manifest.fingerprint()}.items())
    blocks: list[Block] = [
        Heading("Provenance"),
        Table(("field", "value"), rows, "Licence and attribution as in the manifest.", num_text_columns=2),
    ]
    return [*blocks, _package_versions(results), *_cache_sections(results), *_settings_sections(results)]


def _package_versions(results: DatasetResults) -> Block:
    versions_by_library: dict[str, set[str]] = {}
    sources = [record["versions"] for row in results.rows for record in row.records]
    for versions in [*sources, *(cache["provenance"].get("versions", {}) for cache in results.caches)]:
        for library, version in versions.items():
            versions_by_library.setdefault(str(library), set()).add(str(version))
    shown = ", ".join(
        f"{library} {' and '.join(sorted(versions))}" for library, versions in sorted(versions_by_library.items())
    )
    return Paragraph(f"Versions: {shown}." if shown else "Versions: none recorded.")


def _cache_sections(results: DatasetResults) -> list[Block]:
    """One collapsible table per cache that a run reads, and a sentence for each such cache that is gone."""
    used = {digest for head in results.heads for digest in head.config.caches.values()}
    blocks: list[Block] = []
    for cache in (cache for cache in results.caches if cache["fingerprint"] in used):
        keys = ("samples", "rows", "feature_shape", "store_dtype", "failed", "fingerprint", "identity")
        rows = tuple((key, _format_value(cache[key])) for key in keys)
        table = Table(("field", "value"), rows, "", num_text_columns=2)
        blocks.append(CollapsibleSection(f"Features: {Path(cache['path']).name}", (table,)))
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
        table = Table(("field", "value"), tuple(rows), "", num_text_columns=2)
        blocks.append(CollapsibleSection(f"Settings: {head.label}", (table,)))
    return blocks


def _format_value(value: Any) -> str:
    text = value if isinstance(value, str) else canonical_json(value)
    return text if len(text) <= MAX_VALUE_CHARS else f"{text[:MAX_VALUE_CHARS]}…"
