"""Errors of object stores, and of the environment that names them, are one line with the remedy and without secrets."""

from __future__ import annotations

import math
import re
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any

import pytest
from helpers.s3_endpoint import CREDENTIALS, use_server_of, use_server_that_answers
from zarr import open_group

from pipeline.cache import info
from pipeline.runtime import connections, stores
from pipeline.runtime.errors import UserError
from pipeline.runtime.places import Address, parse_place
from pipeline.runtime.stores import store_of, zarr_source

MOMENT = "Sat, 28 Nov 2026 12:00:00 GMT"
REQUESTS: list[Callable[[Address], Any]] = [
    lambda place: store_of(place).get(place),
    lambda place: store_of(place).list(place),
    lambda place: store_of(place).children(place),
    lambda place: store_of(place).put(place, b"x"),
    lambda place: store_of(place).put_if_absent(place, b"x"),
    lambda place: store_of(place).delete(place),
]
ANSWERS = {
    "404 Not Found": (
        "NoSuchBucket",
        "has no bucket s3://mine: make it, or correct its name or AWS_ENDPOINT_URL and AWS_REGION",
    ),
    "403 Forbidden": (
        "AccessDenied",
        r"refuses access to s3://mine \(AccessDenied\): AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_",
    ),
    "400 Bad Request": (
        "Malformed",
        r"answers Malformed; are the name of s3://mine and AWS_ENDPOINT_URL and AWS_REGION right",
    ),
    "503 Slow Down": (
        "SlowDown",
        r"does not answer \(SlowDown\); when it does, the same command goes on from here; if it never",
    ),
}


@pytest.mark.parametrize("status", ANSWERS)
def test_what_is_wrong_with_a_store_is_one_line_with_the_remedy(
    status: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(connections, "RETRY_SECONDS", 0.1)
    monkeypatch.setattr(stores, "RETRY_SECONDS", 0.1)
    code, message = ANSWERS[status]
    place: Any = parse_place("s3://mine/x")
    with use_server_that_answers(status, code) as server:
        zarr = [] if status.startswith("404") else [lambda place: open_group(zarr_source(place), mode="r")]
        for request in [*REQUESTS, *zarr]:
            with pytest.raises(OSError, match=message) as caught:
                request(place)
            assert server in str(caught.value)
            assert str(caught.value.filename).startswith(str(place))
            assert isinstance(caught.value, TimeoutError) == status.startswith("503")
            assert "goes on from here" not in str(caught.value) or status.startswith("503")
            told = f"{''.join(traceback.format_exception(caught.value))} {caplog.text}"
            assert not re.search("Debug source|<|long story", told.replace("<locals>", "").replace("<lambda>", ""))
            assert not any(value in told for name, value in CREDENTIALS.items() if name != "AWS_REGION")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "performing GET https://me:hidden@host:9/mine/x in 61.2s, after 20 retries - HTTP error",
            "https://host:9 does not an.* 61",
        ),
        ("performing GET http://me:hidden@host/mine/x in 1ms - Server returned", "http://host gives no usable answer; are"),
        (
            "performing GET http://me:hidden@10.0.0.1/role?token=hidden in 1ms - status code: 403",
            "s3://mine needs credentials: set",
        ),
        ("performing POST REDACTED in 1ms - HTTP error: builder error", "s3://mine needs credentials: set"),
    ],
)
def test_no_message_repeats_what_may_be_a_secret(text: str, message: str) -> None:
    place: Any = parse_place("s3://mine/x")
    told = str(connections._describe(place, Exception(text)))
    assert re.search(message, told)
    assert "hidden" not in told


@pytest.mark.parametrize(
    ("address", "text", "message"),
    [
        (
            "az://mine/x",
            "GET REDACTED in 1ms - HTTP error: ConnectionRefused",
            "the store does not answer (connection refused)",
        ),
        ("az://mine/x", "GET REDACTED in 1ms - status code: 403", "the store refuses access to az://mine (403)"),
        ("s3://data/x", "GET http://1.2.3.4/latest/meta-data/iam/ in 1ms - status code: 404", "s3://data needs credentials"),
        ("gs://a/x", "GET http://metadata/computeMetadata/v1/a in 1ms - HTTP error", "gs://a needs credentials"),
        ("s3://a/x", "GET https://a.host/latest/x in 1ms - status code: 403", "https://a.host refuses access to s3://a (403)"),
        ("s3://a/x", "GET https://own.org/?list-type=2 in 1ms - status code: 503", "https://own.org does not answer (503)"),
        (
            "s3://a/x",
            "GET http://host/a in 1ms - redirect without LOCATION",
            "http://host has s3://a in another region: correct",
        ),
    ],
)
def test_errors_of_the_bucket_and_of_who_gives_credentials_are_told_apart(
    address: str, text: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "https://own.org")
    place: Any = parse_place(address)
    assert message in str(connections._describe(place, Exception(f"performing {text}")))


