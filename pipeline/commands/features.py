"""The commands of stage 1: `extract` and `encoders`. They import the modules that they use when they run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pipeline.commands.checks import check_dataset, check_given_settings
from pipeline.commands.options import (
    DEFAULT_HOME,
    NO_PAIRS,
    AsJson,
    BatchSize,
    Dataset,
    Encoders,
    EncoderWeights,
    Home,
    Processes,
    Scheduler,
    SettingOptions,
    ShardRows,
    StoredNumbers,
    parse_integers,
    show,
    with_home,
)
from pipeline.commands.plugin_table import show_plugin
from pipeline.runtime.assignments import parse_assignments
from pipeline.runtime.errors import UserError

if TYPE_CHECKING:
    from pipeline.cache.reader import Cache


def extract(
    dataset: Dataset,
    encoder: Encoders = NO_PAIRS,
    settings: SettingOptions = NO_PAIRS,
    weights: EncoderWeights = "",
    batch_size: BatchSize = 0,
    workers: Processes = -1,
    shard_rows: ShardRows = 0,
    scheduler: Scheduler = "local",
    workers_gpu: Annotated[str, typer.Option(help="GPUs of this machine to use together, e.g. 0,1.")] = "",
    max_failures: Annotated[float, typer.Option(min=0, help="Stop above this share of samples that cannot be decoded.")] = 0.05,
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="Try samples again that could not be decoded.")] = False,
    compiled: Annotated[bool, typer.Option("--compile", help="Run the encoder through torch.compile (another cache).")] = False,
    store_dtype: StoredNumbers = "float16",
    home: Home = DEFAULT_HOME,
    as_json: AsJson = False,
) -> None:
    """Stage 1: run encoders once over a dataset; an interrupted extraction goes on where it was."""
    from pipeline.runtime import plugins
    from pipeline.workspace import Workspace

    check_dataset(dataset, home)
    given = parse_assignments([*settings, *([f"weights={weights}"] if weights else [])])
    if given and len(encoder) != 1:
        raise UserError("--set and --weights belong to one encoder: name it with --encoder")
    for name in encoder:
        plugins.check_name("encoders", name)
    gpus = parse_integers(workers_gpu, "--workers-gpu") if workers_gpu else []
    if given:
        check_given_settings(plugins.get("encoders", encoder[0]).Config, given)
    caches = Workspace(home).extract(
        dataset,
        encoder,
        batch_size=batch_size,
        workers=workers,
        shard_rows=shard_rows,
        max_failures=max_failures,
        retry_failed=retry_failed,
        store_dtype=store_dtype,
        compiled=compiled,
        scheduler=scheduler,
        gpus=gpus,
        settings=given,
    )
    show({name: str(cache.path) for name, cache in caches.items()}, as_json)
    if not as_json:
        print(with_home(f"next: {next_command(home, dataset, caches)}", home))


def next_command(home: Path, dataset: str, extracted: Mapping[str, Cache]) -> str:
    """Return the command that trains a head on the caches that there are; without image features, the one that makes them."""
    from pipeline.cache.reader import find_caches, is_of_text
    from pipeline.data.manifest_files import load_dataset_spec

    try:
        defaults = load_dataset_spec(home, dataset)["encoders"]
    except UserError:  # the manifest was built by a plug-in that is not here
        defaults = {"image": "", "text": ""}
    there = {path.name.rpartition("-")[0] for path in find_caches(home, dataset)}
    options = {}
    for key, default in defaults.items():
        new = [name for name, cache in extracted.items() if is_of_text(cache.identity) == (key == "text")]
        if default in there or new:
            encoder = default if default in new or not new else new[0]
            argument = _name_of(home, dataset, encoder, extracted[encoder]) if new else default
            options[key] = f" --{key} {argument}" if argument != default else ""
    if "image" not in options:
        return f"diffalign extract {dataset}"
    method = "ema" if "text" in options else "baseline"
    return f"diffalign train-head --dataset {dataset} --method {method}{''.join(options.values())}"


def _name_of(home: Path, dataset: str, encoder: str, cache: Cache) -> str:
    """Return what names a cache: its encoder, or its folder where the encoder has made several."""
    from pipeline.cache.reader import find_caches, is_of_text, read_attributes

    made = [path for path in find_caches(home, dataset) if path.name.rpartition("-")[0] == encoder]
    alike = [path for path in made if is_of_text(read_attributes(path)["identity"]) == is_of_text(cache.identity)]
    return cache.path.name if len(alike) > 1 else encoder


def encoders(
    name: Annotated[str, typer.Argument(help="An encoder, to see its settings.")] = "", as_json: AsJson = False
) -> None:
    """The encoders, or one encoder's settings."""
    show_plugin("encoders", name, as_json)
    if not (name or as_json):
        print("\n".join(["", "the backbones of the papers' tables: diffalign extract DATASET --encoder …", *_backbone_lines()]))


def _backbone_lines() -> list[str]:
    """Return a line for each backbone: its title, its encoder and settings."""
    from pipeline.studies.backbones import BACKBONES

    width = max(len(backbone.title) for backbone in BACKBONES.values())
    return [
        " ".join([f"  {title:{width}}", encoder, *(f"--set {name}={value}" for name, value in settings.items())])
        for title, encoder, settings in BACKBONES.values()
    ]
