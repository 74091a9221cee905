"""What `diffalign plan` says: its arithmetic in closed form, the requests that are really sent, a trial of a tiny dataset."""

from __future__ import annotations

import json
import shutil
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import astuple, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.command_line import run
from helpers.fault_cases import extract_texts, write_texts
from helpers.tar_files import sample, write_tar

from pipeline.cache import open_cache
from pipeline.data.manifest import Manifest
from pipeline.data.manifest_files import read_manifest
from pipeline.data.prepare import prepare
from pipeline.extraction import distributed
from pipeline.extraction.distributed import ExtractionSpec, extract_on_cluster
from pipeline.extraction.extract import ExtractOptions, extract, plan_extraction
from pipeline.extraction.plan import EncoderPlan, Prices, money
from pipeline.extraction.probe import Probe, Spent, StoreProbe, spread_batches
from pipeline.extraction.requests import CacheSize, Requests, extraction_requests, media_requests, renewals, shared_requests
from pipeline.runtime import stores
from pipeline.runtime.places import caches_at, parse_place

KIND_OF = {"put": "put", "delete": "delete", "list": "list"} | dict.fromkeys(("get", "get_range", "head"), "get")


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[str]]:
    """Let s3://counted be a bucket in memory, and count the requests to it by kind, also those of Zarr."""
    obstore = pytest.importorskip("obstore")
    from obstore.store import MemoryStore

    memory, counts, lock = MemoryStore(), Counter[str](), threading.Lock()
    monkeypatch.setattr(stores, "connect", lambda bucket, endpoint: memory)

    def counting(name: str, kind: str) -> Any:
        function = getattr(obstore, name)

        def call(*arguments: Any, **options: Any) -> Any:
            with lock:
                counts[kind] += 1
            return function(*arguments, **options)

        return call

    for name, kind in KIND_OF.items():
        for full_name in (name, f"{name}_async"):
            if hasattr(obstore, full_name):
                monkeypatch.setattr(obstore, full_name, counting(full_name, kind))
    stores._open_bucket.cache_clear()
    with caches_at("s3://counted"):
        yield counts
    stores._open_bucket.cache_clear()


def as_counts(requests: Requests) -> dict[str, int]:
    return dict(zip(("put", "get", "list", "delete"), astuple(requests), strict=True))


