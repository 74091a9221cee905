"""Tar files of samples: what becomes a sample, what is left out and why, and that features are those of unpacked files."""

from __future__ import annotations

import json
import re
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from helpers.tar_files import Members, picture, sample, write_tar

from pipeline.cache.reader import open_cache
from pipeline.cache.verify import verify
from pipeline.data.manifest import Manifest
from pipeline.data.manifest_files import left_out_facts, read_manifest
from pipeline.data.media_digests import read_digest
from pipeline.data.prepare import PrepareReport, prepare
from pipeline.data.tar_members import MAX_MEMBER_BYTES, find_member, read_member
from pipeline.extraction.extract import ExtractOptions, extract
from pipeline.runtime.errors import UserError


def build(tmp_path: Path, **settings: str) -> tuple[Manifest, PrepareReport]:
    report = prepare("webdataset", tmp_path / "shards", tmp_path / "home", settings)
    return read_manifest(tmp_path / "home", "webdataset"), report


def test_members_that_follow_each_other_are_samples(tmp_path: Path) -> None:
    """Python's tarfile is the oracle for where members lie and what they hold."""
    for shard in range(3):
        members = [each for number in range(4) for each in sample(f"./a.b/{number:04d}", 4 * shard + number)]
        write_tar(tmp_path / "shards" / f"part-{shard:02d}.tar", [*members, (".hidden", b"x"), ("README", b"no part")])
    manifest, report = build(tmp_path, shards="part-{01..02}.tar")
    assert [each.id for each in manifest.samples] == [
        f"part-{shard:02d}/a.b/{number:04d}" for shard in (1, 2) for number in range(4)
    ]
    assert [each.texts for each in manifest.samples] == [(f"picture {number}",) for number in range(4, 12)]
    assert [each.labels for each in manifest.samples] == [(number % 2,) for number in range(4, 12)]
    assert (manifest.class_names, manifest.meta["left_out"], report.missing) == (("0", "1"), [], 0)
    for each in manifest.samples:
        shard, _, key = each.id.partition("/")
        with tarfile.open(tmp_path / "shards" / f"{shard}.tar") as tar:
            (file,) = (tar.extractfile(info) for info in tar if info.name == f"./{key}.png")
            assert file
            content = file.read()
        member = find_member(str(manifest.media_path(each)))
        assert member
        assert read_member(member) == content
        (tmp_path / "alone").write_bytes(content)
        assert read_digest(manifest.media_path(each)) == read_digest(tmp_path / "alone")


def test_features_are_those_of_the_unpacked_files(tmp_path: Path) -> None:
    write_tar(tmp_path / "shards" / "all.tar", [each for number in range(6) for each in sample(f"{number}", 30 * number)])
    with tarfile.open(tmp_path / "shards" / "all.tar") as tar:
        tar.extractall(tmp_path / "files", filter="data")
    lines = [
        json.dumps({"file_name": f"{number}.png", "label": number % 2, "sample_id": f"all/{number}"}) for number in range(6)
    ]
    (tmp_path / "files" / "metadata.jsonl").write_text("\n".join(lines))
    manifest, _ = build(tmp_path)
    prepare("table", tmp_path / "files", tmp_path / "home", {})
    features: list[np.ndarray] = []
    for own in (manifest, read_manifest(tmp_path / "home", "table")):
        options = ExtractOptions(workers=0, progress=False)
        path = extract(own, "random_projection", {}, tmp_path / "home", options=options)
        features.append(open_cache(path).read([f"all/{number}" for number in range(6)]))
        assert verify(path) == []
    assert np.array_equal(features[0], features[1])


