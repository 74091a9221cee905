"""Files and objects are read and written through one interface, also when requests are lost, repeated or refused."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event, Semaphore
from typing import Any

import obstore
import pytest
from helpers.s3_endpoint import Endpoint, use_endpoint

from pipeline.runtime import claims
from pipeline.runtime.claims import check_held, hold
from pipeline.runtime.errors import UserError
from pipeline.runtime.places import Address, Place, caches_at, caches_place, check_local, home_of_caches, parse_place
from pipeline.runtime.stores import FileStore, exists, object_sha256, remove_objects, renew_object, store_of


@pytest.fixture(scope="module")
def endpoint() -> Iterator[Endpoint]:
    with use_endpoint() as endpoint:
        yield endpoint


@pytest.fixture(params=["folder", "bucket"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    if request.param == "folder":
        return tmp_path
    request.getfixturevalue("endpoint")
    return parse_place(f"s3://bucket/{tmp_path.name}")


def test_both_stores_keep_one_contract(place: Place) -> None:
    store = store_of(place)
    store.put(place / "a" / "long", (bytes([piece]) * 100 for piece in range(3)))
    store.put(place / "a" / "text", "ä")
    store.put(place / "b" / "c" / "d", memoryview(b"first"))
    store.put(place / "b" / "c" / "d", b"second")
    assert store.get(place / "b" / "c" / "d") == b"second"
    assert store.get(place / "a" / "text") == "ä".encode()
    assert bytes(store.get_range(place / "a" / "long", 199, 2)) == b"\x01\x02"
    assert bytes(store.get_range(place / "a" / "long", 299, 50)) == b"\x02"
    assert store.size(place / "a" / "long") == 300
    found = store.list(place)
    assert [(each.place, each.num_bytes) for each in found] == [
        (place / "a" / "long", 300),
        (place / "a" / "text", 2),
        (place / "b" / "c" / "d", 6),
    ]
    assert max(each.modified for each in found) - min(each.modified for each in found) < 60
    assert store.children(place) == ["a", "b"]
    assert store.children(place / "none") == store.list(place / "none") == []
    assert object_sha256(place / "b" / "c" / "d") == "16367aacb67a4a017c8da8ab95682ccb390863780f7114dda0a0e0c55644c7c4"
    store.delete(place / "a" / "text")
    store.delete(place / "a" / "text")
    assert exists(place / "a" / "long")
    for act in (store.get, store.size, lambda place: store.get_range(place, 0, 1)):
        with pytest.raises(FileNotFoundError) as caught:
            act(place / "a" / "text")
        assert str(caught.value.filename) == str(place / "a" / "text")
    remove_objects(place / "b")
    assert store.children(place) == ["a"]


def test_of_many_that_put_an_absent_object_one_succeeds(place: Place, request: pytest.FixtureRequest) -> None:
    store, is_bucket = store_of(place), isinstance(place, Address)
    if is_bucket:
        request.getfixturevalue("endpoint").disturb(0.25)
    with ThreadPoolExecutor(8) as threads:
        for number in range(6):
            target = place / f"{number}"
            names = [f"{number} {thread}".encode() for thread in range(8)]
            results = list(threads.map(lambda name, target=target: store.put_if_absent(target, name), names))
            assert [name for name, is_mine in zip(names, results, strict=True) if is_mine] == [store.get(target)]
    if is_bucket:
        request.getfixturevalue("endpoint").disturb(0)


def test_requests_that_fail_are_repeated(endpoint: Endpoint) -> None:
    place = parse_place("s3://bucket/disturbed")
    store = store_of(place)
    endpoint.disturb(0.4)
    for number in range(10):
        store.put(place / f"{number}", f"{number}" * 9)
        assert bytes(store.get_range(place / f"{number}", 3, 2)) == f"{number}{number}".encode()
    assert len(store.list(place)) == 10
    endpoint.disturb(0)


def test_a_claim_keeps_others_out_and_a_dead_one_is_taken_over(endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIFFALIGN_LEASE_SECONDS", "inf")
    with pytest.raises(UserError, match="must be a number of seconds, not 'inf'"):
        claims.lease_seconds()
    monkeypatch.setenv("DIFFALIGN_LEASE_SECONDS", "1")
    place = parse_place("s3://bucket/claims-test")
    store = store_of(place)
    with hold(place, "1"):
        check_held(place, "1")
        with hold(place, "2"):  # another part
            assert len(store.list(place)) == 2
        for part in ("1", claims.EVERYTHING):
            with pytest.raises(UserError, match="another process is writing to s3://bucket/claims-test"), hold(place, part):
                pass
        assert [each.place.parent.name for each in store.list(place)] == ["1"]
        store.delete(store.list(place)[0].place)  # as one does who takes over
        with pytest.raises(UserError, match="gave no sign of life"):
            check_held(place, "1")
    dead = place / "claims" / "1" / "000000"
    assert store.put_if_absent(dead, b"a process that was killed")
    with hold(place):
        assert [each.place for each in store.list(place)] == [place / "claims" / "all" / "000000"]
    assert store.list(place) == []


@pytest.mark.parametrize("successor", [b"", b"another process"])
def test_a_late_renewal_does_not_revive_a_claim_that_was_taken_over(
    successor: bytes, endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    place: Any = parse_place(f"s3://bucket/renewals/{len(successor)}")
    store = store_of(place)
    assert not renew_object(place, b"ours")
    store.put(place, b"ours")
    assert renew_object(place, b"ours")
    assert renew_object(place, b"ours")
    put = obstore.put

    def put_late(*arguments: Any, **options: Any) -> None:
        monkeypatch.undo()
        store.delete(place)
        if successor:
            store.put(place, successor)
        put(*arguments, **options)

    monkeypatch.setattr(obstore, "put", put_late)
    assert not renew_object(place, b"ours")
    assert not renew_object(place, b"ours")
    assert [store.get(found.place) for found in store.list(place.parent) if found.place == place] == [successor] * bool(
        successor
    )


def test_addresses() -> None:
    address = parse_place("s3://bucket/some/prefix/")
    assert address == Address("s3://bucket", "some/prefix")
    assert str(address / "x") == "s3://bucket/some/prefix/x"
    assert (address / "x").parent == address
    assert address.name == "prefix"
    assert parse_place("s3:/bucket/x") == Address("s3://bucket", "x")  # as `Path` writes it
    assert parse_place("s3://bucket/team//./x/") == Address("s3://bucket", "team/x")  # $TEAM/$NOTHING/./x
    with pytest.raises(UserError, match=r"has '\.\.' in it"):
        parse_place("s3://bucket/team/../x")
    for path in ("C:/data", "a/b", "/c"):
        assert parse_place(path) == Path(path)
    for wrong in ("ftp://host/x", "https://bucket.s3.amazonaws.com/x", "http://127.0.0.1:9000/bucket", "s3://"):
        with pytest.raises(UserError, match="is no address of an object store: give one such as s3://bucket/prefix") as caught:
            parse_place(wrong)
        assert ("AWS_ENDPOINT_URL" in str(caught.value)) == wrong.startswith("http")
    for typo in ("s3//bucket/x", "s3:bucket/x", "gs//key:hidden@bucket"):
        with pytest.raises(UserError, match=r"… is no address: give one such as (s3|gs)://bucket/prefix") as caught:
            parse_place(typo)
        assert "hidden" not in str(caught.value)
    for secret in (
        "http://user:hidden@host",
        "s3://key:hidden@bucket/x",
        "s3://key:hidden/hidden@bucket/x",
        "s3://hidden/hidden@bucket/x",
        "az://container/x?sig=hidden",
        "https://account.blob.core.windows.net/x#sig=hidden",
    ):
        with pytest.raises(UserError, match="no room for credentials") as caught:
            parse_place(secret)
        assert "hidden" not in str(caught.value)
        with pytest.raises(UserError, match="is an address") as caught:
            check_local(secret, "--home")
        assert "hidden" not in str(caught.value)


def test_caches_have_a_place_of_their_own(tmp_path: Path) -> None:
    assert caches_place(tmp_path) == tmp_path / "caches"
    with caches_at("gs://bucket/x"):
        assert os.environ["DIFFALIGN_CACHES"] == "gs://bucket/x"
        assert caches_place(tmp_path) == Address("gs://bucket", "x")
    assert "DIFFALIGN_CACHES" not in os.environ
    assert home_of_caches(Address("gs://bucket", "x")) == tmp_path
    assert home_of_caches(Address("gs://other", "x")) == Path("artifacts")
    assert home_of_caches(Path("elsewhere")) is None


def test_a_claim_is_not_given_back_to_a_store_that_does_not_answer(endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    place: Any = parse_place("s3://bucket/silent")
    with pytest.raises(TimeoutError), hold(place):
        raise TimeoutError(errno.ETIMEDOUT, "does not answer", "s3://bucket-of-media/a.tar")  # another one
    assert store_of(place).list(place) == []
    monkeypatch.setattr(claims.Claim, "is_ours", lambda self: pytest.fail("the store was asked again"))
    with pytest.raises(TimeoutError), hold(place):
        raise TimeoutError(errno.ETIMEDOUT, "does not answer", str(place / "x"))
    assert len(store_of(place).list(place)) == 1


def test_a_claim_is_given_back_after_success_though_a_renewal_failed(
    endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    place: Any = parse_place("s3://bucket/renewed")
    monkeypatch.setenv(claims.LEASE_VARIABLE, "5")
    renewed = Event()

    def fail(*_: object) -> bool:
        renewed.set()
        raise OSError

    monkeypatch.setattr(claims, "renew_object", fail)
    with hold(place):
        assert renewed.wait(20)
        time.sleep(0.2)  # so that the failure is noted
    assert store_of(place).list(place) == []


@pytest.mark.parametrize("how", ["fails", "takes long", "works again"])
def test_an_interruption_does_not_wait_for_a_store_that_does_not_answer(
    how: str, endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DIFFALIGN_LEASE_SECONDS", "1")
    monkeypatch.setattr(claims, "RENEWAL_SECONDS", 0.1 if how == "takes long" else 60.0)
    asked, released = Semaphore(0), Event()

    def renew(place: Address, data: bytes) -> bool:
        asked.release()
        if how == "fails" or (how == "works again" and not released.is_set()):
            released.set()
            raise TimeoutError
        return how == "works again" or released.wait(60)

    monkeypatch.setattr(claims, "renew_object", renew)
    place: Any = parse_place(f"s3://bucket/interrupted/{how}")

    def be_interrupted() -> None:
        for _ in range(1 if how == "takes long" else 3):
            asked.acquire()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), hold(place):
        be_interrupted()
    assert len(store_of(place).list(place)) == (how != "works again")
    released.set()


def test_a_file_is_put_if_absent_without_leaving_others(tmp_path: Path) -> None:
    assert FileStore().put_if_absent(tmp_path / "x", b"1")
    assert not FileStore().put_if_absent(tmp_path / "x", b"2")
    assert [file.name for file in tmp_path.iterdir()] == ["x"]