@pytest.mark.parametrize("num_samples", [20, 90])
def test_an_extraction_sends_the_requests_that_are_counted(num_samples: int, counted: Counter[str], tmp_path: Path) -> None:
    manifest = write_texts(tmp_path, num_samples)
    cache = open_cache(extract_texts(manifest, tmp_path))
    num_shards = -(-cache.stored.shape[0] // 512)
    size = CacheSize(num_samples=num_samples, num_shards=num_shards, ids_bytes=8 * num_samples, is_ragged=True)
    assert counted == as_counts(extraction_requests(size, seconds=0) + Requests(get=-1))  # `extract` alone reads no failures


def test_an_extraction_of_media_sends_the_requests_that_are_counted(
    tiny_manifest: Manifest, counted: Counter[str], tmp_path: Path
) -> None:
    open_cache(extract(tiny_manifest, "random_projection", {}, tmp_path, options=ExtractOptions(progress=False)))
    size = CacheSize(num_samples=40, num_shards=1, ids_bytes=11 * 40)
    assert counted == as_counts(extraction_requests(size, seconds=0) + Requests(get=-1))


def test_an_extraction_of_media_in_a_bucket_sends_the_requests_that_are_counted(counted: Counter[str], tmp_path: Path) -> None:
    """1,200 samples in three tar files are three shards of the cache, which have five parts of them."""
    root = parse_place("s3://counted/tars")
    for tar in range(3):
        write_tar(file := tmp_path / f"{tar}.tar", [each for key in range(400) for each in sample(f"{tar}-{key}", key % 256)])
        stores.store_of(root).put(root / file.name, file.read_bytes())
    prepare("webdataset", root, tmp_path, {"shards": "{0..2}.tar"}, name="tars")
    manifest = read_manifest(tmp_path, "tars")
    counted.clear()
    options = ExtractOptions(workers=0, shard_rows=512, progress=False)
    open_cache(extract(manifest, "random_projection", {}, tmp_path, options=options))
    size = CacheSize(num_samples=1200, num_shards=3, ids_bytes=10 * 1200)
    media = media_requests(100 * 1200, 3, 3, 1)
    assert media == Requests(get=3 * 5 + 3)
    assert counted == as_counts(extraction_requests(size, seconds=0) + media + Requests(get=-1))


def test_workers_that_share_nothing_send_the_requests_that_are_counted(
    counted: Counter[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The client and its one worker are this process."""
    write_texts(tmp_path, 90)

    def run_jobs(client: object, task: Any, jobs: Sequence[Any], name_of: object) -> Iterator[Any]:
        yield from ((number, partial(task, job)) for number, job in enumerate(jobs))

    monkeypatch.setattr(distributed, "run_on_cluster", run_jobs)
    monkeypatch.setattr(distributed, "num_threads", lambda client: 1)
    settings = {"modality": "text", "width": "8"}
    spec = ExtractionSpec(
        home=tmp_path, dataset="texts", encoder="random_projection", settings=tuple(settings.items()),
        store_dtype="float16", compiled=False, options=ExtractOptions(workers=0, shard_rows=512, progress=False),
        delivery=distributed._send(tmp_path, "texts", settings),
    )  # fmt: skip
    client: Any = None
    open_cache(extract_on_cluster(client, spec))
    size = CacheSize(num_samples=90, num_shards=5, ids_bytes=8 * 90, is_ragged=True)
    assert counted == as_counts(shared_requests(size, 0, 1, 3) + Requests(get=-1))


STORE = StoreProbe(
    shard_rows=8192, shard_bytes=8192 * 2000, write_seconds=0.5, write_processor_seconds=0.1, read_seconds=0.25,
    record_seconds=0.001, record_bytes=90_000,
)  # fmt: skip
PROBE = Probe(
    encoder="net", modality="image", verdict="", device="cpu", num_processes=2, num_cores=2, num_rows=1000, seconds=10,
    load=Spent(3, 4), first_seconds=1, processor_seconds=0.02, prepare_seconds=0.015, encode_seconds=0.005, failed=0,
    stamp_seconds=1e-5, digest_seconds=2e-5, digest_processor_seconds=3e-5, input_bytes=50_000, manifest_seconds=3e-6,
    rows_per_sample=1, tars_per_sample=0, id_bytes=12, store=STORE,
)  # fmt: skip


def test_the_seconds_of_one_machine_in_closed_form() -> None:
    plan = EncoderPlan(probe=PROBE, num_samples=81_920, imports=Spent(5, 6))
    assert (plan.num_rows, plan.num_shards) == (81_920, 10)
    start = 5 + 3 + 1 + 81_920 * (3e-6 + 1e-5) + 20 * 0.001
    commits = 81_920 * (0.1 / 8192 + 3e-5)  # of the processor
    encode = 81_920 / 100 + 0.9 * commits / (100 * 0.02)
    last = 0.5 + 8192 * 2e-5
    assert plan.start_seconds == pytest.approx(start)
    assert plan.encode_seconds == pytest.approx(encode)
    assert plan.write_seconds == pytest.approx(last)
    assert plan.seconds == pytest.approx(start + encode + last + 10 * 0.001)
    assert plan.processor_hours == pytest.approx((6 + 4 + 81_920 * 0.02 + commits) / 3600)
    assert (plan.feature_bytes, plan.record_bytes, plan.input_bytes) == (81_920 * 2000, 10 * 90_000, 81_920 * 50_000)
    assert plan.shares()["decoding"] == pytest.approx(0.75 * encode / plan.seconds)
    slow = EncoderPlan(probe=replace(PROBE, store=replace(STORE, write_seconds=400)), num_samples=81_920)
    shard = 400 + 8192 * 2e-5  # two are written at a time, while others are encoded
    assert slow.write_seconds == pytest.approx(shard + 9 * shard / 2 - slow.encode_seconds)


def test_machines_share_out_whole_shards() -> None:
    one_shard = 8192 / 100 + 1 + 0.5 + 8192 * (2e-5 + 2e-5)
    for num_machines, rounds in ((2, 5), (3, 4), (10, 1), (64, 1)):
        plan = EncoderPlan(probe=PROBE, num_samples=81_920, num_machines=num_machines)
        assert plan.encode_seconds + plan.write_seconds == pytest.approx(rounds * one_shard)
        assert plan.machine_hours == pytest.approx(num_machines * plan.seconds / 3600)
    assert "--shard-rows 4096" in EncoderPlan(probe=PROBE, num_samples=81_920, num_machines=64).sentence()
    assert "--machines 4" in EncoderPlan(probe=PROBE, num_samples=8_192_000, num_machines=2).sentence()
    assert "decoding takes 75% of the time of net" in EncoderPlan(probe=PROBE, num_samples=8_192_000).sentence()


def test_on_a_gpu_the_slower_side_bounds() -> None:
    gpu = replace(PROBE, device="cuda", num_processes=16, num_cores=16, prepare_seconds=0.08, encode_seconds=0.01)
    assert EncoderPlan(probe=gpu, num_samples=81_920).shares()["decoding"] == 0
    assert EncoderPlan(probe=replace(gpu, prepare_seconds=0.32), num_samples=81_920).shares()["the encoder"] == 0


def test_money_is_told_for_what_has_a_price() -> None:
    plan = EncoderPlan(probe=PROBE, num_samples=81_920, num_machines=2)
    assert money([plan], Prices()) == {}
    prices = Prices(machine_hour=3, gb_month=0.02, put_thousand=0.005, get_thousand=0.0004, egress_gb=0.09)
    costs = money([plan, plan], prices)
    stored = 2 * (81_920 * 2000 + 900_000) / 1e9
    size = CacheSize(num_samples=81_920, num_shards=10, ids_bytes=12 * 81_920)
    requests = shared_requests(size, plan.seconds, 2, 3)
    assert costs["machines"] == pytest.approx(2 * 3 * plan.machine_hours)
    assert costs["features and records, a month"] == pytest.approx(0.02 * stored)
    assert costs["features out of their store, each time"] == pytest.approx(0.09 * stored)
    assert costs["PUT and LIST requests"] == pytest.approx(2 * 0.005 * (requests.put + requests.list) / 1000)
    assert costs["GET and HEAD requests"] == pytest.approx(2 * 0.0004 * requests.get / 1000)


def test_claims_are_renewed_five_times_in_a_lease(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIFFALIGN_LEASE_SECONDS", "60")
    assert renewals(3600) == Requests(put=300, get=300)


def test_batches_of_a_trial_are_those_of_the_extraction_and_even_from_the_beginning(tmp_path: Path) -> None:
    manifest = write_texts(tmp_path, 900)
    options = ExtractOptions(workers=0, shard_rows=512, progress=False)
    task = plan_extraction(manifest, "random_projection", {"modality": "text"}, tmp_path, "float16", False, options)
    batches = spread_batches(task, 16)
    spans = [range(start, min(start + 512, len(task.inputs))) for start in range(0, len(task.inputs), 512)]
    real = [rows for span in spans for rows in task.batches(span)]
    assert {tuple(rows) for rows in batches} <= {tuple(rows) for rows in real}
    assert len({tuple(rows) for rows in batches}) == len(batches)
    for stop in (16, 32, 128):
        middles = np.sort([rows.mean() for rows in batches[:stop]]) / len(task.inputs)
        assert np.abs(middles - (np.arange(stop) + 0.5) / stop).max() < 0.15


def test_a_plan_leaves_the_home_as_it_was(
    tiny_manifest: Manifest,
    tiny_home: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    home = Path(shutil.copytree(tiny_home, tmp_path / "home"))
    files = {file: file.stat().st_mtime_ns for file in home.rglob("*")}
    command = ["plan", "tiny", "--encoder", "random_projection", "--seconds", "1", "--home", str(home), "--rows", "4000"]
    assert run([*command, "--price-machine", "2", "--json"], monkeypatch) == 0
    facts = json.loads(capsys.readouterr().out)
    (encoder,) = facts["encoders"]
    assert (encoder["rows"], encoder["shards"]) == (4000, 1)
    assert encoder["gigabytes"]["features"] == pytest.approx(4000 * 32 * 2 / 1e9, rel=0.05)
    sizes = [file.stat().st_size for file in tiny_manifest.media_root.iterdir()]
    assert encoder["gigabytes"]["inputs"] == pytest.approx(4000 * np.mean(sizes) / 1e9, rel=0.01)
    assert facts["money"] == {"machines": pytest.approx(2 * facts["total"]["machine_hours"])}
    assert run([*command, "--set", "modality=text", "--machines", "3"], monkeypatch) == 0
    printed = capsys.readouterr().out
    assert "GB of commit records" in printed
    assert "takes" in printed.splitlines()[-1]
    assert {file: file.stat().st_mtime_ns for file in home.rglob("*")}.keys() == files.keys()


def test_a_plan_leaves_nothing_in_a_bucket(
    tiny_home: Path, counted: Counter[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["plan", "tiny", "--encoder", "random_projection", "--seconds", "1", "--home", str(tiny_home), "--json"]
    assert run([*command, "--caches", "s3://counted/caches"], monkeypatch) == 0
    assert json.loads(capsys.readouterr().out)["encoders"][0]["probe"]["store"]["write_seconds"] > 0
    assert counted["put"] > 3 * 2
    place = parse_place("s3://counted")
    assert stores.store_of(place).list(place) == []
