"""The metadata of a dataset for others describes the table that lies beside it."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from helpers.command_line import run

from pipeline.data.card import write_card
from pipeline.data.manifest import Manifest
from pipeline.data.manifest_files import read_manifest, write_manifest
from pipeline.runtime.errors import UserError
from pipeline.types import Sample

HOSTILE = ("<script>alert(1)</script>", "---", "``` # x", "[a](http://b)", "plain")
ARROW_TYPES = {"sc:Text": pa.types.is_string, "sc:Integer": pa.types.is_integer}


@pytest.fixture
def manifest(tmp_path: Path) -> Manifest:
    samples = tuple(
        Sample(f"s{k}", ("train", "val", "test")[k % 3], Path(f"{k}.png"), (f"a\nb {k}", "c"), (k % 5,), "") for k in range(15)
    )
    meta = {"media_type": "image", "licence": "CC: BY\n---\n# no", "attribution": "somebody", "plugin": "table", "sources": {}}
    made = Manifest("toy", "single", HOSTILE, samples, {**meta, "text": {"sep": " "}}, tmp_path)
    write_manifest(made, tmp_path)
    return read_manifest(tmp_path, "toy")


def test_each_field_of_croissant_is_a_column_of_its_type(manifest: Manifest, tmp_path: Path) -> None:
    croissant, _, table = write_card(manifest, tmp_path, tmp_path / "card")
    described: dict[str, Any] = json.loads(croissant.read_text())
    (file,) = described["distribution"]
    assert (croissant.parent / file["contentUrl"]).read_bytes() == table.read_bytes()
    assert file["sha256"] == hashlib.sha256(table.read_bytes()).hexdigest()
    schema = pq.read_schema(table)
    splits, classes, samples = described["recordSet"]
    for field in samples["field"]:
        column = schema.field(field["source"]["extract"]["column"]).type
        assert pa.types.is_list(column) == field.get("repeated", False), field["name"]
        assert ARROW_TYPES[field["dataType"]](column.value_type if pa.types.is_list(column) else column), field["name"]
        assert field["source"]["fileObject"]["@id"] == file["@id"]
    assert [row["classes/name"] for row in classes["data"]] == list(HOSTILE)
    rows = pq.read_table(table).to_pylist()
    assert {row["split"] for row in rows} == {row["splits/name"] for row in splits["data"]}
    ids = {node["@id"] for record in described["recordSet"] for node in (record, *record["field"])}
    for record in described["recordSet"]:
        assert record["key"]["@id"] in ids
        assert all(each["references"]["field"]["@id"] in ids for each in record["field"] if "references" in each)


def test_a_card_has_facts_that_the_hub_reads_and_inert_names(manifest: Manifest, tmp_path: Path) -> None:
    _, card, table = write_card(manifest, tmp_path, tmp_path / "card")
    text = card.read_text()
    facts = next(yaml.safe_load_all(text))
    assert facts["license_name"] == manifest.meta["licence"]
    assert facts["configs"][0]["data_files"] == table.name
    assert facts["size_categories"] == ["n<1K"]
    body = text.split("---\n\n# toy", 1)[1].splitlines()
    for line in body:
        assert line.startswith("    ") or not any(name in line for name in ("script", "```", "http:", "# no")), line
    assert [f"    {name}" in body for name in HOSTILE] == [True] * 5


def test_the_card_of_somebody_else_is_kept(
    manifest: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "README.md").write_text("my notes")
    with pytest.raises(UserError, match="give another folder"):
        write_card(manifest, tmp_path, tmp_path / "mine")
    assert (tmp_path / "mine" / "README.md").read_text() == "my notes"
    with pytest.raises(UserError, match="is the folder of the manifests: give another folder"):
        write_card(manifest, tmp_path, tmp_path / "manifests")
    assert run(["card", "toy", "--home", str(tmp_path)], monkeypatch) == 0
    capsys.readouterr()
    assert run(["card", "toy", "--home", str(tmp_path), "--json"], monkeypatch) == 0  # again over its own
    files = json.loads(capsys.readouterr().out)
    assert sorted(files) == ["README.md", "croissant.json", "toy.parquet"]
    assert Path(files["croissant.json"]).parent == tmp_path / "reports" / "toy" / "card"