@pytest.mark.parametrize(
    ("parts", "reason"),
    [
        ({"png": b""}, "no picture or clip among its parts (txt, cls)"),
        ({"cls": b""}, "no label"),
        ({"jpg": picture(1, "jpeg")}, "several pictures or clips, png, jpg"),
        ({"txt": b"\xff"}, "not UTF-8"),
        ({"json": b"{"}, "broken JSON"),
        ({"json": b"[" * 100_000}, "broken JSON"),
        ({"json": b"[1]"}, "its JSON is no object"),
        ({"txt": b"a" * (2**20 + 1)}, "a text has more than"),
        ({"cls": b"-3"}, "is negative"),
        ({"txt": b"", "json": b'{"text": "\\ud800"}'}, "lone surrogate"),
        ({"txt": b"", "json": b'{"text": ["a cat", "\\ud800"]}'}, "lone surrogate"),
        ({"cls": b"", "json": b'{"label": "\\ud800"}'}, "half of one"),
    ],
)
def test_samples_that_miss_a_part_are_left_out_with_the_reason(tmp_path: Path, parts: dict[str, bytes], reason: str) -> None:
    write_tar(tmp_path / "shards" / "a.tar", [*sample("good", 1), *sample("bad", 2, **parts), *sample("last", 3)])
    manifest, report = build(tmp_path)
    assert [each.id for each in manifest.samples] == ["a/good", "a/last"]
    assert manifest.source_location(1) == "a.tar, sample 3"
    assert [line for line in manifest.meta["left_out"] if line.startswith("a.tar, 'bad': ") and reason in line]
    assert "1 samples or ends of shards are left out (1: " in report.warnings[0]
    (row,) = pq.read_table(report.left_out_list).to_pylist()
    assert (row["id"], row["stage"], row["shard"], row["key"]) == ("a/bad", "prepare", "a.tar", "bad")
    assert reason in row["error"]
    (kind,) = manifest.meta["left_out_counts"]
    assert not re.search(r"\d{3}|'", kind)
    assert left_out_facts(tmp_path / "home", "webdataset") == {
        "left out": f"1: {kind}",
        "the first of them": manifest.meta["left_out"][0],
        "all of them": report.left_out_list,
    }
    assert [path.stem for path in (tmp_path / "home" / "manifests").glob("*.parquet")] == ["webdataset"]  # all data sets
    write_tar(tmp_path / "shards" / "a.tar", sample("good", 1))
    assert build(tmp_path)[1].left_out_list == ""
    assert left_out_facts(tmp_path / "home", "webdataset") == {}


def info(name: str, **fields: Any) -> tarfile.TarInfo:
    made = tarfile.TarInfo(name)
    for field, value in fields.items():
        setattr(made, field, value)
    return made


def test_a_picture_that_cannot_be_decoded_stays_and_is_named_by_its_key(tmp_path: Path) -> None:
    write_tar(tmp_path / "shards" / "a.tar", [*sample("good", 1), *sample("bad", 2, png=picture(2)[:60])])
    report = prepare("webdataset", tmp_path / "shards", tmp_path / "home", {}, verify_media=True)
    (reported,) = report.undecodable
    assert reported.startswith("'a/bad' (a.tar, sample 2): ")
    assert (report.left_out, pq.read_table(report.path)["media_ok"].to_pylist().count(False)) == (0, 1)


def test_the_same_key_in_two_shards_is_two_samples(tmp_path: Path) -> None:
    for shard in ("a", "b"):
        write_tar(tmp_path / "shards" / f"{shard}.tar", sample("x", 1))
    assert [each.id for each in build(tmp_path, shards="{,./}{a,b}.tar")[0].samples] == ["a/x", "b/x"]
    write_tar(tmp_path / "shards" / "a.tar", sample("b/x", 1))
    write_tar(tmp_path / "shards" / "a" / "b.tar", sample("x", 1))
    with pytest.raises(UserError, match=r"a/b\.tar, sample 1, sample 'a/b/x': repeats the id of a\.tar, sample 1"):
        build(tmp_path)


