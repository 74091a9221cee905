"""An S3 endpoint on the loopback: moto's server, with a layer in front of it that can disturb requests.

moto checks whether an object is absent and writes it in two steps, so the layer lets one conditional request in at a time.
"""

from __future__ import annotations

import io
import os
import random
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

CREDENTIALS = {"AWS_ACCESS_KEY_ID": "key-of-a-test", "AWS_SECRET_ACCESS_KEY": "secret-of-a-test", "AWS_REGION": "us-east-1"}
FAULTS = ("delay", "drop", "lose", "repeat", "refuse")
ADMIN_PATH = "/-faults"  # POST with the share of requests to disturb


class DisturbedApp:
    """A WSGI application that answers some requests late, twice, with "slow down", or not at all before or after its work."""

    def __init__(self, app: Any) -> None:
        self.app, self.share, self.rng, self.lock = app, 0.0, random.Random(0), threading.Lock()

    def __call__(self, environ: dict[str, Any], start_response: Any) -> Any:
        body = environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
        if environ["PATH_INFO"] == ADMIN_PATH:
            self.share = float(body)
            start_response("200 OK", [("Content-Length", "0")])
            return []
        is_of_a_test = "urllib" in environ.get("HTTP_USER_AGENT", "")
        with self.lock:
            fault = self.rng.choice(FAULTS) if self.rng.random() < self.share and not is_of_a_test else ""
        if fault == "delay":
            time.sleep(0.1)
        if fault == "refuse":
            start_response("503 Slow Down", [("Content-Length", "0")])
            return []
        answer: list[Any] = []
        for _ in range({"drop": 0, "repeat": 2}.get(fault, 1)):
            answer = self._ask(environ, body)
        if fault in ("drop", "lose"):
            environ["werkzeug.socket"].shutdown(socket.SHUT_RDWR)
            raise ConnectionError(fault)
        start_response(*answer[:2])
        return answer[2:]

    def _ask(self, environ: dict[str, Any], body: bytes) -> list[Any]:
        """Return status, headers and the content of the answer."""
        answer: list[Any] = []
        request = {**environ, "wsgi.input": io.BytesIO(body)}
        with self.lock if environ.keys() & {"HTTP_IF_NONE_MATCH", "HTTP_IF_MATCH"} else nullcontext():
            content = b"".join(self.app(request, lambda *head, **_: answer.extend(head[:2])))
        return [*answer, content]


class Endpoint:
    """A running endpoint with an empty bucket."""

    def __init__(self, port: int) -> None:
        self.url = f"http://127.0.0.1:{port}"

    @property
    def environment(self) -> Mapping[str, str]:
        """What lets a process use the endpoint."""
        return {**CREDENTIALS, "AWS_ENDPOINT_URL": self.url}

    def disturb(self, share: float) -> None:
        """Disturb this share of the requests, 0..1."""
        self.ask("POST", ADMIN_PATH, str(share).encode())

    def ask(self, method: str, path: str, data: bytes | None = None) -> bytes:
        """Send a request without the library under test, and return the answer."""
        request = urllib.request.Request(f"{self.url}{path}", data, method=method)
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.read()


@contextmanager
def run_endpoint() -> Iterator[Endpoint]:
    """Start an endpoint with the bucket `bucket` in a process of its own, which ends with the block."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = subprocess.Popen([sys.executable, str(Path(__file__)), str(port)], stderr=subprocess.DEVNULL)
    endpoint = Endpoint(port)
    try:
        deadline = time.monotonic() + 120
        while True:
            try:
                endpoint.ask("PUT", "/bucket")
                break
            except OSError:
                assert time.monotonic() < deadline, "the endpoint does not start"
                assert process.poll() is None, "the endpoint has ended"
                time.sleep(0.05)
        yield endpoint
    finally:
        process.kill()
        process.wait()


@contextmanager
def use_endpoint() -> Iterator[Endpoint]:
    """Start an endpoint, and let this process use it."""
    earlier = dict(os.environ)
    with run_endpoint() as endpoint:
        os.environ.update(endpoint.environment)
        try:
            yield endpoint
        finally:
            os.environ.clear()
            os.environ.update(earlier)


@contextmanager
def use_server_that_answers(status: str, code: str) -> Iterator[str]:
    """Let this process use a server that answers all requests so, with XML that has the code; yield its address."""

    def app(environ: dict[str, Any], start_response: Any) -> list[bytes]:
        content = f'<?xml version="1.0"?><Error><Code>{code}</Code><Message>a long story</Message></Error>'.encode()
        start_response(status, [("Content-Type", "application/xml"), ("Content-Length", str(len(content)))])
        return [content]

    with use_server_of(app) as address:
        yield address


@contextmanager
def use_server_of(app: Any) -> Iterator[str]:
    """Let this process use a server whose answers a WSGI application gives; yield its address."""
    from werkzeug.serving import make_server

    server = make_server("127.0.0.1", 0, app, threaded=True)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    earlier = dict(os.environ)
    url = f"http://127.0.0.1:{server.port}"
    os.environ.update(CREDENTIALS, AWS_ENDPOINT_URL=url)
    try:
        yield url
    finally:
        os.environ.clear()
        os.environ.update(earlier)
        server.shutdown()
        thread.join()


def serve(port: int) -> None:
    """Serve until the process is killed."""
    from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import make_server

    app = DisturbedApp(DomainDispatcherApplication(create_backend_app))
    make_server("127.0.0.1", port, app, threaded=True).serve_forever()


if __name__ == "__main__":
    os.environ.update(CREDENTIALS)
    serve(int(sys.argv[1]))