def test_a_server_that_is_away_is_asked_for_the_whole_time(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in CREDENTIALS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("obstore.store.from_url", lambda bucket, **options: options["retry_config"])
    config = connections.connect("s3://away", "")
    assert config["max_retries"] * config["backoff"]["init_backoff"] > config["retry_timeout"]  # none of the pauses is shorter


def test_a_server_that_is_away_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in CREDENTIALS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(connections, "RETRY_SECONDS", 1.0)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    place: Any = parse_place("s3://away/x")
    start = time.monotonic()
    with pytest.raises(TimeoutError, match=r"http://127.0.0.1:9 does not answer \(connection refused\), asked for \d seconds"):
        store_of(place).list(place)
    assert 1 <= time.monotonic() - start < 20


def test_a_wait_for_a_store_is_told_once(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    patience = connections._Patience()
    monkeypatch.setattr(connections, "_PATIENCE", patience)
    monkeypatch.setattr(connections, "SLOW_SECONDS", 0.1)
    place: Any = parse_place("s3://away/slow")
    for _ in range(2):
        with connections.labelled(place):
            time.sleep(0.5)
    patience._told_at = -math.inf
    with connections.labelled(place):  # is answered at once
        pass
    time.sleep(0.5)
    (told,) = (record.message for record in caplog.records)
    assert told == "s3://away/slow: a request takes longer than 0 s; one that fails is repeated"


def test_a_request_is_sent_again_if_a_part_of_an_error_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "RETRY_PAUSE", 0.0)
    asked: list[str] = []

    def app(environ: dict[str, Any], start_response: Any) -> list[bytes]:
        asked.append(environ["PATH_INFO"])
        is_whole = asked.count(asked[-1]) == 3
        content = b'{"zarr_format": 3, "node_type": "group"}'
        headers = [("Content-Length", str(len(content))), ("ETag", '"1"'), ("Last-Modified", MOMENT)]
        start_response("200 OK" if is_whole else "404 Not Found", headers)
        return [content if is_whole else content[:9]]

    with use_server_of(app):
        place: Any = parse_place("s3://mine/x")
        assert b"group" in store_of(place).get(place)
        assert asked == ["/mine/x"] * 3
        assert open_group(zarr_source(place), mode="r", zarr_format=3).metadata.node_type == "group"
        assert asked.count("/mine/x/zarr.json") == 3
        monkeypatch.setattr(connections, "RETRY_SECONDS", 0.0)
        with pytest.raises(TimeoutError, match=r"does not answer \(no connection\); when"):
            store_of(place / "y").get(place / "y")
        assert asked.count("/mine/x/y") == 1


def test_credentials_are_missed_before_anything_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in CREDENTIALS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    place: Any = parse_place("s3://without/x")
    with pytest.raises(UserError, match="s3://without needs credentials: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY in"):
        info(place)
    monkeypatch.delenv("AWS_EC2_METADATA_DISABLED")
    monkeypatch.setenv("AWS_METADATA_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(connections, "RETRY_SECONDS", 0.1)
    with pytest.raises(OSError, match="s3://without needs credentials: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY in"):
        info(place)


@pytest.mark.parametrize("variable", ["AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT"])
@pytest.mark.parametrize(
    "given",
    ["http://user:hidden@127.0.0.1:1", "http://127.0.0.1:1/?hidden", "http://hid den", "hidden", "http://127.0.0.1:hidden"],
)
def test_a_wrong_endpoint_is_refused_and_not_repeated(variable: str, given: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(variable, given)
    with pytest.raises(UserError, match=r"AWS_ENDPOINT_URL must be http://host:port") as caught:
        store_of(parse_place("s3://wrong-endpoint/x"))
    assert not re.search("hid ?den", "".join(traceback.format_exception(caught.value)))


@pytest.mark.parametrize(
    ("address", "variable"),
    [
        ("gs://bucket", "GOOGLE_SERVICE_ACCOUNT"),
        ("gs://bucket", "GOOGLE_SERVICE_ACCOUNT_KEY"),
        ("az://bucket", "AZURE_STORAGE_ACCOUNT_KEY"),
        ("s3://skip", "AWS_SKIP_SIGNATURE"),
    ],
)
def test_wrong_credentials_are_told_by_variable(address: str, variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(variable, "hidden!")
    with pytest.raises(UserError, match=rf"{address} cannot be opened .* {variable.partition('_')[0]}_") as caught:
        store_of(parse_place(f"{address}/x"))
    assert "hidden" not in "".join(traceback.format_exception(caught.value))


def test_without_the_library_the_message_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "obstore.store", None)
    place: Any = parse_place("s3://never-opened/x")
    with pytest.raises(UserError, match=r"pip install obstore"):
        store_of(place)
