"""The commands of stage 1: `extract` and `encoders`. They import the modules that they use when they run."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from pipeline.commands.checks import check_dataset, check_setting_names
from pipeline.commands.options import (
    DEFAULT_HOME,
    NO_PAIRS,
    AsJson,
    Dataset,
    Home,
    Scheduler,
    SettingOptions,
    parse_integers,
    show,
)
from pipeline.commands.plugin_table import show_plugin
from pipeline.runtime.assignments import parse_assignments
from pipeline.runtime.errors import UserError


def extract(
    dataset: Dataset,
    encoder: Annotated[
        list[str], typer.Option("--encoder", help="Encoder to run; default: the dataset's. May be given several times.")
    ] = NO_PAIRS,
    settings: SettingOptions = NO_PAIRS,
    weights: Annotated[str, typer.Option(help="Weights of the encoder: a file or folder, e.g. of the joint stage.")] = "",
    batch_size: Annotated[
        int,
        typer.Option(
            min=0, help="Items per batch of a new cache; 0: 16, or up to 256 on a GPU, where a batch is halved until it fits."
        ),
    ] = 0,
    workers: Annotated[int, typer.Option(min=-1, help="Processes; -1: one per core, 0: only this process.")] = -1,
    shard_rows: Annotated[
        int, typer.Option(min=0, help="Rows per shard, the unit of commit and of distribution; 0: 8192, of clips 512.")
    ] = 0,
    scheduler: Scheduler = "local",
    workers_gpu: Annotated[str, typer.Option(help="GPUs of this machine to use together, e.g. 0,1.")] = "",
    max_failures: Annotated[float, typer.Option(min=0, help="Stop above this share of samples that cannot be decoded.")] = 0.05,
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="Try samples again that could not be decoded.")] = False,
    compiled: Annotated[bool, typer.Option("--compile", help="Run the encoder through torch.compile (another cache).")] = False,
    store_dtype: Annotated[Literal["float16", "float32", "bfloat16"], typer.Option(help="Number format on disk.")] = "float16",
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
        check_setting_names(plugins.get("encoders", encoder[0]).Config, given)
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


def encoders(
    name: Annotated[str, typer.Argument(help="An encoder, to see its settings.")] = "", as_json: AsJson = False
) -> None:
    """The encoders, or one encoder's settings."""
    show_plugin("encoders", name, as_json)
