"""What an extraction will cost: hours, bytes, requests and money, from what a probe has measured."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from pipeline.cache.layout import CHUNK_ROWS, StoreDtype
from pipeline.data.manifest_files import read_manifest
from pipeline.extraction.extract import SHARDS_IN_WRITING, ExtractOptions
from pipeline.extraction.inputs import check_encoders, default_encoders
from pipeline.extraction.probe import NO_TIME, Probe, Spent, probe_extraction
from pipeline.extraction.requests import CacheSize, Requests, extraction_requests, media_requests, shared_requests

GB = 1e9
MANIFEST_OBJECTS = 3  # files that are delivered to workers; those of an encoder are few, too
HALF = 0.6  # share of the time up to which a change counts as halving it
WORTHWHILE = 0.95  # share of the time from which on a change is not worth a word


@dataclass(frozen=True, kw_only=True)
class Prices:
    """Prices in one currency; None: not asked for."""

    machine_hour: float | None = None
    gb_month: float | None = None
    put_thousand: float | None = None  # of PUT and LIST requests
    get_thousand: float | None = None  # of GET and HEAD requests
    egress_gb: float | None = None


@dataclass(frozen=True, kw_only=True)
class EncoderPlan:
    """The extraction of some samples with one encoder, by machines like the one of the probe."""

    probe: Probe
    num_samples: int
    num_machines: int = 1
    imports: Spent = NO_TIME  # until the libraries are loaded

    @property
    def num_rows(self) -> int:
        """Rows of the cache."""
        return max(1, round(self.num_samples * self.probe.rows_per_sample))

    @property
    def num_shards(self) -> int:
        """Shards of the cache, each with its commit record."""
        return -(-self.num_rows // self.probe.store.shard_rows)

    @property
    def start_seconds(self) -> float:
        """Before the first shard: the encoder, its processes, the manifest, and the look for files and records."""
        probe, readers = self.probe, min(2, self.num_machines)  # the first machine reads the manifest after the client
        stamps = probe.stamp_seconds * self.num_rows if self.num_machines == 1 else 0.0  # several do it shard by shard
        records = 2 * self.num_shards * probe.store.record_seconds
        rows = readers * probe.manifest_seconds * self.num_samples + stamps
        return self.imports.seconds + probe.load.seconds + probe.first_seconds + rows + records

    @property
    def encode_seconds(self) -> float:
        """Of decoding and encoding all rows, while earlier rows are written; with several machines, until the last."""
        probe = self.probe
        if self.num_machines > 1:
            rounds = -(-self.num_shards // self.num_machines)
            return rounds * (self._shard_rows / probe.rate + probe.first_seconds)
        commits = (1 - 1 / self.num_shards) * self._commit_processor_seconds  # the last one finds idle cores
        if probe.device == "cpu" and probe.num_processes >= probe.num_cores:
            return self.num_rows / probe.rate + commits / (probe.rate * probe.processor_seconds)
        return max(self.num_rows / probe.rate, (self.num_rows * probe.processor_seconds + commits) / probe.num_cores)

    @property
    def write_seconds(self) -> float:
        """Of writing for which the encoder waits: all of it with several machines, else what is not done beside encoding."""
        probe, rounds = self.probe, -(-self.num_shards // self.num_machines)
        shard = probe.store.write_seconds + self._shard_rows * probe.digest_seconds
        if self.num_machines > 1:
            return rounds * (shard + 2 * self._shard_rows * probe.stamp_seconds)
        return shard + max(0.0, (self.num_shards - 1) * shard / SHARDS_IN_WRITING - self.encode_seconds)

    @property
    def seconds(self) -> float:
        """Of the whole extraction, up to the opened cache."""
        opening = self.num_shards * self.probe.store.record_seconds
        return self.start_seconds + self.encode_seconds + self.write_seconds + opening

    @property
    def machine_hours(self) -> float:
        """Hours that are paid, if all machines stay until the last one has done."""
        return self.num_machines * self.seconds / 3600

    @property
    def processor_hours(self) -> float:
        """Hours of the processors for starting, decoding, encoding and writing."""
        start = self.imports.processor_seconds + self.num_machines * self.probe.load.processor_seconds
        return (start + self.num_rows * self.probe.processor_seconds + self._commit_processor_seconds) / 3600

    @property
    def feature_bytes(self) -> int:
        """Bytes of all shards."""
        store = self.probe.store
        return round(self.num_rows * store.shard_bytes / min(store.shard_rows, self.num_rows))

    @property
    def record_bytes(self) -> int:
        """Bytes of all commit records."""
        return self.num_shards * self.probe.store.record_bytes

    @property
    def input_bytes(self) -> float:
        """Bytes of media, or of texts, that are read."""
        return self.num_rows * self.probe.input_bytes

    @property
    def requests(self) -> Requests:
        """Requests to an object store that has the caches, and for media that are in tar files in one."""
        size = CacheSize(
            num_samples=self.num_samples,
            num_shards=self.num_shards,
            ids_bytes=round(self.num_samples * self.probe.id_bytes),
            is_ragged=self.probe.modality == "text",
        )
        num_tars = math.ceil(round(self.num_samples * self.probe.tars_per_sample, 9))
        media = media_requests(self.input_bytes, num_tars, self.num_shards, self.num_machines) if num_tars else Requests()
        if self.num_machines == 1:
            return media + extraction_requests(size, self.seconds)
        return media + shared_requests(size, self.seconds, self.num_machines, MANIFEST_OBJECTS)

    @property
    def _shard_rows(self) -> int:
        return min(self.probe.store.shard_rows, self.num_rows)

    @property
    def _commit_processor_seconds(self) -> float:
        probe = self.probe
        return self.num_rows * (probe.store.write_processor_seconds / self._shard_rows + probe.digest_processor_seconds)

    def shares(self) -> dict[str, float]:
        """Return what the seconds go to: share by name."""
        probe = self.probe
        decode, encode = probe.prepare_seconds / probe.num_processes, probe.encode_seconds / probe.num_processes
        if probe.device == "cuda":  # at the same time: the slower one bounds
            decode, encode = (1.0, 0.0) if decode > probe.encode_seconds else (0.0, 1.0)
        parts = {
            "decoding": self.encode_seconds * decode / (decode + encode),
            "the encoder": self.encode_seconds * encode / (decode + encode),
            "writing": self.write_seconds,
            "starting": self.seconds - self.encode_seconds - self.write_seconds,
        }
        return {name: seconds / self.seconds for name, seconds in parts.items()}

    def changed(self) -> dict[str, EncoderPlan]:
        """Return the same extraction with one thing changed, by what that is."""
        probe, share = self.probe, self.shares()
        work = max(1e-9, share["decoding"] + share["the encoder"])

        def faster(factor: float) -> EncoderPlan:
            return replace(self, probe=replace(probe, seconds=probe.seconds / factor))

        prepare = "tokenizing" if probe.modality == "text" else "decoding"
        return {
            f"twice the machines (--machines {2 * self.num_machines})": replace(self, num_machines=2 * self.num_machines),
            f"{prepare} twice as fast{'' if probe.modality == 'text' else ', as of smaller files'}": faster(
                1 / (1 - share["decoding"] / work / 2)
            ),
            "an encoder twice as fast, such as a smaller one or one on a faster GPU": faster(
                1 / (1 - share["the encoder"] / work / 2)
            ),
            "a store that takes shards twice as fast": replace(
                self,
                probe=replace(probe, store=replace(probe.store, write_seconds=probe.store.write_seconds / 2)),
            ),
            **self._with_half_shards(),
        }

    def _with_half_shards(self) -> dict[str, EncoderPlan]:
        store = self.probe.store
        shard_rows = store.shard_rows // 2 // CHUNK_ROWS * CHUNK_ROWS
        if not shard_rows:
            return {}
        share = min(shard_rows, self.num_rows) / self._shard_rows
        half = replace(
            store,
            shard_rows=shard_rows,
            shard_bytes=round(store.shard_bytes * share),
            write_seconds=store.write_seconds * share,
            write_processor_seconds=store.write_processor_seconds * share,
            record_bytes=round(store.record_bytes * share),
        )
        return {f"shards of half the rows (--shard-rows {shard_rows})": replace(self, probe=replace(self.probe, store=half))}

    def sentence(self) -> str:
        """Return in plain words what bounds the extraction, and what would halve its time."""
        name, share = max(self.shares().items(), key=lambda item: item[1])
        left = sorted((plan.seconds / self.seconds, what) for what, plan in self.changed().items())
        shown = [f"with {what} it would take {ratio:.0%} of that time" for ratio, what in left if ratio <= HALF]
        if not shown:
            shown = ["no single change halves it"]
            shown += [f"the most is gained with {what}: {ratio:.0%} are left" for ratio, what in left[:1] if ratio < WORTHWHILE]
        return f"{name} takes {share:.0%} of the time of {self.probe.encoder}; {'; '.join(shown)}"

    def facts(self) -> dict[str, Any]:
        """Return everything as JSON values."""
        probe = self.probe
        return {
            "encoder": probe.encoder,
            "rows": self.num_rows,
            "shards": self.num_shards,
            "hours": self.seconds / 3600,
            "seconds": {
                "total": self.seconds,
                "starting": self.start_seconds,
                "encoding": self.encode_seconds,
                "writing": self.write_seconds,
            },
            "machine_hours": self.machine_hours,
            "processor_hours": self.processor_hours,
            "rows_per_second": probe.rate,
            "gigabytes": {
                "features": self.feature_bytes / GB,
                "records": self.record_bytes / GB,
                "inputs": self.input_bytes / GB,
            },
            "requests": asdict(self.requests),
            "shares": self.shares(),
            "bound": self.sentence(),
            "probe": asdict(probe),
        }


def total_facts(plans: Sequence[EncoderPlan]) -> dict[str, Any]:
    """Return what several plans come to, one after another, as JSON values."""
    facts = [plan.facts() for plan in plans]
    return {
        **{name: sum(each[name] for each in facts) for name in ("hours", "machine_hours", "processor_hours")},
        **{
            group: {name: sum(each[group][name] for each in facts) for name in facts[0][group]}
            for group in ("gigabytes", "requests")
        },
    }


def money(plans: Sequence[EncoderPlan], prices: Prices) -> dict[str, float]:
    """Return what extractions cost, by what is paid for; only what has a price."""
    requests = sum((plan.requests for plan in plans), Requests())
    stored = sum(plan.feature_bytes + plan.record_bytes for plan in plans) / GB
    media = sum(plan.input_bytes for plan in plans if plan.probe.modality != "text") / GB  # texts are in the manifest
    amounts = {
        "machines": (prices.machine_hour, sum(plan.machine_hours for plan in plans)),
        "features and records, a month": (prices.gb_month, stored),
        "PUT and LIST requests": (prices.put_thousand, (requests.put + requests.list) / 1000),
        "GET and HEAD requests": (prices.get_thousand, requests.get / 1000),
        "media out of their store, once": (prices.egress_gb, media),
        "features out of their store, each time": (prices.egress_gb, stored),
    }
    return {name: price * amount for name, (price, amount) in amounts.items() if price is not None}


def plan_dataset(
    home: Path,
    dataset: str,
    encoders: Sequence[str],
    settings: Mapping[str, str],
    store_dtype: StoreDtype,
    options: ExtractOptions,
    num_samples: int,
    num_machines: int,
    seconds: float,
    imports: Spent = NO_TIME,
) -> list[EncoderPlan]:
    """Try each encoder on a prepared dataset, and return its plan.

    Args:
        home: folder of all artifacts.
        dataset: a prepared dataset.
        encoders: names of encoders; none: those of the dataset.
        settings: of the encoder, if there is one.
        store_dtype: number format on disk.
        options: as those of the extraction that is planned.
        num_samples: samples that are planned; 0: those of the dataset.
        num_machines: machines like this one.
        seconds: for which each encoder is tried.
        imports: what a command takes to load the libraries, before the first encoder.

    Raises:
        UserError: the dataset is not prepared, or there is no such encoder or setting.
    """
    manifest = read_manifest(home, dataset)
    names = list(encoders) or default_encoders(home, manifest)
    check_encoders(names, settings)
    num_samples = num_samples or len(manifest.samples)
    return [
        EncoderPlan(
            probe=probe_extraction(manifest, name, settings, home, store_dtype, options, num_samples, seconds),
            num_samples=num_samples,
            num_machines=num_machines,
            imports=NO_TIME if number else imports,
        )
        for number, name in enumerate(names)
    ]
