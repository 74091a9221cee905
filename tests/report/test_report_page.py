"""The pages of the report: whole, self-contained, escaped, the same every time; and the rules behind its pictures."""

from __future__ import annotations

import hashlib
import re
import shutil
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from helpers.pages import EVIL, Page
from helpers.report_home import Home, make_home
from sklearn.metrics import confusion_matrix

from pipeline.cache import find_caches, open_cache
from pipeline.evaluation.evaluate import evaluate
from pipeline.report import evidence, numbers, write_report
from pipeline.report.figures import confusions
from pipeline.report.markdown import escape
from pipeline.report.results import TEXT_ONLY, collect
from pipeline.training.heads import plan_head, resolve_settings, train_head

CLASSES = [f"class {k}" for k in range(8)]


def fill(home: Home, evil: str = "") -> None:
    """Three methods with two seeds each, one override and one text-only diagnostic."""
    for method, strength in (("baseline", 1.5), ("ema", 2.0), (f"seda{evil}".replace("/", ""), 1.4)):
        for seed in range(2):
            run = home.train(home.config(method, {"tau": 0.1, "kind": f"mlp{evil}"}), seed)
            home.evaluate(run, home.logits(strength, seed + len(method)))
            if seed == 0:
                home.evaluate(run, home.logits(strength, seed + 5), name="test@draws=8")
    home.evaluate(home.train(home.config("baseline", {"kind": f"linear{evil}"}, image="text"), 0), home.logits(4.0, 9))


def test_page_is_whole_and_needs_nothing_else(tmp_path: Path) -> None:
    fill(make_home(tmp_path, CLASSES))
    page, text = write_report(tmp_path, "toy")
    assert (page, text) == (tmp_path / "reports" / "toy" / "index.html", tmp_path / "reports" / "toy" / "report.md")
    seen = Page(page)
    sections = ["Results on the test split", "Training", "Feature space", "What changes between classes", "Single examples"]
    facts = ["CC BY 4.0", "somebody", "reads test text", "The test split was read 10 times", "torch 2.11"]
    for words in [*sections, "Provenance", *facts]:
        assert words in seen.text
    assert len(seen.drawings) == 4
    tags = {tag for tag, _ in seen.elements}
    assert not tags & {"script", "link", "iframe", "object", "svg", "a"}
    for _, attributes in seen.elements:
        assert not [key for key in attributes if key.startswith("on") or key == "href"]
        assert (attributes.get("src") or "data:").startswith("data:")
    assert "url(" not in seen.text
    assert "@import" not in seen.text


def test_nothing_in_the_data_becomes_markup(tmp_path: Path) -> None:
    classes = [f"{k} {EVIL}" for k in range(3)]
    meta = {"media_type": "image", "licence": EVIL, EVIL: {"nested": EVIL}}
    home = make_home(tmp_path, classes, meta=meta)
    fill(home, EVIL)
    page, text = write_report(tmp_path, "toy")
    seen = Page(page)
    assert "script" not in {tag for tag, _ in seen.elements}
    assert not [key for _, attributes in seen.elements for key in attributes if key.startswith("on")]
    assert EVIL in seen.text
    for drawing in seen.drawings:
        assert {element.tag.rpartition("}")[2] for element in ElementTree.fromstring(drawing).iter()}.isdisjoint(
            {"script", "a"}
        )
        assert b"alert" not in drawing
    markdown = text.read_text(encoding="utf-8")
    assert "<" not in markdown
    for block in re.findall(r"(?:^\|.*\n)+", markdown, flags=re.MULTILINE):
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}) == 1


def test_sample_ids_are_escaped(tmp_path: Path) -> None:
    home = make_home(tmp_path, CLASSES, id_prefix=EVIL)
    fill(home)
    page, text = write_report(tmp_path, "toy")
    seen = Page(page)
    assert f"{EVIL} 0" in seen.text
    assert "script" not in {tag for tag, _ in seen.elements}
    assert "<" not in text.read_text(encoding="utf-8")


def test_same_runs_give_the_same_bytes(tmp_path: Path) -> None:
    pages = []
    for name in ("one", "two"):
        fill(make_home(tmp_path / name, CLASSES))
        pages.append([path.read_bytes() for path in write_report(tmp_path / name, "toy")])
    assert pages[0] == pages[1]


