"""Connections to buckets of object stores, and their errors as errors of the operating system.

This module and `stores` alone know the library obstore, an extra package. It takes credentials and endpoints from the
environment; they are never logged or stored.
"""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any
from urllib.parse import urlsplit

from pipeline.runtime.errors import UserError
from pipeline.runtime.places import Address

logger = logging.getLogger(__name__)

REQUEST_TIMEOUT = "120s"  # of one request; a shard has at most 256 MiB
RETRY_SECONDS = 60.0  # time in which a request that fails is repeated
ENDPOINT_VARIABLES = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT")
CREDENTIAL_VARIABLES = {"s3": "AWS_", "gs": "GOOGLE_", "az": "AZURE_"}  # how their names begin


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
    options: dict[str, Any] = {"client_options": {"timeout": REQUEST_TIMEOUT, "connect_timeout": "10s"}}
    if endpoint:
        _check_endpoint(bucket, endpoint)
        options["endpoint"] = endpoint
        options["client_options"]["allow_http"] = endpoint.startswith("http://")
    backoff = {"init_backoff": timedelta(seconds=0.1), "max_backoff": timedelta(seconds=5), "base": 2}
    options["retry_config"] = {"max_retries": 20, "retry_timeout": timedelta(seconds=RETRY_SECONDS), "backoff": backoff}
    try:
        return from_url(bucket, **options)
    except (BaseError, ValueError):  # the text may be that of a variable
        variables = CREDENTIAL_VARIABLES[bucket.partition(":")[0]]
        raise UserError(
            f"{bucket} cannot be opened with the credentials in the environment; are the variables {variables}… right?"
        ) from None


@contextmanager
def labelled(place: Address) -> Iterator[Any]:
    """Yield the module obstore; its errors in the block become an `OSError` that names the place."""
    import obstore

    try:
        yield obstore
    except FileNotFoundError as error:
        raise FileNotFoundError(errno.ENOENT, "there is no such object", str(place)) from error
    except obstore.exceptions.InvalidPathError as error:
        raise OSError(errno.EINVAL, _odd_name(error), str(place)) from None
    except obstore.exceptions.BaseError as error:
        logger.debug("%s: %s", place, type(error).__name__)
        raise OSError(errno.EIO, _reason(place, error), str(place)) from None  # its long text has settings of the connection


def _odd_name(error: Exception) -> str:
    """Return one line about an object below a place that no `Address` can name; the library lists nothing beside it."""
    line = str(error).split("\n")[0].removeprefix("Encountered object with invalid path: ")
    what = "an object below has an empty part, '.' or '..' in its name, so that none there is listed"
    return f"{what} ({line:.300}); rename or remove it"


def _reason(place: Address, error: Exception) -> str:
    """Return one line about an error of the library, with its remedy.

    The first line of the library's text has the address of the request; `_check_endpoint` lets none with credentials through.
    """
    import obstore

    if isinstance(error, obstore.exceptions.PermissionDeniedError | obstore.exceptions.UnauthenticatedError):
        return "access is refused; are the credentials in the environment those of this bucket?"
    line = " ".join(str(error).split("\n")[0].split())
    names = {"s3": "the bucket's name, AWS_ENDPOINT_URL and AWS_REGION"}
    scheme = place.bucket.partition(":")[0]
    asked = names.get(scheme, f"the bucket's name and the variables {CREDENTIAL_VARIABLES[scheme]}…")
    return f"{line[:300]}; are {asked} right, and does the store answer?"
