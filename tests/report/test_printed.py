"""Figures for print: the same bytes in every process, letters of all kinds, hostile names, and the rules behind them."""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
from decimal import Decimal
from functools import partial
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pandas as pd
import pytest
from helpers.pages import HOSTILE_TEXT
from PIL import Image

from pipeline.report import figure_data
from pipeline.report.blocks import ClassPredictions, ExampleCard
from pipeline.report.figures import plot_confusions, plot_embeddings
from pipeline.report.printed import format_confidence, plot_examples, write_printed

PROGRAM = """
import sys
from functools import partial
from pathlib import Path
import numpy as np
import pandas as pd
from pipeline.report.figures import plot_embeddings
from pipeline.report.printed import write_printed
positions = np.random.default_rng(0).normal(size=(30, 2))
plot = partial(plot_embeddings, [("one", positions)], np.arange(30) % 3, ["a", "b", "c"], 7.0)
write_printed(Path(sys.argv[1]), "figure", plot, pd.DataFrame(positions), "caption")
"""


def example(name: str, thumbnail: bytes = b"") -> ExampleCard:
    """An example whose classes and id bear a name."""
    top = tuple((f"{name} {k}", 0.5**k / 2, k == 1) for k in range(5))
    return ExampleCard(name, thumbnail, (name,), (ClassPredictions("Baseline", top), ClassPredictions("SeDA", top)))


def write_examples(folder: Path, *cards: ExampleCard) -> dict[str, bytes]:
    plot = partial(plot_examples, [("case", card) for card in cards])
    return {path.suffix: path.read_bytes() for path in write_printed(folder, "examples", plot, pd.DataFrame(), "caption")}


def test_every_process_writes_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    environment = {**os.environ, "PYTHONHASHSEED": "1"}
    subprocess.run([sys.executable, "-c", PROGRAM, str(tmp_path / "there")], env=environment, check=True)
    monkeypatch.setattr("sys.argv", ["", str(tmp_path / "here")])
    exec(PROGRAM, {})
    files, others = ({path.suffix: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("here", "there"))
    assert files == others
    assert set(files) == {".svg", ".pdf", ".csv", ".txt"}
    assert b"Date" not in files[".pdf"]
    assert b"/FontFile2" in files[".pdf"]  # TrueType
    assert b"/Type3" not in files[".pdf"]
    assert b"<dc:date>" not in files[".svg"]
    assert b"prefers-color-scheme" not in files[".svg"]  # ink on paper


def test_pictures_are_inside_and_a_missing_one_is_said(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (16, 12), (200, 30, 30)).save(buffer, format="PNG")
    with_picture = write_examples(tmp_path, example("cat", buffer.getvalue()))
    assert b'xlink:href="data:image/png;base64,' in with_picture[".svg"]
    assert b"/Subtype /Image" in with_picture[".pdf"]
    without = write_examples(tmp_path, example("cat"))
    assert b"<image" not in without[".svg"]
    assert b"/Subtype /Image" not in without[".pdf"]


def test_hostile_names_are_inert_and_foreign_letters_are_text(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    drawing = ElementTree.fromstring(write_examples(tmp_path, example(HOSTILE_TEXT))[".svg"])
    assert {element.tag.rpartition("}")[2] for element in drawing.iter()}.isdisjoint({"script", "a", "image"})
    assert not caplog.records
    files = write_examples(tmp_path, example("猫 </text><script/>"))
    texts = [element.text or "" for element in ElementTree.fromstring(files[".svg"]).iter("{http://www.w3.org/2000/svg}text")]
    assert "猫 </text><script/> 0" in texts
    assert "boxes there, and right in the SVG" in caplog.text
    assert files[".pdf"].startswith(b"%PDF")


@pytest.mark.parametrize("confidence", [1.0, 0.64, 0.0951, 0.01, 0.0099, 3.14e-5, 1e-12])
def test_confidences_are_those_numbers_to_two_digits(confidence: float) -> None:
    text = format_confidence(confidence)
    assert float(text) == pytest.approx(confidence, abs=0.005 if confidence >= 0.01 else 0.05 * confidence)
    assert len(Decimal(text).normalize().as_tuple().digits) <= 3
    assert len(text) <= 7


def test_a_small_matrix_has_its_numbers(tmp_path: Path) -> None:
    before = np.array([[0.75, 0.25, 0.0], [0.5, 0.25, 0.25]])
    after = np.array([[1.0, 0.0, 0.0], [0.5, 0.5, 0.0]])
    figure = plot_confusions(before, after, ["猫", "b"], ("one", "two"))
    numbers = [[text.get_text() for text in axes.texts] for axes in figure.axes]
    assert numbers == [["75", "25", "50", "25", "25"], ["100", "50", "50"], ["+25", "-25", "+25", "-25"]]


@pytest.mark.parametrize(
    ("num_classes", "num_columns", "length", "width"), [(2, 2, 1, 10.0), (7, 7, 14, 10.0), (7, 7, 40, 7.0), (20, 21, 14, 10.0)]
)
def test_names_of_any_length_are_whole_and_leave_room_for_the_matrices(
    num_classes: int, num_columns: int, length: int, width: float
) -> None:
    """Oracle: the box around everything that matplotlib draws."""
    matrix = np.eye(num_classes, num_columns)
    figure = plot_confusions(matrix, matrix, ["W" * length] * num_classes, ("baseline", "ema"), width)
    figure.draw_without_rendering()
    size, content = figure.get_size_inches(), figure.get_tightbbox()
    assert 0 < content.x0 < content.x1 < size[0]
    assert 0 < content.y0 < content.y1 < size[1]
    assert size[1] - content.height < 0.1  # nothing is empty above and below
    panels = [axes.get_position() for axes in figure.axes]
    assert max(panel.width for panel in panels) == pytest.approx(min(panel.width for panel in panels))
    assert min(panel.height * size[1] for panel in panels) > 0.9


def test_a_group_of_confused_classes_is_chosen_greedily() -> None:
    rng = np.random.default_rng(0)
    counts = rng.poisson(0.4, (12, 12)) + np.diag(rng.integers(5, 30, 12))

    def confusion(group: list[int]) -> int:
        return sum(int(counts[a, b] + counts[b, a]) for a in group for b in group if a < b)

    best = max(([a, b] for a in range(12) for b in range(a + 1, 12)), key=confusion)
    while len(best) < 5:
        best = max(([*best, k] for k in range(12) if k not in best), key=confusion)
    assert figure_data.confused_group(counts, 5).tolist() == sorted(best)
    assert figure_data.confused_group(np.diag([3, 2, 1]), 5).tolist() == [0, 1, 2]  # nothing is confused
    assert figure_data.confused_group(counts[:1, :1], 5).tolist() == [0]


def test_points_are_those_that_were_given() -> None:
    positions, group = np.random.default_rng(0).normal(size=(40, 2)), np.arange(40) % 4
    figure = plot_embeddings([("one", positions), ("two", -positions)], group, list("abcd"), 7.0)
    for axes, sign in zip(figure.axes, (1, -1), strict=True):
        for number, points in enumerate(axes.collections):
            np.testing.assert_array_equal(np.asarray(points.get_offsets()), sign * positions[group == number])
    assert not re.search(r"\d", figure.axes[0].get_title())
