"""Be the only process that writes to a place. On a disk that is a lock, which the system frees when its holder is killed.

An object store has no locks. There a claim is an object that is put only if it is absent; its holder writes it again every few
seconds. A claim that was not written for the time of a lease belongs to a dead process, and is taken over. All times are those
of the store's clock, so that clocks of machines need not agree:

    <place>/claims/<part>/<number>      the holder's random name
"""

from __future__ import annotations

import logging
import math
import os
import random
import secrets
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from pipeline.runtime.errors import UserError
from pipeline.runtime.files import lock, lock_shared
from pipeline.runtime.places import Address, Place
from pipeline.runtime.stores import StoredObject, renew_object, store_of

logger = logging.getLogger(__name__)

LEASE_VARIABLE = "DIFFALIGN_LEASE_SECONDS"
DEFAULT_LEASE = 60.0
RENEWALS_PER_LEASE = 5
RENEWAL_SECONDS = 10.0  # that one may still take when its claim is given up: batch systems kill half a minute after a SIGTERM
CLAIMS = "claims"
EVERYTHING = "all"  # the part that overlaps with every other one
DRIVER = "driver"  # the part that a process holds whose workers hold the others


class Claim(NamedTuple):
    """A claim of this process."""

    place: Address
    holder: bytes  # the random name that is written in it

    def is_ours(self) -> bool:
        """Whether no other process has taken it over."""
        try:
            return store_of(self.place).get(self.place) == self.holder
        except FileNotFoundError:
            return False


_held: dict[tuple[Address, str], Claim] = {}  # by place and part


def lease_seconds() -> float:
    """Return the time after which a claim that nobody has renewed is taken over."""
    try:
        seconds = float(os.environ.get(LEASE_VARIABLE) or DEFAULT_LEASE)
    except ValueError:
        seconds = math.nan
    if not math.isfinite(seconds):
        raise UserError(f"{LEASE_VARIABLE} must be a number of seconds, not {os.environ[LEASE_VARIABLE]!r}")
    return max(1.0, seconds)


@contextmanager
def hold(place: Place, part: str = EVERYTHING, wait: float = 0.0) -> Iterator[None]:
    """Inside the block, be the only process that writes to a place, or to a part of it.

    On a disk, those that hold parts work at the same time and share them out among themselves.

    Args:
        place: the folder of a cache, or its address.
        part: the name of a part; `EVERYTHING`: no other process may write anything.
        wait: on an object store, the seconds to wait for another process, beside those of a lease after which a dead one counts
            as such.

    Raises:
        UserError: another process is writing.
    """
    if isinstance(place, Path):
        with lock(place) if part == EVERYTHING else lock_shared(place):
            yield
        return
    claim = _acquire(place, part, time.monotonic() + lease_seconds() + 2 + wait)
    _held[place, part] = claim
    stopped, failing = threading.Event(), threading.Event()
    thread = threading.Thread(target=_renew, args=(place, part, claim, stopped, failing), daemon=True)
    thread.start()
    try:
        yield
    except TimeoutError as error:
        if str(error.filename).startswith(f"{place.bucket}/"):
            failing.set()
        raise
    else:
        failing.clear()  # what was done here has worked since the last renewal failed
    finally:
        stopped.set()
        del _held[place, part]
        if not failing.is_set():
            thread.join(RENEWAL_SECONDS)
        # A store that does not answer would be asked for a minute or longer; a claim that is not removed ends with its lease.
        if not failing.is_set() and not thread.is_alive():
            with suppress(OSError):
                if claim.is_ours():
                    store_of(place).delete(claim.place)


def check_held(place: Place, part: str) -> None:
    """Check that this process still holds a part of a place, before it writes there.

    Raises:
        UserError: it was stopped for longer than a lease, and another process has taken its claim over.
    """
    if isinstance(place, Path):
        return
    claims = [claim for key in ((place, EVERYTHING), (place, part)) if (claim := _held.get(key))]
    if claims and not any(claim.is_ours() for claim in claims):
        raise UserError(
            f"{place}: this process gave no sign of life for {lease_seconds():g} seconds, and another one writes part {part} "
            "in its place; run the same command again"
        )


def _acquire(place: Address, part: str, deadline: float) -> Claim:
    """Put a claim on a part of a place, and return it when no other claim overlaps with it.

    Who puts a claim lists all of them afterwards. So of two that overlap, at least one sees the other and withdraws.

    Raises:
        UserError: another process holds an overlapping claim when the time is over.
    """
    store, folder, holder = store_of(place), place / CLAIMS, secrets.token_hex(8).encode()
    is_told = False
    while True:
        numbers = [int(found.place.name) for found in store.list(folder / part)]
        mine = folder / part / f"{max(numbers, default=-1) + 1:06d}"
        if store.put_if_absent(mine, holder):
            claims = store.list(folder)
            now = max(found.modified for found in claims)  # that of the claim that was just put, or later
            others = [found for found in claims if found.place != mine]
            dead = [found for found in others if now - found.modified > lease_seconds()]
            if not any(_overlaps(found, part) for found in others if found not in dead):
                for found in dead:
                    logger.info("%s: taking over from a process that has died", found.place)
                    store.delete(found.place)
                return Claim(mine, holder)
            store.delete(mine)
        if time.monotonic() > deadline:
            raise UserError(f"another process is writing to {place}; wait until it has ended")
        if not is_told:
            logger.info("waiting for the process that writes to %s", place)
            is_told = True
        time.sleep(lease_seconds() / RENEWALS_PER_LEASE * random.uniform(0.2, 1.0))


def _overlaps(found: StoredObject, part: str) -> bool:
    other = found.place.parent.name
    return other == part or EVERYTHING in (other, part)


def _renew(place: Address, part: str, claim: Claim, stopped: threading.Event, failing: threading.Event) -> None:
    """Write a claim again and again until it is given up, or another process has taken it over.

    `failing` is set while the last renewal has failed.
    """
    while not stopped.wait(lease_seconds() / RENEWALS_PER_LEASE):
        try:
            if not renew_object(claim.place, claim.holder):
                logger.warning("%s: another process has taken over part %s", place, part)
                return
            failing.clear()
        except OSError as error:  # the next one may be in time
            failing.set()
            logger.debug("%s was not renewed: %s", claim.place, error)
