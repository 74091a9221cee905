"""Caches in a bucket, and processes that fill them and may be killed."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any

from helpers.fault_cases import cache_content, extract_texts
from helpers.s3_endpoint import Endpoint
from pipeline.cache.housekeeping import copy
from pipeline.cache.writer import Writer
from pipeline.commands import app as cli
from pipeline.data.manifest import Manifest
from pipeline.data.manifest_files import read_manifest
from pipeline.runtime.places import Address, caches_at, parse_place
from pipeline.runtime.stores import store_of

NUM_SHARDS = 5  # of a cache that is extracted again and again


def content_of(place: Address, folder: Path) -> dict[str, bytes]:
    """Return the objects of a cache as `cache_content` returns its files; there are no others."""
    copied = copy(place, folder)
    assert isinstance(copied, Path)
    names = {str(found.place).removeprefix(f"{place}/") for found in store_of(place).list(place)}
    assert names == {file.relative_to(copied).as_posix() for file in copied.rglob("*") if file.is_file()} - {".lock"}
    return cache_content(copied)


def fresh_processes() -> Any:
    """Return what starts processes that have imported much, and have used no object store."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["pipeline.extraction.distributed", "pipeline.encoders.random_projection"])
    return context


def run_command(arguments: list[str], environment: dict[str, str]) -> None:
    """Run `diffalign` in a child process."""
    os.environ.update(environment)
    sys.argv = ["diffalign", *arguments]
    cli.main()


def extract_remotely(home: Path, caches: str, environment: dict[str, str]) -> None:
    """What a child process does that may be killed: it pauses after each shard, so that it does not end before."""
    os.environ.update(environment)
    commit = Writer.commit

    def commit_and_pause(self: Writer, *arguments: Any, **named: Any) -> Any:
        result = commit(self, *arguments, **named)
        time.sleep(0.3)
        return result

    Writer.commit = commit_and_pause
    with caches_at(caches):
        extract_texts(read_manifest(home, "texts"), home)


def check_kills(rounds: range, texts: Manifest, on_disk: Path, endpoint: Endpoint, tmp_path: Path) -> None:
    """Kill an extraction again and again at random moments, until one comes to its end."""
    context = fresh_processes()
    environment = {**endpoint.environment, "DIFFALIGN_LEASE_SECONDS": "1"}
    endpoint.disturb(0.1)
    for number in rounds:
        caches, rng, num_killed = f"s3://bucket/killed-{number}", random.Random(number), 0
        is_done = False
        while not is_done:
            child = context.Process(target=extract_remotely, args=(texts.media_root, caches, environment))
            child.start()
            wanted = min(num_killed + 1, NUM_SHARDS - 1)
            while child.is_alive() and num_commits(endpoint, f"killed-{number}") < wanted and num_killed < NUM_SHARDS - 1:
                time.sleep(0.02)
            child.join(rng.uniform(0, 0.2) if num_killed < NUM_SHARDS - 1 else 120)
            child.kill()
            child.join()
            assert child.exitcode in (0, -signal.SIGKILL)
            num_killed, is_done = num_killed + 1, child.exitcode == 0
        assert num_killed > 1
        place = parse_place(caches) / "texts" / on_disk.name
        assert isinstance(place, Address)
        assert content_of(place, tmp_path / str(number)) == cache_content(on_disk)
    endpoint.disturb(0)


def num_commits(endpoint: Endpoint, prefix: str) -> int:
    listing = endpoint.ask("GET", f"/bucket?list-type=2&prefix={prefix}/").decode()
    return listing.count("/commits/0")