HOSTILE: dict[str, tuple[Members, str]] = {
    "absolute": ([("/etc/x.png", picture(1)), ("/etc/x.cls", b"1")], "is absolute"),
    "leads out": ([("../x.png", picture(1)), ("../x.cls", b"1")], "holds '..'"),
    "symbolic link": ([(info("x.png", type=tarfile.SYMTYPE, linkname="/etc/passwd"), b""), ("x.cls", b"1")], "a symbolic link"),
    "hard link": ([(info("x.png", type=tarfile.LNKTYPE, linkname="good.png"), b""), ("x.cls", b"1")], "a hard link"),
    "device": ([(info("x.png", type=tarfile.CHRTYPE), b""), ("x.cls", b"1")], "a device or pipe"),
    "twice": ([("x.png", picture(1)), ("x.png", picture(2)), ("x.cls", b"1")], "two parts png"),
    "too long": ([(f"{'x' * 1100}.png", picture(1)), (f"{'x' * 1100}.cls", b"1")], "is longer than 1024 characters"),
    "again": ([("y.txt", b"alone"), *sample("good", 5)], "its key comes again"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_members_are_refused_one_by_one(tmp_path: Path, kind: str) -> None:
    members, reason = HOSTILE[kind]
    write_tar(tmp_path / "shards" / "a.tar", [*sample("good", 1), *members, *sample("last", 3)])
    manifest, _ = build(tmp_path)
    assert [each.id for each in manifest.samples] == ["a/good", "a/last"]
    assert reason in "".join(manifest.meta["left_out"])


def test_what_follows_damage_is_left_out(tmp_path: Path) -> None:
    """A tar cut at any block, a header that claims to be huge, and one that is no header."""
    file = tmp_path / "shards" / "a.tar"
    write_tar(file, [*sample("good", 1), *sample("last", 2)])
    whole = file.read_bytes()
    for length in (7 * 512, 6 * 512 + 100, 9 * 512):
        file.write_bytes(whole[:length])
        manifest, _ = build(tmp_path)
        assert [each.id for each in manifest.samples] == ["a/good"]
        assert "cut short" in "".join(manifest.meta["left_out"])
    bomb = tarfile.TarInfo("x.png")
    bomb.type, bomb.size = tarfile.XHDTYPE, 2**33
    huge = tarfile.TarInfo("x.png")
    huge.size = MAX_MEMBER_BYTES + 1
    for header in (bomb.tobuf(tarfile.GNU_FORMAT), huge.tobuf(tarfile.GNU_FORMAT), b"\x7f" * 512):
        file.write_bytes(whole[: 6 * 512] + header + whole[6 * 512 :])
        manifest, _ = build(tmp_path)
        assert [each.id for each in manifest.samples] == ["a/good"]
        assert manifest.meta["left_out"]


def test_a_size_below_zero_leads_back_to_no_member(tmp_path: Path) -> None:
    """A 0-byte member, then one whose extended header claims -1536 bytes: what follows it is what came before it."""
    back = info("back.png", pax_headers={"size": "-1536"})
    write_tar(tmp_path / "shards" / "a.tar", [*sample("good", 1), ("none.txt", b""), (back, b""), *sample("last", 2)])
    manifest, _ = build(tmp_path)
    assert [each.id for each in manifest.samples] == ["a/good"]
    assert "a header claims -1536 bytes" in "".join(manifest.meta["left_out"])
    assert len(manifest.meta["left_out"]) == 2


def test_what_follows_the_end_of_a_tar_is_mentioned(tmp_path: Path) -> None:
    """As `cat a.tar b.tar` makes it; zeros after the end are usual."""
    file = tmp_path / "shards" / "a.tar"
    write_tar(file, sample("good", 1))
    write_tar(tmp_path / "second", sample("last", 2))
    file.write_bytes(file.read_bytes() + bytes(2**20 + 512))
    assert build(tmp_path)[0].meta["left_out"] == []
    file.write_bytes(file.read_bytes() + (tmp_path / "second").read_bytes())
    manifest, report = build(tmp_path)
    assert [each.id for each in manifest.samples] == ["a/good"]
    assert "its end comes after 'good.cls', but more follows" in report.warnings[0]


def test_a_picture_is_read_from_a_part_of_any_name_that_a_path_can_say(tmp_path: Path) -> None:
    parts = {"png": b"", "seg-mask": picture(2), "seg+mask": picture(3)}
    write_tar(tmp_path / "shards" / "a.tar", sample("x", 1, **parts))
    manifest, _ = build(tmp_path, media_part="seg-mask")
    member = find_member(str(manifest.media_path(manifest.samples[0])))
    assert member
    assert read_member(member) == picture(2)
    with pytest.raises(UserError, match=r"'x.seg\+mask' does not end with a dot"):
        build(tmp_path, media_part="seg+mask")


def test_splits_texts_and_labels_from_names_and_json(tmp_path: Path) -> None:
    facts = {"caption": ["a cat", "a pet"], "label": "cat"}
    for split in ("train", "val", "test"):
        write_tar(
            tmp_path / "shards" / f"cc-{split}-0.tar", sample(split, 1, txt=b"", cls=b"", json=json.dumps(facts).encode())
        )
    manifest, _ = build(tmp_path, shards="cc-{train,val,test}-*.tar")
    assert [(each.split, each.texts) for each in manifest.samples] == [
        (each, ("a cat", "a pet")) for each in ("train", "val", "test")
    ]
    assert manifest.class_names == ("cat",)
    (tmp_path / "shards" / "more.tar").write_bytes(b"")
    with pytest.raises(UserError, match=r"more.tar is named like no split"):
        build(tmp_path)


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("a-{0..2}.tar", r"2 of 3 shards are missing, the first: a-1.tar"),
        ("b*.tar", "there is no shard"),
        ("{2..1}.tar", "is empty"),
        ("{0..999999999}.tar", "more than 1000000"),
        ("../*.tar", "tar files below --root"),
        ("*.gz", "unpack a compressed one"),
    ],
)
def test_patterns_that_fit_nothing_say_what_is_missing(tmp_path: Path, pattern: str, message: str) -> None:
    write_tar(tmp_path / "shards" / "a-0.tar", sample("x", 1))
    (tmp_path / "shards" / "a.tar.gz").write_bytes(b"")
    with pytest.raises(UserError, match=message):
        build(tmp_path, shards=pattern)