def test_without_a_baseline_or_a_second_seed_the_page_says_so(tmp_path: Path) -> None:
    home = make_home(tmp_path, CLASSES)
    home.evaluate(home.train(home.config("ema", {}), 0), home.logits(2.0, 1))
    seen = Page(write_report(tmp_path, "toy")[0])
    assert "nothing is claimed" in seen.text
    assert "no baseline on these features; train one with: diffalign train-head --dataset toy --method baseline" in seen.text
    assert "a row with one seed has no spread" in seen.text
    assert "needs an evaluated baseline and one more evaluated method" in seen.text


def test_before_any_evaluation_there_are_curves_and_a_command(tmp_path: Path) -> None:
    home = make_home(tmp_path, CLASSES)
    home.train(home.config("baseline", {}), 0)
    home.train(home.config("ema", {}), 0).path.joinpath("done").unlink()
    seen = Page(write_report(tmp_path, "toy")[0])
    assert "Nothing has been evaluated on the test split yet" in seen.text
    assert "These runs have never read the test split." in seen.text
    assert "Left out as not finished: 1 run;" in seen.text
    assert len(seen.drawings) == 1


def test_lost_media_and_lost_caches_are_said_not_fatal(tmp_path: Path) -> None:
    home = make_home(tmp_path, CLASSES)
    fill(home)
    for file in (tmp_path / "media").iterdir():
        file.unlink()
    for file in (tmp_path / "caches").glob("*/image-*/features/c/0/0"):
        file.unlink()
    seen = Page(write_report(tmp_path, "toy")[0])
    assert "not available" in seen.text
    assert "The image features cannot be read, so there is no t-SNE" in seen.text


def test_features_that_overflowed_are_left_out_by_name(tmp_path: Path) -> None:
    home = make_home(tmp_path, CLASSES)
    fill(home)
    (path,) = tmp_path.glob("runs/toy/ema-*/seed0/predictions-test.npz")
    with np.load(path) as arrays:
        changed = {**arrays, "feature": np.full_like(arrays["feature"], np.inf)}
    np.savez_compressed(path, **changed)
    seen = Page(write_report(tmp_path, "toy")[0])
    assert "Left out, for their stored features are not finite or of other examples: ema." in seen.text
    assert len(seen.drawings) == 4


def test_runs_of_an_older_manifest_are_named_and_in_no_picture(tmp_path: Path) -> None:
    fill(make_home(tmp_path / "old", CLASSES))
    make_home(tmp_path / "new", [*CLASSES, "a new class"])
    (tmp_path / "old" / "manifests").rename(tmp_path / "gone")
    (tmp_path / "new" / "manifests").rename(tmp_path / "old" / "manifests")
    seen = Page(write_report(tmp_path / "old", "toy")[0])
    assert "Trained on another version of the manifest, and therefore in no picture: baseline, ema, seda" in seen.text
    assert "there are no curves" in seen.text


def test_multi_label_data_shows_average_precision_per_class(tmp_path: Path) -> None:
    home = make_home(tmp_path, CLASSES, label_kind="multi")
    for method, strength in (("baseline", 1.0), ("ema", 3.0)):
        for seed in range(2):
            logits = home.logits(strength, seed)
            hit = home.label[np.arange(len(logits)), logits.argmax(axis=1)]
            terms = {"pre1": 100.0 * hit, "rec1": 100.0 * hit / home.label.sum(axis=1)}
            home.evaluate(home.train(home.config(method, {"label_loss": "bce"}), seed), logits, terms=terms)
    seen = Page(write_report(tmp_path, "toy")[0])
    assert "ema beats the baseline (Pre-1" in seen.text
    assert "overall_pre1" in seen.text
    assert "a metric that is no mean over examples has none" in seen.text
    assert "Average precision per class" in seen.text
    assert "Both are right" in seen.text
    assert len(seen.drawings) == 4


