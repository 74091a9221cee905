"""The papers' tables and figures as data: files data_manifests/papers/<artefact>.yaml with rows, columns and numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from pipeline.data.spec import SPEC_FOLDER, parse_spec
from pipeline.runtime.choices import unknown_choice
from pipeline.runtime.errors import UserError

PAPERS_FOLDER = SPEC_FOLDER / "papers"
ArtefactKind = Literal["table", "grid", "figure"]


@dataclass(frozen=True, kw_only=True)
class PaperDataset:
    """A data set that a table of a paper has columns of."""

    name: str  # as the paper writes it
    metrics: tuple[str, ...]  # of its columns, by the names that evaluations have


@dataclass(frozen=True, kw_only=True)
class PaperRow:
    """One row of a table: a method with its settings, and what the paper reports of it."""

    name: tuple[str, ...]  # one cell per head of the table; the last one names the row
    method: str
    settings: Mapping[str, Any] = field(default_factory=dict)  # they replace those of the preset
    backbone: str = ""  # the image encoder; "": the one that the table's other rows share
    unfreeze: str = ""  # the encoders that joint training tunes with this row's head: image or both; "": none
    against: str = ""  # the row that it is compared with; "": the base of the table
    paper: Mapping[str, tuple[float | None, ...]] = field(default_factory=dict)  # by data set, one per metric; None: unknown

    @property
    def title(self) -> str:
        """The name of the row."""
        return self.name[-1]


@dataclass(frozen=True, kw_only=True)
class Artefact:
    """A table, a grid of settings or a figure."""

    name: str
    kind: ArtefactKind
    title: str
    notes: tuple[str, ...] = ()  # what a reader of the numbers must know
    heads: tuple[str, ...] = ()  # of a table: the heads of its columns of text
    datasets: Mapping[str, PaperDataset] = field(default_factory=dict)
    backbone: str = ""  # the image encoder of the paper for rows that name none
    base: str = ""  # the row that the others are compared with
    rows: tuple[PaperRow, ...] = ()
    method: str = ""  # of a grid
    axes: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)

    def row(self, title: str) -> PaperRow:
        """Return the row of a name."""
        return next(row for row in self.rows if row.title == title)

    def reference(self, row: PaperRow) -> PaperRow | None:
        """Return the row that a row is compared with; None for the base itself."""
        title = row.against or self.base
        return None if title == row.title else self.row(title)


def artefact_names(folder: Path = PAPERS_FOLDER) -> list[str]:
    """Return the names of all artefacts, the tables of a paper before its figures."""
    return sorted((path.stem for path in folder.glob("*.yaml")), key=lambda name: (name.partition("-")[0], "fig" in name, name))


def read_artefact(name: str, folder: Path = PAPERS_FOLDER) -> Artefact:
    """Return an artefact.

    Args:
        name: The name of one in the folder, or the path of a YAML file of the same form.
        folder: The folder.

    Raises:
        UserError: there is none of this name, or its file has another form; the message says where.
    """
    file = Path(name) if name.endswith(".yaml") else folder / f"{name}.yaml"
    if not file.is_file():
        raise unknown_choice(
            name, f"unknown artefact {name!r}", artefact_names(folder), hint="or a file of your own, NAME.yaml"
        )
    content = parse_spec(file)
    try:
        datasets = {key: PaperDataset(name=each["name"], metrics=tuple(each["metrics"])) for key, each in
                    content.pop("datasets", {}).items()}  # fmt: skip
        rows = tuple(_read_row(each) for each in content.pop("rows", ()))
        lists = {key: tuple(content.pop(key, ())) for key in ("heads", "notes")}
        artefact = Artefact(name=file.stem, datasets=datasets, rows=rows, **lists, **content)
    except (TypeError, KeyError, ValueError, AttributeError) as error:
        raise UserError(f"{file}: not an artefact: {error}") from error
    problem = _find_problem(artefact)
    if problem:
        raise UserError(f"{file}: {problem}")
    return artefact


def _read_row(content: Mapping[str, Any]) -> PaperRow:
    numbers = {key: tuple(values) for key, values in content.get("paper", {}).items()}
    return PaperRow(**{**content, "name": tuple(content["name"]), "paper": numbers})


def _find_problem(artefact: Artefact) -> str:
    """Return what is wrong with an artefact; "" if nothing is."""
    if artefact.kind not in get_args(ArtefactKind):
        return f"kind is {artefact.kind!r}; choose one of: {', '.join(get_args(ArtefactKind))}"
    titles = [row.title for row in artefact.rows]
    if artefact.kind == "grid" and not (artefact.method and artefact.axes):
        return "a grid needs a method and axes"
    if len(set(titles)) < len(titles):
        return "two rows have the same name"
    for row in artefact.rows:
        if len(row.name) != len(artefact.heads):
            return f"row {row.title!r} has {len(row.name)} cells of text, not {len(artefact.heads)}"
        if (row.against or artefact.base) not in titles:
            return f"row {row.title!r} is compared with {row.against or artefact.base!r}, which is no row"
        for key, numbers in row.paper.items():
            if key not in artefact.datasets or len(numbers) != len(artefact.datasets[key].metrics):
                return f"row {row.title!r} does not have the columns of {key}"
            if not all(number is None or type(number) in (int, float) for number in numbers):
                return f"row {row.title!r} has other things than numbers for {key}; ~ stands for an unknown one"
    if artefact.kind == "table" and artefact.base not in titles:
        return f"its base is {artefact.base!r}, which is no row"
    return ""
