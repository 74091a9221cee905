"""Reproducing a paper's table: its rows are ordinary runs, what exists is not trained again, and what is missing is said."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import timm
import torch
from helpers import joint_home
from helpers.command_line import run as run_command
from helpers.tiny_heads import FAST_TRAINING, caches_by_key, small_settings

from pipeline.data.artefacts import Artefact, PaperDataset, PaperRow, read_artefact
from pipeline.data.manifest import Manifest
from pipeline.evaluation.evaluate import evaluate
from pipeline.extraction.extract import ExtractOptions, extract
from pipeline.runtime.errors import UserError
from pipeline.runtime.executor import START_SECONDS
from pipeline.runtime.runs import RunFolder, find_runs
from pipeline.studies import reproduce as study
from pipeline.studies.paper_figures import FIGURES, PaperFigure
from pipeline.studies.reproduce_cost import estimate_heads
from pipeline.studies.reproduce_plan import ReproduceOptions, TablePlan, plan_heads, plan_table
from pipeline.training.heads import train_head
from pipeline.training.joint.finetune import finetune, resolve_joint_settings
from pipeline.training.joint.plan import JointConfig, JointOptions

SEEDS = (0, 1)
TRAINING = {**FAST_TRAINING, "epochs": 2}


def row(title: str, method: str, **more: object) -> PaperRow:
    settings = {**small_settings(method), **more.pop("settings", {})} if method != "unheard_of" else {}  # type: ignore[dict-item]
    return PaperRow(name=(title,), method=method, settings=settings, paper={"vireo172": (80.0,)}, **more)  # type: ignore[arg-type]


def table(*rows: PaperRow) -> Artefact:
    columns = {"vireo172": PaperDataset(name="Vireo", metrics=("acc1",))}
    return Artefact(
        name="own", kind="table", title="A table", heads=("Row",), datasets=columns, backbone="vit", base="Base",
        rows=(row("Base", "baseline"), *rows),
    )  # fmt: skip


def options(home: Path, **more: object) -> ReproduceOptions:
    caches = caches_by_key(home)
    given: dict[str, object] = {"seeds": SEEDS, "preset": "head", "training": TRAINING, "workers": 0}
    return ReproduceOptions(**{**given, "image": caches["image"], "text": caches["text"], **more})  # type: ignore[arg-type]


@pytest.fixture
def home(tiny_home: Path, tmp_path: Path) -> Path:
    """Return a copy of the tiny home that may be written to."""
    return Path(shutil.copytree(tiny_home, tmp_path / "home"))


@pytest.fixture
def messages(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    monkeypatch.setattr(logging.getLogger("pipeline"), "propagate", True)
    return caplog


def test_rows_are_runs_and_nothing_is_trained_twice(
    home: Path, messages: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    artefact = table(
        row("+EMA", "ema"), row("+DST", "seda", settings={"stages": "dst"}), row("later", "unheard_of"),
        row("other", "baseline", backbone="resnet50"), row("U-Net", "cdr", settings={"denoiser": "unet"}),
    )  # fmt: skip
    result = study.reproduce(home, "tiny", artefact, options(home))
    assert "own on tiny: 6 runs, 0 are there already, 6 are left, about" in messages.text
    assert messages.text.count("not had") == 1
    assert "not had: 3 of 6 rows, later, other, U-Net; --verbose says why" in messages.text
    found: dict[tuple[str, str], list[RunFolder]] = {}
    for run in find_runs(home, "tiny"):
        found.setdefault((run.config().method, str(run.config().setting("stages"))), []).append(run)
    assert {key: len(runs) for key, runs in found.items()} == {("baseline", "None"): 2, ("ema", "None"): 2, ("seda", "dst"): 2}
    rows = {each["Row"]: each for each in result.numbers.to_dict("records")}
    for title, key in (("Base", ("baseline", "None")), ("+EMA", ("ema", "None")), ("+DST", ("seda", "dst"))):
        values = [evaluate(home, run, "test", {})["metrics"]["acc1"] for run in found[key]]
        assert rows[title]["acc1"] == pytest.approx(np.mean(values))
    assert rows["later"]["reason"] == "there is no method unheard_of"
    assert "--backbone resnet50=…" in rows["other"]["reason"]
    assert "needs equal widths" in rows["U-Net"]["reason"]
    page = (home / "reports" / "tiny" / "own.md").read_text()
    assert all(f"Not had: {title}" in page for title in ("later", "other", "U-Net"))
    assert "Settings, where a row names none: head for baseline, ema, seda." in page

    monkeypatch.setattr(study, "train_and_score", None)  # nothing may be trained
    messages.clear()
    again = study.reproduce(home, "tiny", artefact, options(home))
    assert "6 runs, 6 are there already, 0 are left" in messages.text
    assert again.numbers.equals(result.numbers)


def test_an_interrupted_table_goes_on(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    artefact, trained = table(row("+EMA", "ema")), []
    train = study.train_and_score

    def interrupt(job: study._ScoredJob) -> dict[Path, study.RunFailure]:  # pyright: ignore[reportPrivateUsage]
        if len(trained) == 3:
            raise KeyboardInterrupt
        trained.append(job.group.runs[0].path)
        return train(job)

    monkeypatch.setattr(study, "train_and_score", interrupt)
    with pytest.raises(KeyboardInterrupt):
        study.reproduce(home, "tiny", artefact, options(home))
    before = {run.path: (run.path / "done").stat().st_mtime_ns for run in find_runs(home, "tiny") if run.is_done}
    assert set(before) == set(trained)
    monkeypatch.setattr(study, "train_and_score", train)
    result = study.reproduce(home, "tiny", artefact, options(home))
    assert result.numbers["seeds"].tolist() == [2, 2]
    assert before == {path: (path / "done").stat().st_mtime_ns for path in before}


def test_a_head_that_fails_costs_its_row_only(home: Path) -> None:
    artefact = table(row("+EMA", "ema", settings={"w_ce": 3e38}), row("good", "ema"))
    result = study.reproduce(home, "tiny", artefact, options(home))
    rows = {each["Row"]: each for each in result.numbers.to_dict("records")}
    assert rows["+EMA"]["verdict"] == "not had"
    assert rows["+EMA"]["reason"]
    assert len(result.failed) == 2
    assert not result.bugs
    assert rows["Base"]["seeds"] == 2


def test_a_bug_of_a_method_costs_its_row_only(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise KeyError("a bug")

    monkeypatch.setattr("pipeline.methods.ema.EMA.loss", fail)  # met by the probe of its time, too
    result = study.reproduce(home, "tiny", table(row("+EMA", "ema")), options(home, seeds=(0,)))
    assert result.numbers["verdict"].tolist() == ["the base", "not had"]
    assert "KeyError: 'a bug'" in result.numbers["reason"][1]
    assert len(result.failed) == len(result.bugs) == 1


def test_joint_trainings_of_one_head_fail_each_for_its_own_reason(
    encoders_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(home: Path, head: object, unfreeze: str, options: ReproduceOptions) -> None:
        raise KeyError("a bug") if unfreeze == "both" else UserError("too little memory")

    home = Path(shutil.copytree(encoders_home, tmp_path / "home"))
    caches = joint_home.caches(home)
    monkeypatch.setattr(study, "tune_encoders", fail)
    artefact = table(row("alone", "ema"), row("image", "ema", unfreeze="image"), row("both", "ema", unfreeze="both"))
    chosen = options(home, seeds=(0,), image=caches["image"], text=caches["text"], training={**TRAINING, "epochs": 1})
    result = study.reproduce(home, "tiny", artefact, chosen)
    rows = {each["Row"]: each for each in result.numbers.to_dict("records")}
    assert rows["alone"]["seeds"] == 1
    assert rows["image"]["reason"] == "joint training of image: too little memory"
    assert rows["both"]["reason"].startswith("joint training of both: KeyError: 'a bug'; a bug, its traceback is in ")
    assert len(result.failed) == 2
    assert len(result.bugs) == 1


def test_a_head_that_failed_is_not_trained_again_for_rows_that_waited(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    artefact, trained = table(row("+EMA", "ema", settings={"w_ce": 3e38})), []
    train, plan = study.train_and_score, study.plan_table

    def count(job: study._ScoredJob) -> dict[Path, study.RunFailure]:  # pyright: ignore[reportPrivateUsage]
        trained.extend(run.path for run in job.group.runs)
        return train(job)

    def plan_with_waiting_row(*arguments: Any) -> TablePlan:
        found = plan(*arguments)
        return replace(found, rows=(*found.rows[:-1], replace(found.rows[-1], is_waiting=True)))

    monkeypatch.setattr(study, "train_and_score", count)
    monkeypatch.setattr(study, "plan_table", plan_with_waiting_row)
    result = study.reproduce(home, "tiny", artefact, options(home))
    assert len(result.failed) == 2
    assert len(trained) == len(set(trained)) == 4


def test_files_of_ones_own_that_cannot_be_made_are_refused_before_the_training(home: Path) -> None:
    wrong = {"vireo172": PaperDataset(name="Vireo", metrics=("acc2",))}
    with pytest.raises(UserError, match="own: unknown metric 'acc2'; choose one of: acc1"):
        study.reproduce(home, "tiny", replace(table(), datasets=wrong), options(home))
    with pytest.raises(UserError, match="nothing draws a figure 'own'; choose one of: marnet-fig3"):
        study.reproduce(home, "tiny", Artefact(name="own", kind="figure", title="A figure"), options(home))
    assert find_runs(home, "tiny") == []


def test_mistakes_of_the_user_are_no_missing_rows(home: Path) -> None:
    artefact = table(row("other", "baseline", backbone="resnet50"))
    for change, message in (
        ({"backbones": {"resnet05": "timm"}}, "did you mean 'resnet50'"),
        ({"backbones": {"resnet50": "tim,model=x"}}, "did you mean 'timm'"),
        ({"backbones": {"resnet50": "timm,modle=x"}}, "did you mean 'model'"),
        ({"backbones": {"vit": "timm"}}, "name the same features"),
        ({"image": "nowhere"}, "named 'nowhere'"),
        ({"training": {"lr": -1.0}}, "lr"),
    ):
        with pytest.raises(UserError, match=message):
            plan_table(home, "tiny", artefact, options(home, **change))


def test_time_is_that_of_finished_runs_or_of_a_probe_that_leaves_nothing(home: Path) -> None:
    chosen = options(home, seeds=(0, 1, 2))
    heads = list(plan_heads(home, "tiny", "ema", small_settings("ema"), chosen.image, chosen).values())
    probed = estimate_heads(home, heads, workers=0)
    assert probed > 0
    assert find_runs(home, "tiny") == []
    run = train_head(heads[0], progress=False)
    facts = json.loads((run.path / "done").read_text())
    (run.path / "done").write_text(json.dumps({**facts, "seconds": 50.0}))
    assert estimate_heads(home, heads, workers=0) == pytest.approx(2 * 50.0)
    assert estimate_heads(home, heads, workers=2) == pytest.approx(2 * 50.0 / 2 + START_SECONDS)
    assert estimate_heads(home, heads[:1], workers=0) == 0


@pytest.fixture(scope="module")
def encoders_home(tiny_manifest: Manifest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return joint_home.make_home(tiny_manifest, tmp_path_factory.mktemp("reproduce") / "home")


def test_backbones_are_tuned_with_a_baseline_of_every_seed(encoders_home: Path, messages: pytest.LogCaptureFixture) -> None:
    home, caches = encoders_home, joint_home.caches(encoders_home)
    spec = ",".join(["timm", *(f"{key}={value}" for key, value in joint_home.IMAGE.items())])
    artefact = table(
        row("ResNet-50", "baseline", backbone="resnet50"),
        row("EMA_RN50", "ema", backbone="resnet50", against="ResNet-50"),
        row("both", "ema", unfreeze="both"),
    )
    artefact = replace(artefact, rows=tuple(replace(each, settings=_only_of_texts(each)) for each in artefact.rows))
    joint = {"epochs": 1, "batch_size": 8, "lr": 1e-3}
    chosen = ReproduceOptions(
        seeds=SEEDS, preset="head", training={**TRAINING, "epochs": 1}, joint_training=joint, workers=0,
        image=caches["image"], text=caches["text"], backbones={"resnet50": spec}, split="val",
    )  # fmt: skip
    result = study.reproduce(home, "tiny", artefact, chosen)
    # baseline and EMA; joint training of both; EMA on the tuned encoders, of which nothing is known before
    assert "own on tiny: 10 runs, 0 are there already, 10 are left" in messages.text
    assert "2 of them wait for features" in messages.text
    assert not result.failed
    rows = {each["Row"]: each for each in result.numbers.to_dict("records")}

    quiet, values = JointOptions(workers=0, progress=False), []
    for seed in SEEDS:
        base = plan_heads(home, "tiny", "baseline", {}, caches["image"], chosen)[seed]
        tuned = finetune(home, base.run, JointConfig(), resolve_joint_settings(base.run, joint), quiet).run
        values.append(evaluate(home, tuned, "val", {})["metrics"]["acc1"])
        image = {each: tuned.config().caches["image"] for each in SEEDS}
        head = plan_heads(home, "tiny", "ema", small_settings("ema"), image, chosen)[seed]
        assert head.run.is_done
    assert rows["ResNet-50"]["acc1"] == pytest.approx(np.mean(values))
    assert rows["EMA_RN50"]["against"] == "ResNet-50"
    assert "tuned with the baseline of each seed" in rows["EMA_RN50"]["features"]
    assert rows["both"]["seeds"] == 2
    messages.clear()
    frozen = study.reproduce(home, "tiny", artefact, replace(chosen, tunes_backbones=False), only_plan=True)
    assert frozen.files == ()
    assert "own on tiny: 6 runs, 6 are there already" in messages.text


def _only_of_texts(each: PaperRow) -> Mapping[str, object]:
    """The baselines have no settings of their own: then the tuned baseline is the row itself."""
    return {} if each.method == "baseline" else each.settings


def test_encoders_without_weights_are_told_in_their_row(home: Path) -> None:
    result = study.reproduce(home, "tiny", table(row("joint", "ema", unfreeze="image")), options(home))
    reason = result.numbers["reason"][1]
    assert "random_projection takes no weights, so it cannot be tuned" in reason
    assert result.numbers["verdict"].tolist() == ["the base", "not had"]


def test_the_robustness_figure_is_a_grid(home: Path) -> None:
    artefact = replace(read_artefact("seda-fig3"), axes={"w_ce_dst": [0.5, 1.5]}, settings=small_settings("seda"))
    result = study.reproduce(home, "tiny", artefact, options(home, seeds=(0,)))
    assert len(result.numbers) == 2
    assert (home / "reports" / "tiny" / "seda-fig3.md").is_file()
    assert {path.suffix for path in result.files} >= {".md", ".tex", ".csv", ".svg", ".pdf"}
    reports, contents = home / "reports" / "tiny", {path: path.read_bytes() for path in result.files}
    assert len(contents) == len(result.files)  # the numbers of the figure do not replace the ranking of the cells
    assert pd.read_csv(reports / "seda-fig3.csv")["w_ce_dst"].tolist() == result.numbers["w_ce_dst"].tolist()
    assert pd.read_csv(reports / "seda-fig3" / "seda-fig3.csv")["axis"].tolist() == ["gamma", "gamma"]
    quick = replace(options(home, seeds=(0,)), training={**TRAINING, "epochs": 1})
    trial = study.reproduce(home, "tiny", artefact, quick, study.QUICK_SUFFIX)
    assert not set(trial.files) & set(result.files)
    assert {path: path.read_bytes() for path in result.files} == contents


def test_a_figure_gets_the_runs_of_its_methods(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = {}

    def write(home: Path, dataset: str, runs: Mapping[str, RunFolder], folder: Path, split: str = "test") -> list[Path]:
        seen.update(runs)
        return [folder / "figure.svg"]

    monkeypatch.setattr(study, "FIGURES", {**FIGURES, "marnet-fig4": PaperFigure("own", ("baseline", "ema"), write)})
    result = study.reproduce(home, "tiny", read_artefact("marnet-fig4"), options(home))
    assert list(seen) == ["baseline", "ema"]
    assert all(run.is_done and run.config().method == method for method, run in seen.items())
    assert result.files == [home / "reports" / "tiny" / "marnet-fig4" / "figure.svg"]


def test_the_command_lists_plans_and_writes(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    caches, file = caches_by_key(home), tmp_path / "mine.yaml"
    file.write_text(
        "{kind: table, title: Mine, heads: [Row], base: Base, backbone: vit_b16, rows: "
        "[{name: [Base], method: baseline}, {name: [+EMA], method: ema, settings: {width: 16}}]}"
    )
    common = ["reproduce", str(file), "tiny", "--home", str(home), "--preset", "head", "--workers", "0"]
    common += ["--image", caches["image"], "--text", caches["text"], "--train", "epochs=1"]
    assert run_command(["reproduce", "--list"], monkeypatch) == 0
    assert "seda-table3: SeDA, Table 3" in capsys.readouterr().out
    assert run_command(["reproduce", "--home", str(home)], monkeypatch) == 2
    assert "which table or figure? choose one of: marnet-table1" in capsys.readouterr().err
    assert run_command([*common, "--plan"], monkeypatch) == 0
    assert find_runs(home, "tiny") == []
    assert run_command([*common, "--quick", "--seeds", "0", "--json"], monkeypatch) == 0
    printed = json.loads(capsys.readouterr().out)
    assert [Path(path).name for path in printed["files"]] == [f"mine-quick.{suffix}" for suffix in ("md", "tex", "csv")]
    assert [each["Row"] for each in printed["rows"]] == ["Base", "+EMA"]
    assert all(each["seeds"] == 1 for each in printed["rows"])


def test_features_of_weights_that_were_replaced_are_not_taken(home: Path, tiny_manifest: Manifest, tmp_path: Path) -> None:
    weights = tmp_path / "weights.pth"
    state = timm.create_model("test_vit", num_classes=0).state_dict()
    torch.save(state, weights)
    settings = {"model": "test_vit", "weights": str(weights)}
    extract(tiny_manifest, "timm", settings, home, options=ExtractOptions(progress=False, workers=0))
    chosen = options(home, backbones={"resnet50": f"timm,model=test_vit,weights={weights}"}, tunes_backbones=False)
    artefact = table(row("other", "baseline", backbone="resnet50"))
    assert plan_table(home, "tiny", artefact, chosen).to_extract == ()
    torch.save({name: 2 * tensor for name, tensor in state.items()}, weights)
    assert [each.name for each in plan_table(home, "tiny", artefact, chosen).to_extract] == ["resnet50"]


def test_one_of_several_caches_of_a_backbone_is_named_by_the_user(home: Path, tiny_manifest: Manifest) -> None:
    cache, artefact = caches_by_key(home)["image"], table(row("other", "baseline", backbone="resnet50"))
    chosen = options(home, tunes_backbones=False)
    settings, quick = {"modality": "image", "width": 32}, ExtractOptions(progress=False, workers=0)
    second = extract(tiny_manifest, "random_projection", settings, home, store_dtype="float32", options=quick).name
    place = "random_projection,modality=image,width=32"
    with pytest.raises(UserError, match=f"several caches fit --backbone resnet50={place} .*{second}.*give the name of one"):
        plan_table(home, "tiny", artefact, replace(chosen, backbones={"resnet50": place}))
    named = plan_table(home, "tiny", artefact, replace(chosen, backbones={"resnet50": cache}))
    assert named.rows[1].features == cache


def test_a_backbone_is_a_cache_weights_or_an_encoder(tiny_home: Path, tmp_path: Path) -> None:
    artefact, weights = table(row("other", "baseline", backbone="resnet50")), tmp_path / "weights.pth"
    weights.touch()
    cache = caches_by_key(tiny_home)["image"]
    for place, expected in (
        (cache, (cache, "", {})),
        (str(tiny_home / "caches" / "tiny" / cache), (cache, "", {})),
        ("pretrained", ("", "timm", {"model": "resnet50", "weights": "pretrained"})),
        (str(weights), ("", "timm", {"model": "resnet50", "weights": str(weights)})),
        ("timm,model=resnet50d", ("", "timm", {"model": "resnet50d"})),
        ("random_projection,modality=image,width=32", (cache, "random_projection", {"modality": "image", "width": "32"})),
    ):
        chosen = options(tiny_home, backbones={"resnet50": place}, tunes_backbones=False)
        plan = plan_table(tiny_home, "tiny", artefact, chosen)
        other = plan.rows[1]
        named = plan.to_extract[0] if plan.to_extract else None
        assert (other.features if not named else "", named.encoder if named else expected[1]) == expected[:2], place
        assert named is None or named.settings == expected[2]
        assert other.is_waiting == (named is not None)
