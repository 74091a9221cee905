"""The papers' figures: their numbers by other means, what they read, and what they refuse."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from helpers.grid_folders import write_grid
from helpers.report_home import make_home
from helpers.tiny_heads import train_tiny
from scipy.special import softmax
from sklearn.metrics import average_precision_score, confusion_matrix
from sklearn.metrics.pairwise import paired_cosine_distances

from pipeline.data.manifest import Manifest
from pipeline.methods.seda import SeDA
from pipeline.runtime.errors import UserError
from pipeline.runtime.rng import KeyedRNG
from pipeline.runtime.runs import RunFolder
from pipeline.studies.class_path import trace_chain
from pipeline.studies.paper_figures import FIGURES, write_robustness
from pipeline.studies.trained_head import TrainedHead

CLASSES = [f"class {k}" for k in range(8)]


@pytest.fixture(scope="module")
def home(tiny_home: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home with a head of every method that a path or a t-SNE needs."""
    folder = Path(shutil.copytree(tiny_home, tmp_path_factory.mktemp("figures") / "home"))
    for method in ("cdr", "l2", "seda"):
        train_tiny(folder, method)
    return folder


def runs_of(home: Path, dataset: str = "tiny") -> dict[str, RunFolder]:
    return {path.parent.name.rpartition("-")[0]: RunFolder.at(path) for path in home.glob(f"runs/{dataset}/*/seed0")}


def read(folder: Path, name: str) -> pd.DataFrame:
    return pd.read_csv(folder / f"{name}.csv")


def precision_by_class(label: np.ndarray, logits: np.ndarray) -> np.ndarray:
    return np.array([average_precision_score(label[:, k], logits[:, k]) for k in range(label.shape[1])])


def test_feature_space_shows_every_sample_before_and_after(home: Path, tiny_manifest: Manifest, tmp_path: Path) -> None:
    files = FIGURES["marnet-fig3"].write(home, "tiny", runs_of(home), tmp_path)
    assert [path.name for path in files] == [f"marnet-fig3.{suffix}" for suffix in ("svg", "pdf", "csv", "txt")]
    points = read(tmp_path, "marnet-fig3")
    expected = [(sample.id, tiny_manifest.class_names[sample.labels[0]]) for sample in tiny_manifest.split("test")]
    for _, panel in points.groupby("panel"):
        assert list(zip(panel["id"], panel["class"], strict=True)) == expected
    assert "the same 12 samples" in (tmp_path / "marnet-fig3.txt").read_text()


