"""Several own datasets in a home: none is lost to another, and each is prepared again by its name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from helpers.tables import make_empty_files, write_csv

import pipeline as da
from pipeline.data.manifest_files import read_manifest
from pipeline.data.prepare import prepare
from pipeline.data.recipes import read_recipe, recipe_path


def make_photos(root: Path, *kinds: str, number: int = 20) -> Path:
    make_empty_files(root, *(f"{i}.jpg" for i in range(number)))
    rows = [
        {"file_name": f"{i}.jpg", "label": kinds[i % len(kinds)], "text": f"{kinds[i % len(kinds)]} {i}"} for i in range(number)
    ]
    write_csv(root / "photos.csv", rows)
    return root


COLUMNS = {"file": "photos.csv"}


def test_another_table_does_not_replace_one_of_the_same_name(tmp_path: Path) -> None:
    first, second = (make_photos(tmp_path / name, name, "dog") for name in ("one", "two"))
    home = tmp_path / "home"
    prepare("table", first, home, COLUMNS)
    files = {path: path.read_bytes() for path in (home / "manifests").iterdir()}
    refused = (
        rf"home holds another dataset named 'table': 20 samples of table, photos\.csv in {first}; "
        "give this one a name of its own, --name NAME, or put it in the place of that one, --overwrite"
    )
    with pytest.raises(da.UserError, match=refused):
        prepare("table", second, home, COLUMNS)
    assert {path: path.read_bytes() for path in (home / "manifests").iterdir()} == files
    prepare("table", second, home, COLUMNS, name="two")
    assert read_manifest(home, "table").class_names == ("dog", "one")
    assert read_manifest(home, "two").class_names == ("dog", "two")
    with pytest.raises(da.UserError, match="another dataset named 'two'"):
        da.Workspace(home).prepare("table", first, name="two", settings=COLUMNS)
    da.Workspace(home).prepare("table", first, name="two", overwrite=True, settings=COLUMNS)
    assert read_manifest(home, "two").class_names == ("dog", "one")


def test_other_lists_and_folders_of_one_root_are_other_data(tmp_path: Path) -> None:
    root = make_photos(tmp_path / "root", "cat", "dog")
    write_csv(root / "birds.csv", [{"file_name": f"{i}.jpg", "label": "bird"} for i in range(20)])
    make_empty_files(root, "x/a.jpg", "y/b.jpg")
    home = tmp_path / "home"
    prepare("table", root, home, COLUMNS)
    for settings in ({"file": "birds.csv"}, {}):
        if not settings:
            for number in range(20):
                (root / f"{number}.jpg").unlink()
        with pytest.raises(da.UserError, match="holds another dataset named 'table'"):
            prepare("table", root, home, settings)


def test_the_same_table_may_change_and_move(tmp_path: Path) -> None:
    root, home = make_photos(tmp_path / "root", "cat", "dog"), tmp_path / "home"
    before = prepare("table", root, home, COLUMNS).fingerprint
    make_photos(root, "cat", "dog", "bird", number=30)  # more rows
    assert prepare("table", root, home, COLUMNS).fingerprint != before
    prepare("table", root, home, {**COLUMNS, "splits": "50,25,25"})
    moved = shutil.copytree(root, tmp_path / "moved")
    prepare("table", moved, home, COLUMNS)
    assert read_manifest(home, "table").media_root == moved
    tree = tmp_path / "tree"
    make_empty_files(tree, "a/1.jpg", "b/1.jpg")
    prepare("table", tree, home, {}, name="tree")
    shutil.move(tree, tmp_path / "moved tree")
    prepare("table", tmp_path / "moved tree", home, {}, name="tree")  # the same rows
    make_empty_files(tmp_path / "moved tree", "c/1.jpg")
    prepare("table", tmp_path / "moved tree", home, {}, name="tree")  # more of them, in the same place
    assert len(read_manifest(home, "tree").samples) == 3


def test_an_own_dataset_is_prepared_again_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root, ws = make_photos(tmp_path / "root", "cat", "dog"), da.Workspace(tmp_path / "home")
    monkeypatch.chdir(tmp_path)
    ws.prepare("table", "root", name="photos", splits=(50, 25, 25), settings=COLUMNS)
    first = ws.manifest("photos")
    monkeypatch.chdir("/")
    for again in (lambda: ws.prepare("photos"), lambda: ws.prepare("table", name="photos")):
        assert again().fingerprint == first.fingerprint()
    make_photos(root, "cat", "dog", number=40)
    ws.prepare("photos")
    assert len(ws.manifest("photos").samples) == 40
    assert ws.manifest("photos").meta["options"]["splits"] == {"train": 50, "val": 25, "test": 25}
    ws.prepare("photos", splits=(100, 0, 0))
    assert {sample.split for sample in ws.manifest("photos").samples} == {"train"}
    assert ws.manifest("photos").plugin == "table"
    ws.prepare("photos", name="copy")
    assert ws.manifest("copy").fingerprint() == ws.manifest("photos").fingerprint()
    assert ws.manifest("copy").prepare_command == "diffalign prepare table --name copy"
    for missing in ("other", "photos.fold0of3"):
        with pytest.raises(da.UserError, match="unknown dataset"):
            ws.prepare(missing)


def test_root_says_where_files_moved_to_and_forgets_nothing_else(tmp_path: Path) -> None:
    old, home = make_photos(tmp_path / "old/list", "cat", "dog"), tmp_path / "home"
    table = [{"where": f"{i}.jpg", "what": ("cat", "dog")[i % 2], "says": f"{i}", "album": str(i // 2)} for i in range(20)]
    write_csv(old / "photos.csv", table)
    pictures = old / "in"
    pictures.mkdir()
    for picture in old.glob("*.jpg"):
        picture.rename(pictures / picture.name)
    columns = {"media_column": "where", "label_column": "what", "text_column": "says", "group_column": "album"}
    first = prepare("table", old, home, {**COLUMNS, **columns}, name="photos", image_root=pictures)
    copied = shutil.copytree(home, tmp_path / "copied home")
    moved = old.rename(tmp_path / "moved")
    assert prepare("photos", moved, copied, {}).fingerprint == first.fingerprint
    assert read_manifest(copied, "photos").media_root == moved / "in"
    assert read_recipe(copied, "photos") == ("table", moved, moved / "in", {**COLUMNS, **columns})
    prepare("photos", moved, copied, {"splits": "100,0,0"})
    assert {sample.split for sample in read_manifest(copied, "photos").samples} == {"train"}
    with pytest.raises(da.UserError, match=r"name it: --set file=photos\.csv"):  # a plug-in's own name with a root begins anew
        prepare("table", moved, copied, {}, name="photos")


def test_settings_of_a_package_are_not_kept_and_a_broken_recipe_is_none(tmp_path: Path) -> None:
    ws = da.Workspace(tmp_path / "home")
    ws.prepare("openmoji", aggregate="first")
    ws.prepare("openmoji")
    assert ws.manifest("openmoji").meta["text"]["aggregate"] != "first"
    ws.prepare("table", make_photos(tmp_path / "root", "a", "b"), settings=COLUMNS)
    recipe = read_recipe(ws.home, "table")
    assert recipe is not None
    assert (recipe.plugin, recipe.root, recipe.settings) == ("table", tmp_path / "root", COLUMNS)
    path = recipe_path(ws.home, "table")
    for broken in ("", "[]", "{}", json.dumps({**json.loads(path.read_text()), "settings": 1})):
        path.write_text(broken)
        assert read_recipe(ws.home, "table") is None
        with pytest.raises(da.UserError, match="where are your media"):
            ws.prepare("table")
