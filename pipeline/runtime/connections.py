"""Connections to buckets of object stores, and their errors as errors of the operating system.

This module and `stores` alone know the library obstore, an extra package. It takes credentials and endpoints from the
environment; they are never logged or stored.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import math
import os
import re
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import wraps
from typing import Any, ParamSpec, TypeVar
from urllib.parse import urlsplit

from pipeline.runtime.errors import UserError
from pipeline.runtime.places import Address

logger = logging.getLogger(__name__)
P = ParamSpec("P")
T = TypeVar("T")

REQUEST_TIMEOUT = "120s"  # of one request; a shard has at most 256 MiB
RETRY_SECONDS = 60.0  # time in which a request that fails is repeated
RETRY_PAUSE = 0.5  # seconds before a request is sent again that the library does not repeat
SLOW_SECONDS = 15.0  # after which a request without an answer is told, at most once in RETRY_SECONDS
ENDPOINT_VARIABLES = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT")
CREDENTIAL_VARIABLES = {  # each names the credentials, or says where they are
    "s3": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
    "gs": "GOOGLE_SERVICE_ACCOUNT",
    "az": "AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY",
}
S3_CREDENTIAL_SOURCES = (  # without any of them, the library asks the machine
    "AWS_ACCESS_KEY_ID",
    "AWS_WEB_IDENTITY_TOKEN_FILE",
    "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",
    "AWS_CONTAINER_CREDENTIALS_FULL_URI",
    "AWS_SKIP_SIGNATURE",
)
PLACE_VARIABLES = {"s3": "AWS_ENDPOINT_URL and AWS_REGION", "gs": "GOOGLE_SERVICE_ACCOUNT", "az": "AZURE_STORAGE_ACCOUNT_NAME"}
_REQUEST = re.compile(r"performing [A-Z]+ (?:(https?://)(?:[^/\s@]*@)?([^/\s?]+)([^\s?]*)\S*|REDACTED)(?: in (\d+)[.\d]*s\b)?")
_ROLE_PATHS = (
    "/latest/api/token",
    "/latest/meta-data",
    "/computeMetadata",
    "/metadata/identity",
)  # of the machine's credentials
_OUTAGES = {  # words in the library's text on an error -> what is wrong
    "ConnectionRefused": "connection refused",
    "dns error": "there is no such host",
    "TimedOut": "time-out",
    "InvalidCertificate": "its certificate is not trusted",
    "InvalidContentType": "it does not speak https",
}


def find_endpoint(bucket: str) -> str:
    """Return the address of a server that speaks the protocol of S3; "": the provider's own."""
    return next(filter(None, map(os.environ.get, ENDPOINT_VARIABLES)), "") if bucket.startswith("s3://") else ""