def test_chain_is_that_of_prediction_step_by_step(home: Path, tiny_manifest: Manifest) -> None:
    """An own loop over eq. 12 of DDIM with eta = 0, from the same noise, meets the same states and ends in the same feature."""
    head = TrainedHead.of(runs_of(home)["seda"])
    table = head.read(home, tiny_manifest, tiny_manifest.split("val"), ("image", "text"), "test")
    chain = trace_chain(head, table, 3)
    method = head.method
    assert isinstance(method, SeDA)
    with torch.no_grad():
        image, rng = table.columns["image"], KeyedRNG.seeded(0, table.columns["key"]).at("predict").at("draw", 0)
        x_v, x_s = method.space.image(image), method.space.text(table.columns["text"])
        abar = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 20, dtype=torch.float64), 0)
        x, states = rng.at("start").normal(16), []
        for step, following in zip(chain.steps, (*chain.steps[1:], None), strict=True):
            states.append(x)
            x_0 = method.denoiser(x, method.denoiser.embed_step(torch.tensor(step)), method.denoiser.image_context(x_v))
            a, b = abar[step], abar[following] if following is not None else torch.tensor(1.0)
            x = (b.sqrt() * x_0 + (1 - b).sqrt() * (x - a.sqrt() * x_0) / (1 - a).sqrt()).float()
    states.append(x)
    assert chain.steps == (19, 15, 11, 7, 3)
    assert chain.is_dsl == (False, False, False, False, True)  # t = 5
    assert (chain.kept[0], chain.kept[-1]) == (0, 5)
    torch.testing.assert_close(chain.states, torch.stack([states[k] for k in chain.kept]), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(chain.states[-1], head.feature(table))
    expected = [[1 - paired_cosine_distances(state, target).mean() for target in (x_v, x_s)] for state in states]
    np.testing.assert_allclose(chain.state_cosines, expected, atol=1e-5)


def test_class_path_has_all_states_of_one_class_and_marks_the_stages(home: Path, tmp_path: Path) -> None:
    files = FIGURES["seda-fig4"].write(home, "tiny", runs_of(home), tmp_path)
    assert len(files) == 8
    points = read(tmp_path, "seda-fig4")
    ids = {"red-7", "red-8", "red-9"}
    left, right = (panel.groupby("state")["id"].agg(set) for _, panel in points.groupby("panel"))
    assert set(left.index) == {"text", "aligned"}  # image features are 32 wide, and texts 24
    assert {"image", "text", "n = 20 (DST)", "aligned"} <= set(right.index)
    assert all(found == ids for found in [*left, *right])
    cosines = read(tmp_path, "seda-fig4-cosines")
    assert cosines["step"].tolist() == [20, 16, 12, 8, 4, 0]
    assert cosines["stage"].tolist() == ["DST", "DST", "DST", "DST", "DSL", "aligned"]
    last = cosines["prediction_to_text"].iloc[4]
    assert cosines["state_to_text"].iloc[5] == pytest.approx(last)
    assert "No prediction reads these texts" in (tmp_path / "seda-fig4.txt").read_text()


def test_reads_of_the_test_split_are_logged_and_others_are_not(home: Path, tiny_manifest: Manifest) -> None:
    head = TrainedHead.of(runs_of(home)["cdr"])
    log = head.run.path / "test_reads.jsonl"
    for split, reason in (("val", "one"), ("test", "two")):
        head.read(home, tiny_manifest, tiny_manifest.split(split), ("image",), reason)
    reads = [json.loads(line)["evaluation"] for line in log.read_text().splitlines()]
    assert "one" not in reads
    assert reads[-1] == "two"


def test_examples_show_the_best_five_of_a_softmax(tmp_path: Path) -> None:
    home = make_home(tmp_path, CLASSES)
    logits = {"baseline": home.logits(1.0, 1), "cdr": home.logits(1.5, 2)}
    runs = {method: home.train(home.config(method, {}), 0) for method in logits}
    for method, own in logits.items():
        home.evaluate(runs[method], own)
    FIGURES["marnet-fig4"].write(tmp_path, "toy", runs, tmp_path / "out")
    shown = read(tmp_path / "out", "marnet-fig4")
    ids = [sample.id for sample in home.manifest.split("test")]
    right = {method: own.argmax(axis=1) == home.label for method, own in logits.items()}
    cases = {(bool(a), bool(b)) for a, b in zip(*right.values(), strict=True)}
    assert shown["case"].nunique() == len(cases) == 4
    for (sample_id, method), rows in shown.groupby(["id", "method"]):
        index = ids.index(str(sample_id))
        confidence = softmax(logits[str(method).lower()][index].astype(float))
        best = np.argsort(-confidence)[:5]
        assert rows["class"].tolist() == [CLASSES[k] for k in best]
        np.testing.assert_allclose(rows["confidence"], confidence[best], rtol=1e-4)
        assert rows["is_label"].tolist() == [k == home.label[index] for k in best]


def test_confusion_is_that_of_scikit_learn_on_classes_chosen_on_validation(tmp_path: Path) -> None:
    home = make_home(tmp_path, CLASSES, num_test=200)
    runs = {method: home.train(home.config(method, {}), 0) for method in ("baseline", "seda")}
    on_val = np.where(home.label == 6, 2, home.label)  # all of class 6 is taken for class 2
    home.evaluate(runs["baseline"], 9.0 * np.eye(8, dtype=np.float32)[on_val], name="val")
    shown = {"Baseline": home.logits(1.0, 1), "SeDA": home.logits(2.0, 2)}
    for run, logits in zip(runs.values(), shown.values(), strict=True):
        home.evaluate(run, logits)
    FIGURES["seda-fig5"].write(tmp_path, "toy", runs, tmp_path / "out")
    found = read(tmp_path / "out", "seda-fig5-confusion")
    classes = found["true"].unique().tolist()
    assert len(classes) == 5
    assert {"class 2", "class 6"} < set(classes)
    for method, rows in found.groupby("method"):
        expected = confusion_matrix(home.label, shown[str(method)].argmax(axis=1))
        counted = {(row["true"], row["predicted"]): row["samples"] for row in rows.to_dict("records")}
        for (true, predicted), number in counted.items():
            assert number == expected[CLASSES.index(true), CLASSES.index(predicted)]
        assert sum(counted.values()) == sum(expected[CLASSES.index(name)].sum() for name in classes)


def test_multi_label_data_show_the_classes_that_are_hardest_on_validation(tmp_path: Path) -> None:
    home = make_home(tmp_path, CLASSES, label_kind="multi")
    runs = {method: home.train(home.config(method, {"label_loss": "bce"}), 0) for method in ("baseline", "seda")}
    shown = {"Baseline": home.logits(1.0, 1), "SeDA": home.logits(2.0, 2)}
    for run, logits in zip(runs.values(), shown.values(), strict=True):
        hit = home.label[np.arange(len(logits)), logits.argmax(axis=1)]
        home.evaluate(run, logits, per_sample={"pre1": 100.0 * hit})
        home.evaluate(run, home.logits(1.0, 3), name="val", per_sample={"pre1": 100.0 * hit})
    FIGURES["seda-fig5"].write(tmp_path, "toy", runs, tmp_path / "out")
    found = read(tmp_path / "out", "seda-fig5-precision")
    hardness = precision_by_class(home.label, home.logits(1.0, 3))
    assert found["class"].tolist() == [CLASSES[k] for k in np.argsort(hardness)]
    for method, logits in shown.items():
        expected = 100 * precision_by_class(home.label, logits)[np.argsort(hardness)]
        np.testing.assert_allclose(found[method], expected, rtol=1e-5)


def test_robustness_is_that_of_the_grid(tmp_path: Path) -> None:
    folder = write_grid(tmp_path, {"num_steps": [900, 1200], "w_ce_dst": [0.5, 1.0, 2.0]})
    write_robustness(folder, tmp_path / "out", "seda-fig3")
    cells = pd.read_csv(folder / "cells.csv")
    found = read(tmp_path / "out", "seda-fig3").set_index(["axis", "value"])
    for letter, field in (("T", "num_steps"), ("gamma", "w_ce_dst")):
        scores = cells.groupby(field)["val_acc1"]
        np.testing.assert_allclose(found["mean"][letter], scores.mean())
        np.testing.assert_allclose(found["std"][letter], scores.std())
        best = cells.groupby([field, "cell"])["val_acc1"].mean().groupby(field).max()
        np.testing.assert_allclose(found["best"][letter], best)
    with pytest.raises(UserError, match="nothing to plot"):
        write_robustness(write_grid(tmp_path, {"num_steps": [900]}, name="1" * 12), tmp_path / "out", "seda-fig3")


def test_what_is_missing_is_said_with_the_remedy(home: Path, tmp_path: Path) -> None:
    runs = runs_of(home)
    with pytest.raises(UserError, match=r"needs a run of baseline; train one with: diffalign train-head --dataset tiny --met"):
        FIGURES["seda-fig5"].write(home, "tiny", runs, tmp_path)
    other = make_home(tmp_path, CLASSES)
    own = {
        method: other.train(other.config(method, {}, image), 0) for method, image in (("baseline", "image"), ("cdr", "text"))
    }
    with pytest.raises(UserError, match="read different image features"):
        FIGURES["marnet-fig4"].write(tmp_path, "toy", own, tmp_path)
    (own["cdr"].path / "done").unlink()
    with pytest.raises(UserError, match="has not finished training"):
        FIGURES["marnet-fig4"].write(tmp_path, "toy", own, tmp_path)
    with pytest.raises(UserError, match="the val split of tiny has too few samples of its most frequent classes"):
        FIGURES["marnet-fig3"].write(home, "tiny", runs, tmp_path, split="val")
    with pytest.raises(UserError, match="1 samples of 'red', the most frequent class of the val split of tiny, have a text"):
        FIGURES["seda-fig4"].write(home, "tiny", runs, tmp_path, split="val")
