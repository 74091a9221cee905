"""Write the report on a dataset: all its sections in order, as one HTML file and one Markdown file."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from pathlib import Path

import pandas as pd

from pipeline.data.manifest import Manifest
from pipeline.data.manifest_files import read_manifest
from pipeline.report import html, markdown
from pipeline.report.across import across_blocks
from pipeline.report.alignment import alignment_blocks
from pipeline.report.blocks import Block, Heading, Paragraph
from pipeline.report.calibration import calibration_blocks, class_table_blocks
from pipeline.report.comparison import compare_results
from pipeline.report.corruption import corruption_blocks
from pipeline.report.figure_blocks import (
    ShownHeads,
    choose_shown_heads,
    class_change_blocks,
    example_blocks,
    feature_space_blocks,
    training_curve_figure,
)
from pipeline.report.grid_page import grid_sections
from pipeline.report.page_files import write_page_files
from pipeline.report.provenance import provenance_blocks
from pipeline.report.results import DatasetResults, collect_results
from pipeline.report.results_section import results_blocks
from pipeline.report.sample_map import sample_map_blocks
from pipeline.report.sampler import sampler_curve_blocks
from pipeline.runtime.files import write_atomic
from pipeline.runtime.logs import ProgressBar

RESULTS_FILE = "results.csv"


def write_report(
    home: Path,
    dataset: str,
    split: str = "test",
    across: Sequence[str] = (),
    with_files: bool = True,
    progress: bool = False,
) -> tuple[Path, Path]:
    """Write the report on a dataset as `<home>/reports/<dataset>/index.html` and `report.md`, and return their paths.

    The HTML file needs no other file. The table of results, see `results_frame`, is in `results.csv` beside them, and every
    table and figure of the page is in a folder `files`, see `write_page_files`. The same runs give the same bytes.

    Args:
        home: The folder of all artifacts.
        dataset: The name of a dataset with runs.
        split: The split of the results.
        across: Other datasets with runs, for a section that compares the methods over all of them.
        with_files: Whether to write the folder `files`, to which the page has links then.
        progress: Whether to show what is done; a page takes a minute where there are many figures.

    Raises:
        UserError: A dataset has no runs or no manifest.
    """
    results = collect_results(home, dataset, split)
    manifest = read_manifest(home, dataset)
    shown_heads = choose_shown_heads(results, manifest)
    frame = compare_results(results)
    sections: tuple[Callable[[], Sequence[Block]], ...] = (
        lambda: results_blocks(results, frame),
        lambda: _old_manifest_warning(results, manifest),
        lambda: across_blocks(home, [dataset, *across], split),
        lambda: alignment_blocks(results.heads),
        *_figure_sections(results, manifest, shown_heads),
        lambda: sampler_curve_blocks(results),
        lambda: corruption_blocks(results),
        lambda: grid_sections(home, dataset),
        lambda: provenance_blocks(results, manifest),
    )
    bar = ProgressBar(sections, label=f"report on {dataset}", unit="section", show=progress)
    blocks = [block for section in bar for block in section()]
    folder = home / "reports" / dataset
    if with_files:
        blocks = write_page_files(folder, blocks, progress)
    title = page_title(results)
    write_atomic(folder / "index.html", html.render_html(title, blocks))
    write_atomic(folder / "report.md", markdown.render_markdown(title, blocks))
    write_atomic(folder / RESULTS_FILE, frame.to_csv(index=False))
    return folder / "index.html", folder / "report.md"


def page_title(results: DatasetResults) -> str:
    """Return the title of the report, which says whether any of the methods has read text."""
    reads_text = any("text" in head.config.caches for head in results.heads)
    return f"{results.dataset}: {'trained with text, tested' if reads_text else 'trained and tested'} on images alone"


def read_results(page: Path) -> pd.DataFrame:
    """Return the table of results beside a page that `write_report` has written; it has no rows when nothing is evaluated."""
    text = page.with_name(RESULTS_FILE).read_text(encoding="utf-8")
    if not text.strip():
        return pd.DataFrame()
    names = ("method", "kind", "group", "name", "verdict", "reason")
    return pd.read_csv(io.StringIO(text), converters=dict.fromkeys(names, str))  # which leave an empty cell empty


def _old_manifest_warning(results: DatasetResults, manifest: Manifest) -> list[Block]:
    """A warning when runs were trained before the dataset was prepared again, with another manifest."""
    labels = [head.label for head in results.heads if head.config.manifest != manifest.fingerprint()]
    if not labels:
        return []
    what = "Trained and scored on other samples than are prepared now, so not to be compared with other rows, and in no picture"
    return [Paragraph(f"{what}: {', '.join(labels)}.")]


def _figure_sections(
    results: DatasetResults, manifest: Manifest, shown_heads: ShownHeads
) -> list[Callable[[], Sequence[Block]]]:
    return [
        lambda: [Heading("Training"), training_curve_figure(shown_heads, manifest)],
        lambda: [Heading("Feature space"), *feature_space_blocks(results, manifest, shown_heads)],
        lambda: sample_map_blocks(results, manifest, shown_heads),
        lambda: [Heading("What changes between classes"), *class_change_blocks(manifest, shown_heads)],
        lambda: class_table_blocks(manifest, shown_heads),
        lambda: calibration_blocks(manifest, shown_heads),
        lambda: [Heading("Single examples"), *example_blocks(results, manifest, shown_heads)],
    ]
