"""`diffalign export`: a finished run as a folder that needs neither its home nor this package."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated

import typer

from pipeline.commands.options import DEFAULT_HOME, ONE_RUN_HELP, AsJson, Home, show

logger = logging.getLogger(__name__)


def export(
    run: Annotated[str, typer.Argument(metavar="RUN", help=f"{ONE_RUN_HELP} A folder may be a copy, without its home.")],
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder to make.")],
    push: Annotated[
        str,
        typer.Option(metavar="REPO", help="Upload the folder to this model repository of the Hugging Face hub, OWNER/NAME."),
    ] = "",
    private: Annotated[bool, typer.Option("--private", help="Make a new repository of --push a private one.")] = False,
    licence: Annotated[
        str,
        typer.Option(help="Licence of the encoder's weights, for the model card. Default: what the encoder's library says."),
    ] = "",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier export in DIR.")] = False,
    home: Home = DEFAULT_HOME,
    as_json: AsJson = False,
) -> None:
    """Encoder and head as one graph (torch.export and ONNX), weights, labels, preprocessing and a model card in one folder."""
    from pipeline.runtime.head_names import find_run

    found = find_run(home, run)

    from pipeline.studies.export_folder import export_run, push_folder

    files = export_run(found, folder, home, licence, overwrite)
    facts = {"folder": str(folder), "files": files if as_json else ", ".join(files)}
    if push:
        facts["repository"] = push_folder(folder, push, private)
    show(facts, as_json)
