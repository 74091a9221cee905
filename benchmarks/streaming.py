"""Compare how fast training reads windows of a bucket with how fast its endpoint gives them; results are in RESULTS.md.

    python benchmarks/streaming.py [--rates 25,100,400,0] [--shards 24]

The endpoint is a process of its own that answers requests for ranges of files, and sends no more than a rate in MiB/s (0: no
limit). Its own throughput is that of as many connections that read the same bytes and throw them away, in turns with the
windows; the library is timed likewise.
"""

from __future__ import annotations

import argparse
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from email.utils import formatdate
from pathlib import Path

import numpy as np
import torch
from stores import open_writer, spread

from pipeline.cache import Cache, layout, open_cache
from pipeline.cache.shards import REQUEST_BYTES
from pipeline.cache.streaming import StreamedFeatures, open_split
from pipeline.data.manifest import Manifest
from pipeline.data.sample_columns import SampleColumns
from pipeline.runtime.places import parse_place
from pipeline.runtime.stores import REQUESTS_IN_FLIGHT, store_of
from pipeline.types import Sample

WIDTH = 768
WINDOW = 2**14  # samples
BATCH_SIZE = 128
ROUNDS = 5
SENT_BYTES = 2**18  # at a time, under a limit
CREDENTIALS = {"AWS_ACCESS_KEY_ID": "benchmark", "AWS_SECRET_ACCESS_KEY": "benchmark", "AWS_REGION": "us-east-1"}


class Limit:
    """Lets through no more than a rate, of all connections together."""

    def __init__(self, bytes_per_second: float) -> None:
        self.rate, self.free_at, self.lock = bytes_per_second, time.monotonic(), threading.Lock()

    def wait(self, num_bytes: int) -> None:
        """Return when so many bytes may be sent."""
        with self.lock:
            self.free_at = max(self.free_at, time.monotonic() - 0.01) + num_bytes / self.rate
            free_at = self.free_at
        time.sleep(max(0.0, free_at - time.monotonic()))


def serve(folder: Path, mebibytes: float) -> None:
    """Answer GET and HEAD of /bucket/<file>, also of a range, until the process ends; print the port first."""
    limit = Limit(mebibytes * 2**20) if mebibytes else None
    with socket.create_server(("127.0.0.1", 0), backlog=128) as server:
        print(server.getsockname()[1], flush=True)
        while True:
            connection, _ = server.accept()
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            threading.Thread(target=answer, args=(connection, folder, limit), daemon=True).start()


