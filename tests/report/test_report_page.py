"""The pages of the report are complete, need no other file, are escaped and reproducible; and the rules behind its figures."""

from __future__ import annotations

import hashlib
import re
import shutil
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from helpers.pages import HOSTILE_TEXT, Page, write_page
from helpers.report_home import ReportHome, make_home
from scipy.special import expit, softmax
from sklearn.metrics import confusion_matrix

from pipeline.cache import find_caches, open_cache
from pipeline.evaluation.evaluate import evaluate
from pipeline.report import figure_data, results_frame, write_report
from pipeline.report.figures import draw_confusions
from pipeline.report.markdown import escape_markdown
from pipeline.report.results import TEXT_ONLY_LABEL, collect_results
from pipeline.training.heads import plan_head, resolve_head_settings, train_head

CLASSES = [f"class {k}" for k in range(8)]


def fill(home: ReportHome, hostile: str = "") -> None:
    """Write three methods with three seeds each, one evaluation with other settings and one text-only diagnostic.

    `hostile` is added to the name of a method and to values of settings.
    """
    for method, strength in (("baseline", 1.5), ("ema", 2.0), (f"seda{hostile}".replace("/", ""), 1.4)):
        for seed in range(3):
            run = home.train(home.config(method, {"tau": 0.1, "kind": f"mlp{hostile}"}), seed)
            home.evaluate(run, home.logits(strength, seed + len(method)))
            if seed == 0:
                home.evaluate(run, home.logits(strength, seed + 5), name="test@draws=8")
    home.evaluate(home.train(home.config("baseline", {"kind": f"linear{hostile}"}, image="text"), 0), home.logits(4.0, 9))


def test_page_is_complete_and_needs_no_other_file(tmp_path: Path) -> None:
    fill(make_home(tmp_path, CLASSES))
    page, text = write_page(tmp_path, "toy")
    assert (page, text) == (tmp_path / "reports" / "toy" / "index.html", tmp_path / "reports" / "toy" / "report.md")
    parsed = Page(page)
    sections = ["Results on the test split", "Training", "Feature space", "What changes between classes", "Single examples"]
    facts = ["CC BY 4.0", "somebody", "reads test text", "The test split was read 13 times", "torch 2.11"]
    for words in [*sections, "Provenance", *facts]:
        assert words in parsed.text
    assert len(parsed.drawings) == 5
    tags = {tag for tag, _ in parsed.elements}
    assert not tags & {"link", "iframe", "object", "svg"}
    assert parsed.foreign_scripts == []
    places = {f"#{attributes['id']}" for _, attributes in parsed.elements if "id" in attributes}
    for _, attributes in parsed.elements:
        assert not [key for key in attributes if key.startswith("on")]
        assert attributes.get("href", "#section-1") in places  # the list of contents, and nothing outside of the page
        assert (attributes.get("src") or "data:").startswith("data:")
    assert "url(" not in parsed.text
    assert "@import" not in parsed.text


def test_nothing_in_the_data_becomes_markup(tmp_path: Path) -> None:
    classes = [f"{k} {HOSTILE_TEXT}" for k in range(3)]
    meta = {"media_type": "image", "licence": HOSTILE_TEXT, HOSTILE_TEXT: {"nested": HOSTILE_TEXT}}
    home = make_home(tmp_path, classes, meta=meta)
    fill(home, HOSTILE_TEXT)
    page, text = write_page(tmp_path, "toy")
    parsed = Page(page)
    assert parsed.foreign_scripts == []
    assert not [key for _, attributes in parsed.elements for key in attributes if key.startswith("on")]
    assert HOSTILE_TEXT in parsed.text
    for drawing in parsed.drawings:
        assert {element.tag.rpartition("}")[2] for element in ElementTree.fromstring(drawing).iter()}.isdisjoint(
            {"script", "a"}
        )
        assert b"alert" not in drawing
    markdown = text.read_text(encoding="utf-8")
    assert "<" not in markdown
    for block in re.findall(r"(?:^\|.*\n)+", markdown, flags=re.MULTILINE):
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}) == 1