def test_confusion_counts_every_seed_and_shares_add_up(tmp_path: Path) -> None:
    home = make_home(tmp_path, [f"class {k}" for k in range(30)], num_test=150)
    predicted = []
    for seed in range(2):
        logits = home.logits(1.0, seed)
        home.evaluate(home.train(home.config("baseline", {}), seed), logits)
        predicted.append(logits.argmax(axis=1))
    (row,) = collect(tmp_path, "toy", "test").rows
    counts = evidence.confusion(row, 30)
    np.testing.assert_array_equal(counts, confusion_matrix(np.tile(home.label, 2), np.concatenate(predicted), labels=range(30)))
    classes = evidence.most_confused(counts, counts)
    share = evidence.shares(counts, classes)
    assert share.shape == (evidence.NUM_CONFUSED, evidence.NUM_CONFUSED + 1)
    np.testing.assert_allclose(share.sum(axis=1), 1.0)
    wrong = [sum(counts[k, j] + counts[j, k] for j in range(30) if j != k) for k in range(30)]
    assert min(wrong[k] for k in classes) >= max(wrong[k] for k in range(30) if k not in classes)


def test_examples_are_the_first_of_every_case_by_hash() -> None:
    ids = [f"sample {k}" for k in range(50)]
    right = [np.arange(50) % 2 == 0, np.arange(50) % 3 == 0]
    chosen = evidence.choose_examples(right, ids, 2)
    assert list(chosen) == [(True, True), (True, False), (False, True), (False, False)]
    for case, rows in chosen.items():
        alike = [k for k in range(50) if (right[0][k], right[1][k]) == case]
        assert rows == sorted(alike, key=lambda k: hashlib.sha256(ids[k].encode()).hexdigest())[:2]
        assert evidence.count_cases(right)[case] == len(alike)


@pytest.mark.parametrize("multi", [False, True])
def test_groups_are_the_most_frequent_classes(multi: bool) -> None:
    label = np.repeat(np.arange(7), [3, 9, 4, 8, 50, 6, 5])
    if multi:
        label = np.eye(7)[label]
        label[0, 4] = 1.0  # a row of class 0 that is also in the most frequent class
        label[3, 3] = 1.0  # a row of two chosen classes: left out
    rows, group, classes = evidence.choose_groups(label)
    assert classes == [1, 3, 4, 5, 6]
    assert np.bincount(group).tolist() == ([8, 8, 40, 6, 5] if multi else [9, 8, 40, 6, 5])
    truth = label[rows][:, classes].argmax(axis=1) if multi else [classes.index(k) for k in label[rows]]
    assert group.tolist() == list(truth)


def test_drawings_follow_the_page_and_hold_no_date() -> None:
    matrix = np.eye(3)
    drawing = confusions(matrix, matrix, ["a", "b", "c"], ("before", "after")).decode()
    assert "currentColor" in drawing
    assert "prefers-color-scheme:dark" in drawing
    assert "<dc:date>" not in drawing
    ElementTree.fromstring(drawing)


def test_markdown_escape_leaves_no_markup() -> None:
    assert escape("a|b\n<b>*c* _d_ `e` [f](g)") == r"a\|b &lt;b&gt;\*c\* \_d\_ \`e\` \[f\](g)"


def test_report_reads_what_the_stages_write(tiny_home: Path, tmp_path: Path) -> None:
    home = Path(shutil.copytree(tiny_home, tmp_path / "home"))
    caches = {open_cache(path).kind: path.name for path in find_caches(home, "tiny")}
    expected = {}
    for method, changes, image in (("baseline", {}, "dense"), ("ema", {"width": 16}, "dense"), ("baseline", {}, "ragged")):
        settings, training = resolve_settings("tiny", method, "head", changes, {"epochs": 2, "batch_size": 8})
        encoders = {"image": caches[image], "text": caches["ragged"]}
        run = train_head(plan_head(home, "tiny", method, settings, training, 0, encoders), progress=False)
        label = method if image == "dense" else TEXT_ONLY
        expected[label] = evaluate(home, run, "test", {})["metrics"]
    frame = numbers(home, "tiny")
    assert {row["method"]: {name: row[name] for name in ("acc1", "acc5")} for _, row in frame.iterrows()} == expected
    seen = Page(write_report(home, "tiny")[0])
    assert len(seen.drawings) == 4
    assert "The test split was read 3 times" in seen.text
