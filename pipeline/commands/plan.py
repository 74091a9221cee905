"""The command `plan`: what an extraction will cost. It imports the modules that it uses when it runs."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Annotated, Any

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
    SettingOptions,
    ShardRows,
    StoredNumbers,
    show,
    show_table,
)
from pipeline.runtime import plugins
from pipeline.runtime.assignments import parse_assignments
from pipeline.runtime.errors import UserError

if TYPE_CHECKING:
    from pipeline.extraction.plan import EncoderPlan


def plan(
    dataset: Dataset,
    rows: Annotated[
        int,
        typer.Option(min=0, help="Samples that are planned, of the same kind as those of the dataset; 0: as many as it has."),
    ] = 0,
    encoder: Encoders = NO_PAIRS,
    settings: SettingOptions = NO_PAIRS,
    weights: EncoderWeights = "",
    machines: Annotated[
        int,
        typer.Option(min=1, help="Machines like this one that share the work; 1: this one alone."),
    ] = 1,
    seconds: Annotated[
        float, typer.Option(min=1, help="For which each encoder is tried; a longer trial is more exact.")
    ] = 20.0,
    batch_size: BatchSize = 0,
    shard_rows: ShardRows = 0,
    store_dtype: StoredNumbers = "float16",
    price_machine: Annotated[float | None, typer.Option(min=0, help="Price of a machine for an hour.")] = None,
    price_storage: Annotated[float | None, typer.Option(min=0, help="Price of a GB (10⁹ bytes) for a month.")] = None,
    price_put: Annotated[float | None, typer.Option(min=0, help="Price of 1,000 PUT or LIST requests.")] = None,
    price_get: Annotated[float | None, typer.Option(min=0, help="Price of 1,000 GET or HEAD requests.")] = None,
    price_egress: Annotated[float | None, typer.Option(min=0, help="Price of a GB that leaves a store.")] = None,
    home: Home = DEFAULT_HOME,
    as_json: AsJson = False,
) -> None:
    """What an extraction will cost, before it runs: hours, GB, requests, and money where prices are given.

    Rates are measured on this machine, with the batches, workers and store of a real extraction: for --seconds it encodes rows
    from all over the dataset, and writes a shard to the disk or, with --caches, to the bucket of the caches. Your caches are
    not touched. To plan more samples than you have, prepare some of them, and give --rows.

    Several --machines share out the shards, as with `extract --scheduler` and a dask worker on each that may start processes
    (docs/object-storage.md). Requests are those to an object store, for the caches and for media in tar files there. Prices are
    yours, in any currency. The trial is as slow as the machine is now: run it beside the load that the extraction will have.
    """
    started, begun = time.perf_counter(), time.process_time()
    check_dataset(dataset, home)
    given = parse_assignments([*settings, *([f"weights={weights}"] if weights else [])])
    if given and len(encoder) != 1:
        raise UserError("--set and --weights belong to one encoder: name it with --encoder")
    for name in encoder:
        plugins.check_name("encoders", name)
    if given:
        check_given_settings(plugins.get("encoders", encoder[0]).Config, given)

    from pipeline.extraction.extract import ExtractOptions
    from pipeline.extraction.plan import Prices, money, plan_dataset, total_facts
    from pipeline.extraction.probe import Spent

    options = ExtractOptions(batch_size=batch_size, shard_rows=shard_rows)
    imports = Spent(time.perf_counter() - started, time.process_time() - begun)
    plans = plan_dataset(home, dataset, encoder, given, store_dtype, options, rows, machines, seconds, imports)
    prices = Prices(
        machine_hour=price_machine,
        gb_month=price_storage,
        put_thousand=price_put,
        get_thousand=price_get,
        egress_gb=price_egress,
    )
    costs = money(plans, prices)
    if as_json:
        facts = {"dataset": dataset, "machines": machines, "encoders": [each.facts() for each in plans]}
        facts |= {"total": total_facts(plans), "money": costs}
        show(facts, as_json)
        return
    _print_table(plans)
    for name, amount in costs.items():
        print(f"price of {name}: {amount:,.2f}")
    for each in plans:
        if each.probe.failed:
            print(
                f"{each.probe.encoder} could not read {each.probe.failed:.1%} of the rows; extract stops at 5% (--max-failures)"
            )
        print(f"{each.probe.encoder}, in the trial: {each.probe.verdict}")
    slowest = max(plans, key=lambda each: each.seconds)
    print(f"{slowest.sentence()}.")


def _print_table(plans: list[EncoderPlan]) -> None:
    """Print a row for each quantity and a column for each encoder, with the sum of what can be added."""
    import pandas as pd

    columns = [_column(each) for each in plans]
    table = pd.DataFrame({"": list(columns[0])})
    for each, column in zip(plans, columns, strict=True):
        table[each.probe.encoder] = [_written(value) for value in column.values()]
    if len(plans) > 1:
        sums = [sum(column[name] for column in columns) if name.startswith(_ADDED) else None for name in columns[0]]
        table["together"] = ["" if value is None else _written(value) for value in sums]
    show_table(table, False)


_ADDED = ("hours", "seconds", "machine-hours", "processor-hours", "GB", "requests")


def _column(each: EncoderPlan) -> dict[str, Any]:
    requests, store = each.requests, each.probe.store
    media = "GB of texts read" if each.probe.modality == "text" else "GB of media read"
    other = "GB of media read" if each.probe.modality == "text" else "GB of texts read"
    return {
        "rows": each.num_rows,
        "shards, each with a commit record": each.num_shards,
        "measured: rows per second of a machine": each.probe.rate,
        "measured: MB/s of writing": store.write_rate / 1e6,
        "measured: MB/s of reading what was just written": store.read_rate / 1e6,
        "hours": each.seconds / 3600,
        "seconds of them before the first row is encoded": each.start_seconds,
        "machine-hours": each.machine_hours,
        "processor-hours": each.processor_hours,
        "GB of features": each.feature_bytes / 1e9,
        "GB of commit records": each.record_bytes / 1e9,
        **dict(sorted({media: each.input_bytes / 1e9, other: 0.0}.items())),
        "requests, PUT": requests.put,
        "requests, GET and HEAD": requests.get,
        "requests, LIST": requests.list,
    }


def _written(value: float) -> str:
    """Return a number with about three digits; whole numbers as they are."""
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