def answer(connection: socket.socket, folder: Path, limit: Limit | None) -> None:
    """Answer the requests of a connection."""
    with connection, connection.makefile("rb") as lines:
        while request := lines.readline():
            method, target, _ = request.decode().split()
            headers = {}
            while line := lines.readline().strip().decode():
                name, _, value = line.partition(":")
                headers[name.lower()] = value.strip()
            file = folder / target.partition("?")[0].removeprefix("/bucket/")
            if not file.is_file():
                connection.sendall(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n")
                continue
            with file.open("rb") as opened:
                send_file(connection, opened.fileno(), method, headers.get("range", ""), limit)


def send_file(connection: socket.socket, file: int, method: str, wanted: str, limit: Limit | None) -> None:
    """Send a file, or "bytes=first-last" of it."""
    status = os.stat(file)
    first, _, last = wanted.removeprefix("bytes=").partition("-")
    start, stop = int(first or 0), min(status.st_size, int(last or status.st_size) + 1)
    head = [
        f"HTTP/1.1 {'206 Partial Content' if wanted else '200 OK'}",
        f"Content-Length: {stop - start}",
        f'ETag: "{status.st_mtime_ns}"',
        f"Last-Modified: {formatdate(status.st_mtime, usegmt=True)}",
        *([f"Content-Range: bytes {start}-{stop - 1}/{status.st_size}"] if wanted else []),
    ]
    connection.sendall("\r\n".join([*head, "", ""]).encode())
    while method == "GET" and start < stop:
        num_bytes = min(stop - start, SENT_BYTES if limit else stop)
        if limit:
            limit.wait(num_bytes)
        start += os.sendfile(connection.fileno(), file, start, num_bytes)


@contextmanager
def endpoint(folder: Path, mebibytes: float) -> Iterator[int]:
    """Run an endpoint for the files of a folder, and yield its port."""
    command = [sys.executable, __file__, "--serve", str(folder), "--rates", str(mebibytes)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        try:
            yield int(process.stdout.readline())
        finally:
            process.kill()


def ranges_of(files: list[tuple[str, int]]) -> list[tuple[str, int, int]]:
    """Return (file, start, stop) of the requests that read whole files."""
    return [(name, start, min(start + REQUEST_BYTES, size)) for name, size in files for start in range(0, size, REQUEST_BYTES)]


def read_with_library(files: list[tuple[str, int]]) -> None:
    """Read files in ranges with the library that the cache uses, and throw them away."""
    bucket = parse_place("s3://bucket")
    with ThreadPoolExecutor(REQUESTS_IN_FLIGHT) as threads:
        list(
            threads.map(lambda each: store_of(bucket).get_range(bucket / each[0], each[1], each[2] - each[1]), ranges_of(files))
        )


def read_plainly(port: int, files: list[tuple[str, int]]) -> None:
    """Read files in ranges over as many connections as the cache uses, and throw them away."""
    ranges = ranges_of(files)

    def read(number: int) -> None:
        buffer = memoryview(bytearray(2**20))
        with socket.create_connection(("127.0.0.1", port)) as connection:
            for name, start, stop in ranges[number::REQUESTS_IN_FLIGHT]:
                connection.sendall(
                    f"GET /bucket/{name} HTTP/1.1\r\nHost: x\r\nRange: bytes={start}-{stop - 1}\r\n\r\n".encode()
                )
                got = b""
                while b"\r\n\r\n" not in got:
                    got += connection.recv(2**16)
                left = stop - start - len(got.partition(b"\r\n\r\n")[2])
                while left:
                    left -= connection.recv_into(buffer[:left])

    with ThreadPoolExecutor(REQUESTS_IN_FLIGHT) as threads:
        list(threads.map(read, range(REQUESTS_IN_FLIGHT)))


def make_cache(home: Path, num_shards: int) -> tuple[Manifest, Cache]:
    """Write a cache of random features, and return it with its manifest."""
    ids = [f"{row:08d}" for row in range(num_shards * layout.SHARD_ROWS)]
    writer = open_writer(home, "streamed", (WIDTH,), ids)
    block = np.random.default_rng(0).standard_normal((layout.SHARD_ROWS, WIDTH), dtype=np.float32)
    writer.finish(
        {shard: writer.commit(shard, block, [], seconds=1.0, batch_size=1, device="cpu") for shard in range(writer.num_shards)}
    )
    samples = SampleColumns.of(Sample(id, "train", Path(f"{id}.png"), (), (0,), "") for id in ids)
    meta = {"media_type": "image", "text": {"kind": "", "aggregate": "mean", "sep": ""}}
    return Manifest("bench", "single", ("only",), samples, meta, home), open_cache(writer.path)


def compare(manifest: Manifest, cache: Cache, home: Path, mebibytes: float) -> None:
    """Print the rate of the windows over that of the endpoint."""
    files = [(str(file.relative_to(home)), file.stat().st_size) for file in sorted((cache.path / "features").rglob("c/*/0"))]
    num_bytes = sum(size for _, size in files)
    with endpoint(home, mebibytes) as port:
        os.environ.update({**CREDENTIALS, "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}"})
        remote = open_cache(parse_place("s3://bucket") / str(cache.path.relative_to(home)))
        source = open_split(manifest, {"image": remote}, "train", torch.device("cpu"), "mean", WINDOW)
        assert isinstance(source, StreamedFeatures)
        ours: list[float] = []
        theirs: list[float] = []
        library: list[float] = []
        processor: list[float] = []
        for number in range(ROUNDS):
            theirs.append(seconds(lambda: read_plainly(port, files))[0])
            library.append(theirs[-1] / seconds(lambda: read_with_library(files))[0])
            wall, cpu = seconds(lambda number=number: [None for _ in source.windows(BATCH_SIZE, 0, number)])
            ours.append(wall)
            processor.append(cpu / num_bytes * 2**30)
    ratios = [plain / own for own, plain in zip(ours, theirs, strict=True)]
    rates = [num_bytes / each / 2**20 for each in theirs]
    limit = f"{mebibytes:g} MiB/s" if mebibytes else "no limit"
    print(
        f"streaming, endpoint with {limit}: ratio {spread(ratios, '.2f')} (wanted >= 0.8); endpoint alone "
        f"{statistics.median(rates):.0f} MiB/s; the library alone {spread(library, '.2f')}; processor seconds a GiB "
        f"{spread(processor, '.2f')}",
        flush=True,
    )


def seconds(function: Callable[[], object]) -> tuple[float, float]:
    """Return the wall time and the processor time of a call."""
    started, cpu = time.perf_counter(), time.process_time()
    function()
    return time.perf_counter() - started, time.process_time() - cpu


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rates", default="25,100,400,0", help="limits of the endpoint in MiB/s; 0: none")
    parser.add_argument("--shards", type=int, default=24)
    parser.add_argument("--serve", default="", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.serve:
        serve(Path(given.serve), float(given.rates))
    with tempfile.TemporaryDirectory() as folder:
        manifest, cache = make_cache(Path(folder), given.shards)
        for rate in given.rates.split(","):
            compare(manifest, cache, Path(folder), float(rate))


if __name__ == "__main__":
    main()
