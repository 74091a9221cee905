"""The papers' figures of features and predictions, drawn from finished runs: t-SNE, confidences, confusion, the path of a class.

Each is written as SVG and PDF, with a CSV file of the numbers behind it. The robustness figure is that of a grid.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from pipeline.runtime.runs import RunFolder
from pipeline.types import Split


class WriteFigure(Protocol):
    """Writes a figure and returns its files: SVG, PDF and CSV."""

    def __call__(
        self, home: Path, dataset: str, runs: Mapping[str, RunFolder], folder: Path, split: Split = "test"
    ) -> list[Path]:
        """Write the figure.

        Args:
            home: The folder of all artifacts.
            dataset: A prepared dataset.
            runs: A finished run by method, of each of the figure's methods; all were trained on the same image features.
            folder: Where the files are written; it is made if it is not there.
            split: The split whose samples are shown; what is chosen by results is chosen on validation.

        Raises:
            UserError: A run is missing or not finished, or the dataset cannot give the figure.
        """
        ...


@dataclass(frozen=True, slots=True)
class PaperFigure:
    """A figure of a paper: what it shows, and the methods that it needs trained."""

    title: str
    methods: tuple[str, ...]
    write: WriteFigure


def _write_later(home: Path, dataset: str, runs: Mapping[str, RunFolder], folder: Path, split: Split = "test") -> list[Path]:
    raise NotImplementedError


def write_robustness(grid_folder: Path, folder: Path) -> list[Path]:
    """Write SeDA's Figure 3, the validation metric against every axis of a grid, as SVG, PDF and CSV; return the files."""
    raise NotImplementedError


FIGURES: Mapping[str, PaperFigure] = {
    "marnet-fig3": PaperFigure("Image features before and after the diffusion (MARNet, Figure 3)", ("cdr",), _write_later),
    "marnet-fig4": PaperFigure("Five best classes of examples (MARNet, Figure 4)", ("baseline", "cdr"), _write_later),
    "seda-fig4": PaperFigure("The path of one class from image to text (SeDA, Figure 4)", ("l2", "seda"), _write_later),
    "seda-fig5": PaperFigure("Confusion and examples before and after (SeDA, Figure 5)", ("baseline", "seda"), _write_later),
}