def test_messages_name_the_sample_and_stay_short(tmp_path: Path) -> None:
    frames = [(f"frame.{number:06d}.png", b"") for number in range(2000)]
    write_tar(tmp_path / "shards" / "a.tar", [*frames, *sample("good", 1, cls=b"cat"), *sample("other", 2, cls=b"dog")])
    (reason,) = build(tmp_path)[0].meta["left_out"]
    assert reason.endswith(
        "(000000.png, 000001.png, 000002.png, 000003.png, 000004.png; the key of a sample ends at the first dot)"
    )
    (tmp_path / "shards" / "names.txt").write_text("cat\n")
    with pytest.raises(UserError, match=r"^a\.tar, 'other', line 1: the label 'dog' is none of the 1 class names"):
        build(tmp_path, class_names="names.txt")


def test_a_list_of_class_names_that_is_not_there_is_missed_before_the_shards_are_read(tmp_path: Path) -> None:
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / "a.tar").write_bytes(b"damaged")
    with pytest.raises(UserError, match="the list of class names"):
        build(tmp_path, class_names="nmaes.txt")


def test_a_shard_that_was_packed_anew_is_noticed(tmp_path: Path) -> None:
    file = tmp_path / "shards" / "a.tar"
    write_tar(file, [*sample("good", 1), *sample("last", 2)])
    manifest, _ = build(tmp_path)
    write_tar(file, [*sample("good", 1, txt=b"t" * 600), *sample("last", 2)])
    member = find_member(str(manifest.media_path(manifest.samples[1])))
    assert member
    with pytest.raises(UserError, match=r"a.tar was changed since it was prepared"):
        read_member(member)