def test_sample_ids_are_escaped(tmp_path: Path) -> None:
    home = make_home(tmp_path, CLASSES, id_prefix=HOSTILE_TEXT)
    fill(home)
    page, text = write_page(tmp_path, "toy")
    parsed = Page(page)
    assert f"{HOSTILE_TEXT} 0" in parsed.text
    assert parsed.foreign_scripts == []
    assert "<" not in text.read_text(encoding="utf-8")


def test_same_runs_give_the_same_bytes(tmp_path: Path) -> None:
    pages = []
    for name in ("one", "two"):
        fill(make_home(tmp_path / name, CLASSES))
        pages.append([path.read_bytes() for path in write_page(tmp_path / name, "toy")])
    assert pages[0] == pages[1]


def test_without_a_baseline_or_a_second_seed_the_page_says_so(tmp_path: Path) -> None:
    home = make_home(tmp_path, CLASSES)
    home.evaluate(home.train(home.config("ema", {}), 0), home.logits(2.0, 1))
    parsed = Page(write_page(tmp_path, "toy")[0])
    assert "nothing is claimed" in parsed.text
    assert "no baseline on these features; train one with: diffalign train-head --dataset toy --method baseline" in parsed.text
    assert "Of one seed; a row with one seed has no spread" in parsed.text
    assert "Mean ±" not in parsed.text
    assert "needs an evaluated baseline and one more evaluated method" in parsed.text


def test_before_any_evaluation_there_are_curves_and_a_command(tmp_path: Path) -> None:
    home = make_home(tmp_path, CLASSES)
    home.train(home.config("baseline", {}), 0)
    home.train(home.config("ema", {}), 0).path.joinpath("done").unlink()
    parsed = Page(write_page(tmp_path, "toy")[0])
    assert "Nothing has been evaluated on the test split yet" in parsed.text
    header = (tmp_path / "reports" / "toy" / "results.csv").read_text()
    assert header == "method,kind,group,name,seeds,train_seconds,params,p_holm,verdict,reason\n"
    assert "These runs have never read the test split." in parsed.text
    assert "Left out as not finished: 1 run;" in parsed.text
    assert len(parsed.drawings) == 1


