"""Dask workers that have nothing in common but the scheduler's address and an object store make the cache of one process."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from dask.distributed import Client
from helpers.fault_cases import cache_content, extract_command, extract_texts, write_texts
from helpers.s3_endpoint import Endpoint, use_endpoint

from pipeline.cache.housekeeping import copy
from pipeline.extraction.delivery import Delivery, replace_paths
from pipeline.runtime import stores
from pipeline.runtime.errors import UserError
from pipeline.runtime.places import Address, parse_place
from pipeline.runtime.stores import store_of

NUM_WORKERS = 4


@pytest.fixture(scope="module")
def endpoint() -> Iterator[Endpoint]:
    with use_endpoint() as endpoint:
        yield endpoint


def test_a_worker_gets_the_files_of_the_client(endpoint: Endpoint, tmp_path: Path) -> None:
    write_texts(tmp_path, 3)
    model = tmp_path / "model"
    (model / "deep").mkdir(parents=True)
    for name in ("a.bin", "deep/b.bin"):
        (model / name).write_bytes(name.encode())
    (tmp_path / "w.pt").write_bytes(b"weights")
    (model / "large.bin").write_bytes(np.random.default_rng(0).bytes(2 * stores.OBJECT_PIECE_BYTES + 1))  # in three parts
    settings: dict[str, Any] = {"model": str(model), "weights": str(tmp_path / "w.pt"), "width": "8"}
    caches = parse_place("s3://bucket/delivery")
    assert isinstance(caches, Address)
    sent = Delivery.send(caches, tmp_path, "texts", settings)
    assert Delivery.send(caches, tmp_path, "texts", settings) == sent
    home, paths = sent.receive()
    for file in (tmp_path / "manifests").iterdir():
        assert file.suffix == ".csv" or (home / "manifests" / file.name).read_bytes() == file.read_bytes()
    here = replace_paths(settings, paths)
    assert here["width"] == "8"
    assert not here["model"].startswith(str(tmp_path))
    assert (Path(here["model"]) / "deep" / "b.bin").read_bytes() == b"deep/b.bin"
    assert Path(here["weights"]).read_bytes() == b"weights"
    assert (Path(here["model"]) / "large.bin").read_bytes() == (model / "large.bin").read_bytes()
    assert replace_paths(here, {here: there for there, here in paths.items()}) == settings
    (file,) = [found for found in store_of(caches).list(caches) if store_of(caches).get(found.place) == b"weights"]
    store_of(caches).put(file.place, b"other weights")
    Path(here["weights"]).unlink()
    with pytest.raises(UserError, match="is damaged"):
        sent.receive()


def test_paths_are_replaced_as_whole_names() -> None:
    paths = {"/w/clip": "/w/clip2", "/w/clip2/w.pt": "/b", "/w/clip/é.pt": "/c"}
    value = {
        "model": "/w/clip",
        "/w/clip": ["/w/clip2", "/w/clip2/w.pt", "/w/clip/é.pt", "/w/clip.old", "/w/clip-l", "/v/w/clip", 8, None],
        "command": "extract --set model=/w/clip --weights '/w/clip2/w.pt' file:///w/clip/deep\n/w/clip",
    }
    assert replace_paths(value, paths) == {
        "model": "/w/clip2",
        "/w/clip2": ["/w/clip2", "/b", "/c", "/w/clip.old", "/w/clip-l", "/v/w/clip", 8, None],
        "command": "extract --set model=/w/clip2 --weights '/b' file:///w/clip2/deep\n/w/clip2",
    }
    assert replace_paths(value, {}) == value


@pytest.mark.exhaustive
def test_workers_that_share_nothing_make_the_cache_of_one_process(endpoint: Endpoint, tmp_path: Path) -> None:
    """Scheduler, workers and client are started as a user does; one worker is killed on the way."""
    manifest = write_texts(tmp_path / "home", 340)
    on_disk = extract_texts(manifest, tmp_path / "home")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{free.getsockname()[1]}"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("DIFFALIGN_")}
    environment |= {"DIFFALIGN_LEASE_SECONDS": "2"}

    def start(name: str, *arguments: str) -> subprocess.Popen[bytes]:
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        process = subprocess.Popen([sys.executable, "-m", *arguments], cwd=folder, env=environment)
        stack.callback(process.kill)
        return process

    with ExitStack() as stack:
        start("scheduler", "dask", "scheduler", "--host", "127.0.0.1", "--port", address.rpartition(":")[2], "--no-dashboard")
        workers = [
            start(f"worker-{n}", "dask", "worker", address, "--nthreads", "1", "--no-dashboard", "--no-nanny")
            for n in range(NUM_WORKERS)
        ]
        with Client(address, timeout=120) as client:
            client.wait_for_workers(NUM_WORKERS, timeout=300)
        options = ["--caches", "s3://bucket/nothing", "--scheduler", address]
        extraction = start("client", "pipeline", *extract_command(tmp_path / "home", *options))
        while extraction.poll() is None and b"/commits/00001" not in endpoint.ask("GET", "/bucket?list-type=2&prefix=nothing"):
            pass
        workers[0].kill()
        assert extraction.wait(600) == 0
    copied = copy(parse_place("s3://bucket/nothing") / "texts" / on_disk.name, tmp_path / "copied")
    assert isinstance(copied, Path)
    assert isinstance(on_disk, Path)
    assert cache_content(copied) == cache_content(on_disk)