def _check_endpoint(bucket: str, endpoint: str) -> None:
    """Refuse what is no address of a server, or has credentials in it. It may be a secret, so no message repeats it.

    Raises:
        UserError: it is refused.
    """
    try:
        parts = urlsplit(endpoint)
        is_right = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
    except ValueError:  # of the port, or of an IPv6 address
        is_right = False
    if not is_right or not endpoint.isascii() or set(endpoint) & set("@?# ") or not endpoint.isprintable():
        raise UserError(
            f"{bucket}: AWS_ENDPOINT_URL must be http://host:port or https://host, without credentials; put these into "
            "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        )


def connect(bucket: str, endpoint: str) -> Any:
    """Return the connection to a bucket; nothing is asked of it yet.

    Raises:
        UserError: obstore is not installed, or the environment has no right endpoint or credentials.
    """
    try:
        from obstore.exceptions import BaseError
        from obstore.store import from_url
    except ImportError as error:
        raise UserError(f"{bucket} needs the package obstore: pip install obstore") from error
    if bucket.startswith("s3://") and not any(map(os.environ.get, S3_CREDENTIAL_SOURCES)):
        if os.environ.get("AWS_EC2_METADATA_DISABLED", "").lower() == "true":  # which the library does not know
            raise UserError(_without_credentials(bucket))
        logger.info("%s: no credentials in the environment; asking for those of this machine", bucket)
    options: dict[str, Any] = {"client_options": {"timeout": REQUEST_TIMEOUT, "connect_timeout": "10s"}}
    if endpoint:
        _check_endpoint(bucket, endpoint)
        options["endpoint"] = endpoint
        options["client_options"]["allow_http"] = endpoint.startswith("http://")
    # A pause is drawn between the first one and `base` times the one before: with a base of 2 pauses get shorter in the mean.
    backoff = {"init_backoff": timedelta(seconds=0.1), "max_backoff": timedelta(seconds=5), "base": 4}
    options["retry_config"] = {"max_retries": 1000, "retry_timeout": timedelta(seconds=RETRY_SECONDS), "backoff": backoff}
    try:
        return from_url(bucket, **options)
    except (BaseError, ValueError):  # the text may be that of a variable
        variables = f"{CREDENTIAL_VARIABLES[bucket.partition(':')[0]].partition('_')[0]}_…"
        raise UserError(
            f"{bucket} cannot be opened with the credentials in the environment; are the variables {variables} right?"
        ) from None


class _Patience:
    """Tells that a request takes long; the library repeats one that fails without a word."""

    def __init__(self) -> None:
        self._pending: dict[object, tuple[float, Address]] = {}  # when each request began, and of what
        self._told_at = -math.inf
        self._lock = threading.Lock()
        self._is_watched = False

    @contextmanager
    def waiting(self, place: Address) -> Iterator[None]:
        request = object()
        try:
            self._pending[request] = time.monotonic(), place
            with self._lock, suppress(RuntimeError):  # where no thread can be started, nothing is told
                if not self._is_watched:
                    threading.Thread(target=self._watch, daemon=True).start()
                    self._is_watched = True
            yield
        finally:
            self._pending.pop(request, None)

    def _watch(self) -> None:
        while True:
            time.sleep(SLOW_SECONDS / 5)
            now = time.monotonic()
            slow = [place for began, place in list(self._pending.values()) if now - began > SLOW_SECONDS]
            if slow and now - self._told_at > RETRY_SECONDS:
                self._told_at = now
                logger.warning("%s: a request takes longer than %.0f s; one that fails is repeated", slow[0], SLOW_SECONDS)


_PATIENCE = _Patience()


@contextmanager
def labelled(place: Address) -> Iterator[Any]:
    """Yield the module obstore; its errors in the block become an `OSError` that names the place, its bucket and the remedy.

    Raises:
        FileNotFoundError: there is no such object.
        TimeoutError: the store does not answer.
        OSError: there is no such bucket, or it may not be used.
    """
    import obstore

    try:
        with _PATIENCE.waiting(place):
            yield obstore
    except obstore.exceptions.InvalidPathError as error:
        raise OSError(errno.EINVAL, _odd_name(error), str(place)) from None
    except (FileNotFoundError, obstore.exceptions.BaseError) as error:
        logger.debug("%s: %s", place, type(error).__name__)
        if isinstance(error, FileNotFoundError) and _code(error) not in ("NoSuchBucket", "ContainerNotFound"):
            what = "there is no such object, or no longer; correct the name, or run the same command again"
            raise FileNotFoundError(errno.ENOENT, what, str(place)) from error
        raise _describe(place, error) from None  # its long text has settings of the connection


def _may_repeat(began: float) -> bool:
    """Return whether a request that began then, and ended in a `TimeoutError`, is to be sent again.

    The library repeats most for a minute; not one whose answer is an error, such as 404, of which a part is lost.
    """
    return time.monotonic() - began < RETRY_SECONDS / 2


def repeated(request: Callable[P, T]) -> Callable[P, T]:
    """Return a function that sends a request again which the library does not repeat."""

    @wraps(request)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        began = time.monotonic()
        while True:
            try:
                return request(*args, **kwargs)
            except TimeoutError:
                if not _may_repeat(began):
                    raise
            time.sleep(RETRY_PAUSE)

    return run


async def ask_repeatedly(place: Address, request: Callable[[], Awaitable[T]]) -> T:
    """Return the answer to an asynchronous request, with errors as in `labelled`; it is sent again as by `repeated`."""
    began = time.monotonic()
    while True:
        try:
            with labelled(place):
                return await request()
        except TimeoutError:
            if not _may_repeat(began):
                raise
        await asyncio.sleep(RETRY_PAUSE)


def _odd_name(error: Exception) -> str:
    """Return one line about an object below a place that no `Address` can name; the library lists nothing beside it."""
    line = str(error).split("\n")[0].removeprefix("Encountered object with invalid path: ")
    what = "an object below has an empty part, '.' or '..' in its name, so that none there is listed"
    return f"{what} ({line:.300}); rename or remove it"


def _describe(place: Address, error: Exception) -> OSError:
    """Return an error of the library as one that says what is wrong in one line, with the remedy.

    Of the library's text it repeats nothing but the server's name and the code of its answer: the rest may have secrets in it.
    """
    text, code, bucket = str(error), _code(error), place.bucket
    scheme, request = bucket.partition(":")[0], _REQUEST.search(text)
    seconds = request[4] if request else None
    server = f"{request[1]}{request[2]}" if request and request[2] else "the store"
    status = int(found[1]) if (found := re.search(r"status code: (\d{3})", text)) else 0
    number = errno.EIO
    if request and not _is_of_bucket(bucket, request[2] or "", request[3] or ""):  # but of who gives the credentials
        reason = _without_credentials(bucket)
    elif status == 404:
        reason = f"{server} has no bucket {bucket}: make it, or correct its name or {PLACE_VARIABLES[scheme]}"
    elif status in (401, 403):
        who = f"{CREDENTIAL_VARIABLES[scheme]} must be those of a user who may list, read and write it"
        reason = f"{server} refuses access to {bucket} ({code or status}): {who}"
    elif status >= 500 or status == 429 or "HTTP error" in text:
        number = errno.ETIMEDOUT
        why = code or status or next((told for word, told in _OUTAGES.items() if word in text), "no connection")
        asked = f", asked for {seconds} seconds" if seconds else ""
        reason = (
            f"{server} does not answer ({why}){asked}; when it does, the same command goes on from here; if it never does, "
            f"correct {PLACE_VARIABLES[scheme]}"
        )
    elif "redirect without LOCATION" in text:
        reason = f"{server} has {bucket} in another region: correct {PLACE_VARIABLES[scheme]}"
    else:
        answer = f"answers {code or status}" if code or status else "gives no usable answer"
        reason = f"{server} {answer}; are the name of {bucket} and {PLACE_VARIABLES[scheme]} right?"
    return OSError(number, reason, str(place))


def _is_of_bucket(bucket: str, host: str, path: str) -> bool:
    """Return whether a request was sent to the bucket; "": the library does not say to which host.

    Others are sent to a service that gives the credentials of this machine. The library leaves a host out where its address
    may have a secret: with S3 of such services alone.
    """
    scheme, _, name = bucket.partition("://")
    if not host:
        return scheme != "s3"
    endpoint = urlsplit(find_endpoint(bucket)).netloc
    if endpoint and f".{host}".endswith(f".{endpoint}"):
        return True
    return not path.startswith(_ROLE_PATHS) and (host.startswith(f"{name}.") or name in path.split("/"))


def _without_credentials(bucket: str) -> str:
    variables = CREDENTIAL_VARIABLES[bucket.partition(":")[0]]
    return f"{bucket} needs credentials: set {variables} in the environment (files such as ~/.aws/credentials are not read)"


def _code(error: Exception) -> str:
    """Return the word in which a store has said what is wrong, such as AccessDenied; "": none."""
    found = re.search(r"<Code>(\w{1,60})</Code>", str(error))
    return found[1] if found else ""