def test_a_report_shows_what_is_done(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    home = make_home(tmp_path, CLASSES)
    home.train(home.config("baseline", {}), 0)
    write_report(tmp_path, "toy", with_files=False)
    assert capsys.readouterr().err == ""
    write_report(tmp_path, "toy", with_files=False, progress=True)
    assert re.search(r"report on toy: 100%.*\d+/\d+", capsys.readouterr().err)


def test_missing_media_and_damaged_caches_are_reported_and_not_fatal(tmp_path: Path) -> None:
    home = make_home(tmp_path, CLASSES)
    fill(home)
    for file in (tmp_path / "media").iterdir():
        file.unlink()
    for file in (tmp_path / "caches").glob("*/image-*/features/c/0/0"):
        file.unlink()
    parsed = Page(write_page(tmp_path, "toy")[0])
    assert "not available" in parsed.text
    assert "The image features cannot be read, so there is no t-SNE" in parsed.text


def test_features_that_overflowed_are_left_out_by_name(tmp_path: Path) -> None:
    home = make_home(tmp_path, CLASSES)
    fill(home)
    (path,) = tmp_path.glob("runs/toy/ema-*/seed0/predictions-test.npz")
    with np.load(path) as arrays:
        changed = {**arrays, "feature": np.full_like(arrays["feature"], np.inf)}
    np.savez_compressed(path, **changed)
    parsed = Page(write_page(tmp_path, "toy")[0])
    assert "Left out, for their stored features are not finite or of other examples: ema." in parsed.text
    assert len(parsed.drawings) == 5


def test_runs_of_an_older_manifest_are_named_and_in_no_picture(tmp_path: Path) -> None:
    fill(make_home(tmp_path / "old", CLASSES))
    make_home(tmp_path / "new", [*CLASSES, "a new class"])
    (tmp_path / "old" / "manifests").rename(tmp_path / "gone")
    (tmp_path / "new" / "manifests").rename(tmp_path / "old" / "manifests")
    parsed = Page(write_page(tmp_path / "old", "toy")[0])
    assert (
        "on other samples than are prepared now, so not to be compared with other rows, and in no picture: baseline, ema, seda"
        in (parsed.text)
    )
    assert "there are no curves" in parsed.text


def test_multi_label_data_shows_average_precision_per_class(tmp_path: Path) -> None:
    home = make_home(tmp_path, CLASSES, label_kind="multi")
    for method, strength in (("baseline", 1.0), ("ema", 3.0)):
        for seed in range(5):
            logits = home.logits(strength, seed)
            hit = home.label[np.arange(len(logits)), logits.argmax(axis=1)]
            per_sample = {"pre1": 100.0 * hit, "rec1": 100.0 * hit / home.label.sum(axis=1)}
            home.evaluate(home.train(home.config(method, {"label_loss": "bce"}), seed), logits, per_sample=per_sample)
    parsed = Page(write_page(tmp_path, "toy")[0])
    assert "ema beats the baseline (Pre-1" in parsed.text
    assert "overall_pre1" in parsed.text
    assert "a metric that is no mean over examples has none" in parsed.text
    assert "Average precision per class" in parsed.text
    assert "Both are right" in parsed.text
    assert len(parsed.drawings) == 4


@pytest.mark.parametrize("page", ["html", "markdown"])
def test_every_table_of_results_has_verdicts(tmp_path: Path, page: str) -> None:
    home = make_home(tmp_path, CLASSES, label_kind="multi")
    for method, image in (("baseline", "image"), ("ema", "image"), ("baseline", "text")):
        for seed in range(3):
            logits = home.logits(2.0, seed)
            hit = home.label[np.arange(len(logits)), logits.argmax(axis=1)]
            per_sample = {"pre1": 100.0 * hit, "rec1": 100.0 * hit / home.label.sum(axis=1)}
            home.evaluate(home.train(home.config(method, {}, image), seed), logits, per_sample=per_sample)
    html, text = write_page(tmp_path, "toy")
    if page == "html":
        found = re.findall(r"<thead>.*?</thead>", html.read_text(encoding="utf-8"))
        headers = [header for header in found if ">method<" in header]
        verdicts = [">verdict</th>" in header for header in headers]
        first = re.findall(r"<th [^>]*>(.*?)</th>", headers[0])
    else:
        headers = re.findall(r"^(\| method \|.*)\n\| ---", text.read_text(encoding="utf-8"), flags=re.MULTILINE)
        verdicts = ["| verdict |" in header for header in headers]
        first = headers[0].strip("| ").split(" | ")
    assert first[:4] == ["method", "Pre-1", "Pre-1 vs baseline", "verdict"]
    assert verdicts == [True] * 4 + [False]  # results, differences, more metrics, diagnostics; and the log of reads
    assert "3 of 5 seeds" in (html if page == "html" else text).read_text(encoding="utf-8")


@pytest.mark.parametrize("label_loss", ["softmax_kl", "bce"])
def test_cards_show_confidences_of_log_scores_as_a_distribution(tmp_path: Path, label_loss: str) -> None:
    home = make_home(tmp_path, CLASSES, label_kind="multi")
    z = home.logits(3.0, 1)
    hit = home.label[np.arange(len(z)), z.argmax(axis=1)]
    for method in ("baseline", "marnet"):
        logits = z if method == "baseline" else np.log(softmax(z, axis=1) / 12)  # as HM gives them: they add up to 1/12
        run = home.train(home.config(method, {"label_loss": label_loss}), 0)
        home.evaluate(run, logits, per_sample={"pre1": 100.0 * hit})
    rows = collect_results(tmp_path, "toy", "test").rows
    own, fused = (np.exp(figure_data.read_predictions(row).log_scores) for row in rows)
    np.testing.assert_allclose(own, softmax(z, axis=1) if label_loss == "softmax_kl" else expit(z), rtol=1e-4)
    if label_loss == "softmax_kl":
        np.testing.assert_allclose(fused, own, rtol=1e-4)
        best = figure_data.average_precisions(rows[0], np.arange(8))
        np.testing.assert_allclose(best, figure_data.average_precisions(rows[1], np.arange(8)))


def test_methods_are_compared_across_data_sets(tmp_path: Path) -> None:
    for dataset, strengths in (("toy", (1.0, 3.0)), ("other", (1.5, 3.5)), ("third", (1.0, 1.0))):
        home = make_home(tmp_path, CLASSES, num_test=120, dataset=dataset)
        for method, strength in zip(("baseline", "ema"), strengths, strict=True):
            for seed in range(5):
                home.evaluate(home.train(home.config(method, {}), seed), home.logits(strength, seed + len(method)))
    html, markdown = write_page(tmp_path, "toy", across=["other", "toy"])
    (line,) = [line for line in markdown.read_text(encoding="utf-8").splitlines() if line.startswith("| ema | toy, other |")]
    frames = [results_frame(tmp_path, name).set_index("method") for name in ("toy", "other")]
    gains = [frame["acc1"]["ema"] - frame["acc1"]["baseline"] for frame in frames]
    shown = [float(cell.split()[0]) for cell in line.split("|")[3:5]]
    assert min(gains) <= shown[0] <= max(gains)
    assert shown[1] == 1.0
    assert line.endswith("| beats the baseline |")
    assert "Across data sets: toy, other" in Page(html).text
    assert "Across data sets" not in Page(write_page(tmp_path, "toy")[0]).text


def test_confusion_counts_every_seed_and_shares_add_up(tmp_path: Path) -> None:
    home = make_home(tmp_path, [f"class {k}" for k in range(30)], num_test=150)
    predicted = []
    for seed in range(2):
        logits = home.logits(1.0, seed)
        home.evaluate(home.train(home.config("baseline", {}), seed), logits)
        predicted.append(logits.argmax(axis=1))
    (row,) = collect_results(tmp_path, "toy", "test").rows
    counts = figure_data.confusion_counts(row, 30)
    np.testing.assert_array_equal(counts, confusion_matrix(np.tile(home.label, 2), np.concatenate(predicted), labels=range(30)))
    classes = figure_data.most_confused_classes(counts, counts)
    share = figure_data.confusion_shares(counts, classes)
    assert share.shape == (figure_data.NUM_CONFUSED_CLASSES, figure_data.NUM_CONFUSED_CLASSES + 1)
    np.testing.assert_allclose(share.sum(axis=1), 1.0)
    wrong = [sum(counts[k, j] + counts[j, k] for j in range(30) if j != k) for k in range(30)]
    assert min(wrong[k] for k in classes) >= max(wrong[k] for k in range(30) if k not in classes)


def test_examples_are_the_first_of_every_case_by_hash() -> None:
    ids = [f"sample {k}" for k in range(50)]
    right = [np.arange(50) % 2 == 0, np.arange(50) % 3 == 0]
    chosen = figure_data.choose_examples(right, ids, 2)
    assert list(chosen) == [(True, True), (True, False), (False, True), (False, False)]
    for case, rows in chosen.items():
        alike = [k for k in range(50) if (right[0][k], right[1][k]) == case]
        assert rows == sorted(alike, key=lambda k: hashlib.sha256(ids[k].encode()).hexdigest())[:2]
        assert figure_data.count_cases(right)[case] == len(alike)


@pytest.mark.parametrize("multi", [False, True])
def test_groups_are_the_most_frequent_classes(multi: bool) -> None:
    label = np.repeat(np.arange(7), [3, 9, 4, 8, 50, 6, 5])
    if multi:
        label = np.eye(7)[label]
        label[0, 4] = 1.0  # a row of class 0 that is also in the most frequent class
        label[3, 3] = 1.0  # a row of two chosen classes: left out
    rows, group, classes = figure_data.choose_tsne_samples(label)
    assert classes == [1, 3, 4, 5, 6]
    assert np.bincount(group).tolist() == ([8, 8, 40, 6, 5] if multi else [9, 8, 40, 6, 5])
    truth = label[rows][:, classes].argmax(axis=1) if multi else [classes.index(k) for k in label[rows]]
    assert group.tolist() == list(truth)


def test_figures_follow_the_colours_of_the_page_and_contain_no_date() -> None:
    matrix = np.eye(3)
    drawing = draw_confusions(matrix, matrix, ["a", "b", "c"], ("before", "after")).decode()
    assert "currentColor" in drawing
    assert "prefers-color-scheme:dark" in drawing
    assert "<dc:date>" not in drawing
    ElementTree.fromstring(drawing)


def test_names_with_letters_that_the_font_lacks_stay_text() -> None:
    """They would be drawn as boxes. The browser finds fonts for text; other figures are drawn as outlines, and hold none."""
    matrix, names = np.eye(3), ["猫", "🐈 <b>cat</b>", "चीता\x07"]
    drawing = draw_confusions(matrix, matrix, names, ("before", "after"))
    texts = [element.text for element in ElementTree.fromstring(drawing).iter("{http://www.w3.org/2000/svg}text")]
    assert {"猫", "🐈 <b>cat</b>", "चीता", "predicted"} <= set(texts)
    assert drawing == draw_confusions(matrix, matrix, names, ("before", "after"))
    assert b"<text" not in draw_confusions(matrix, matrix, ["кот", "γάτα", "$chat$"], ("before", "after"))


def test_markdown_escape_leaves_no_markup() -> None:
    assert escape_markdown("a|b\n<b>*c* _d_ `e` [f](g)") == r"a\|b &lt;b&gt;\*c\* \_d\_ \`e\` \[f\](g)"


def test_report_reads_what_the_stages_write(tiny_home: Path, tmp_path: Path) -> None:
    home = Path(shutil.copytree(tiny_home, tmp_path / "home"))
    caches = {open_cache(path).kind: path.name for path in find_caches(home, "tiny")}
    expected: dict[str, list[dict[str, float]]] = {}
    for method, changes, image in (("baseline", {}, "dense"), ("ema", {"width": 16}, "dense"), ("baseline", {}, "ragged")):
        settings, training = resolve_head_settings("tiny", method, "head", changes, {"epochs": 2, "batch_size": 8})
        encoders = {"image": caches[image], "text": caches["ragged"]}
        for seed in range(3):
            run = train_head(plan_head(home, "tiny", method, settings, training, seed, encoders), progress=False)
            label = method if image == "dense" else TEXT_ONLY_LABEL
            expected.setdefault(label, []).append(evaluate(home, run, "test", {})["metrics"])
    frame = results_frame(home, "tiny").set_index("method")
    assert set(frame.index) == set(expected)
    assert "acc5" not in frame
    for label, records in expected.items():
        assert list(records[0]) == ["acc1", "acc5", "macro_acc", "ece"]
        assert records[0]["acc5"] == 100.0  # of four classes, so that it is no column
        means = {name: np.mean([record[name] for record in records]) for name in records[0] if name != "acc5"}
        assert frame.loc[label, list(means)].to_dict() == pytest.approx(means)
    parsed = Page(write_page(home, "tiny")[0])
    assert len(parsed.drawings) == 5
    assert "The test split was read 9 times" in parsed.text
