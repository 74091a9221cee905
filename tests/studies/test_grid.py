"""Tests of the axes and cells of a grid: what is accepted, what is refused before training, and which cells are drawn."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path

import pytest
from helpers.tiny_grids import tiny_grid
from helpers.tiny_heads import FAST_TRAINING, caches_by_key, small_settings

from pipeline.runtime import plugins
from pipeline.runtime.device import default_device, resolve_dtype
from pipeline.runtime.files import canonical_json, fingerprint
from pipeline.runtime.settings import field_types
from pipeline.studies.grid import PrecisionChoice, plan_grid, read_axes, read_cells
from pipeline.studies.search import run_grid
from pipeline.training.config import TrainConfig
from pipeline.training.heads import plan_head, resolve_head_settings


def test_axes_are_read_by_letter_and_by_name_from_options_and_files(tmp_path: Path) -> None:
    file = tmp_path / "grid.yaml"
    file.write_text("T: [900, '1200']\nlr: [1e-3, 0.003]\nw_sc: 1\n")
    axes = read_axes("seda", ["gamma=0.5,1", "stages=dsl,dst", "residual=true,false"], file)
    assert axes == {
        "w_ce_dst": (0.5, 1.0),
        "stages": ("dsl", "dst"),
        "residual": ("text", "none"),
        "num_steps": (900, 1200),
        "lr": (0.001, 0.003),
        "w_sc": (1.0,),
    }
    assert all(type(value) is int for value in axes["num_steps"])


def test_the_papers_grid_of_seda_is_figure_3() -> None:
    axes = read_axes("seda", [])
    assert axes == read_axes("seda", ["papers"])
    cells = read_cells("openmoji", "seda", "head", axes, {}, {})
    expected = itertools.product((0.5, 1.0, 1.5, 2.0), (900, 1200, 1500, 1800), (0, 300, 500))
    assert [tuple(cell.point.values()) for cell in cells] == list(expected)
    assert list(cells[0].point) == ["w_ce_dst", "num_steps", "stage_step"]
    assert cells[7].label == "gamma=0.5 T=1500 t=300"
    assert (cells[7].settings.num_steps, cells[7].settings.stage_step, cells[7].settings.w_ce_dst) == (1500, 300, 0.5)


@pytest.mark.parametrize("method", plugins.names("methods"))
def test_every_method_has_a_grid_and_shares_no_field_with_training(method: str) -> None:
    axes = read_axes(method, [])
    assert read_cells("openmoji", method, "head", axes, {}, {})
    assert not field_types(plugins.get("methods", method).Config).keys() & field_types(TrainConfig).keys()


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        (["x=1"], r"unknown grid field 'x'; choose one of: num_steps, .*lr, .*T \(= num_steps\), t \(= stage_step\)"),
        (["T=900", "num_steps=1200"], "grid field 'num_steps' is given twice; 'T' is the same field"),
        (["papers", "T=900"], "'num_steps' is given twice"),
        (["T="], "grid field 'T' has no values: the grid is empty"),
        (["T"], "--grid takes FIELD=VALUE,VALUE or papers, not 'T'"),
        (["T=900,900.0"], "grid field 'T' has the value 900 2 times"),
        (["T=900,many"], "setting 'T' is 'many'; it takes a finite int"),
        (["T=900,"], "setting 'T' is ''; it takes a finite int"),
        (["lr=nan"], "setting 'lr' is 'nan'; it takes a finite float"),
        (["stages=first"], "setting 'stages' is 'first'; choose one of: both, dsl, dst"),
    ],
)
def test_wrong_axes_are_refused(pairs: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_axes("seda", pairs)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("T: []", "grid field 'T' has no values"),
        ("T:", "setting 'T' is None; it takes a finite int"),
        ("T: [[1]]", r"setting 'T' is \[1\]; it takes a finite int"),
        ("T: &a [1]", "grid.yaml, line 1: YAML tags, anchors, aliases"),
        (f"T: [{'9' * 400}]", "setting 'T' is 9+; it takes a finite int"),
        ("- T", "grid.yaml, line 1: not a mapping"),
    ],
)
def test_wrong_files_are_refused(text: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "grid.yaml"
    file.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_axes("seda", [], file)


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        (("T=20,30", "t=5,20"), r"cell T=20 t=20: t must be in 0\.\.19, not 20"),
        (("T=20,30", "sample_steps=5,25"), r"cell T=20 sample_steps=25: sample_steps must be in 1\.\.20, not 25"),
        (("lr=0,1",), "cell lr=0.0: training setting 'lr' must be positive"),
        (("batch_size=1,8",), "cell batch_size=1: training setting 'batch_size' must be at least 2"),
        (("T=20,1000000000000",), r"cell T=1000000000000: T must be in 1\.\.100000, not 1000000000000"),
        (("token_width=8,1000000000",), r"cell token_width=1000000000: token_width must be in 1\.\.65536"),
        (("width=16,70000",), r"cell width=70000: width must be in 1\.\.65536"),
        (("draws=1,1001",), r"cell draws=1001: draws must be in 1\.\.1000"),
        (("num_tokens=4,5",), "cell num_tokens=5: width 16 cannot be cut into 5 tokens"),
    ],
)
def test_impossible_cells_are_named_before_anything_is_written(pairs: tuple[str, ...], message: str, tiny_home: Path) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_grid(tiny_home, pairs=pairs)
    assert not (tiny_home / "runs").exists()
    assert not (tiny_home / "grids").exists()


def test_a_field_is_given_once(tiny_home: Path) -> None:
    with pytest.raises(ValueError, match="'T' is on the grid and set besides"):
        read_cells("openmoji", "seda", "head", read_axes("seda", ["T=900"]), {"T": 20}, {})
    with pytest.raises(ValueError, match="'lr' is on the grid and set besides"):
        read_cells("openmoji", "seda", "head", read_axes("seda", ["lr=1"]), {}, {"lr": 1})
    with pytest.raises(ValueError, match="'precision' is given twice"):
        tiny_grid(tiny_home, precision="mixed")


def test_points_are_a_deterministic_subset_in_order_and_more_points_include_the_fewer() -> None:
    axes = read_axes("seda", [])
    every, few, more = (
        [cell.label for cell in read_cells("openmoji", "seda", "head", axes, {}, {}, points)] for points in (0, 7, 20)
    )
    assert (len(every), len(set(few)), len(set(more))) == (48, 7, 20)
    assert set(few) < set(more) < set(every)
    assert few == sorted(few, key=every.index)
    assert few != every[:7]
    with pytest.raises(ValueError, match="--points 49 of a grid of 48 cells"):
        read_cells("openmoji", "seda", "head", axes, {}, {}, 49)


def test_a_grid_that_cannot_be_listed_is_refused_or_drawn_from() -> None:
    thousand = [f"{field}={','.join(map(str, range(20, 1020)))}" for field in ("T", "w_sc", "w_mse")]
    axes = read_axes("seda", thousand)
    for points in (0, 10_001):
        with pytest.raises(ValueError, match=f"a grid has at most 10000 cells, not {points or 10**9}: give fewer "):
            read_cells("openmoji", "seda", "head", axes, {"t": 0}, {}, points)
    few, more = ({cell.label for cell in read_cells("openmoji", "seda", "head", axes, {"t": 0}, {}, n)} for n in (5, 50))
    assert (len(few), len(more)) == (5, 50)
    assert few < more


def test_a_cell_is_the_run_of_train_head(tiny_home: Path) -> None:
    grid = tiny_grid(tiny_home, pairs=("T=20,30", "t=0,5", "lr=1e-3,1e-2"), seeds=(0, 3))
    assert len(grid.heads) == 16
    settings, training = resolve_head_settings(
        "tiny", "seda", "head", {**small_settings("seda"), "num_steps": 30}, {**FAST_TRAINING, "lr": 0.01}
    )
    alone = plan_head(tiny_home, "tiny", "seda", settings, training, 3, caches_by_key(tiny_home))
    assert grid.heads[7, 3].run == alone.run
    assert grid.heads[7, 3].config == alone.config
    assert len({head.run.path for head in grid.heads.values()}) == 16


def test_precision_is_a_setting_of_every_cell(tiny_home: Path) -> None:
    auto = tiny_grid(tiny_home, pairs=("T=20,30", "precision=float32,mixed"))
    assert [cell.training.precision for cell in auto.cells] == ["float32", "mixed"] * 2
    native = resolve_dtype("auto", default_device(), "mixed")
    caches = caches_by_key(tiny_home)
    choices: list[tuple[PrecisionChoice, str]] = [("auto", native), ("float32", "float32"), ("mixed", "mixed")]
    for choice, expected in choices:
        grid = plan_grid(
            tiny_home,
            "tiny",
            "ema",
            read_axes("ema", ["width=8"]),
            (0,),
            settings={},
            training={},
            precision=choice,
            image=caches["image"],
            text=caches["text"],
        )
        assert grid.cells[0].training.precision == expected


def test_the_folder_of_a_grid_is_named_by_its_identity(tiny_home: Path, tmp_path: Path) -> None:
    grid = tiny_grid(tiny_home)
    names = {fingerprint(each.identity()) for each in (grid, tiny_grid(tiny_home), tiny_grid(tiny_home, seeds=(0, 1)))}
    names |= {
        fingerprint(tiny_grid(tiny_home, search="optuna").identity()),
        fingerprint(tiny_grid(tiny_home, points=2).identity()),
    }
    names.add(fingerprint(tiny_grid(tiny_home, training={"weight_decay": 0.0}).identity()))
    assert len(names) == 5
    folder = replace(grid, features=replace(grid.features, home=tmp_path)).create_folder()
    assert folder.name == f"seda-{fingerprint(grid.identity())[:12]}"
    assert canonical_json(json.loads((folder / "grid.json").read_text())) == canonical_json(grid.identity())


def test_lanes_need_the_stacked_strategy(tiny_home: Path) -> None:
    with pytest.raises(ValueError, match="--lanes are runs of one model, and --strategy processes trains every run by itself"):
        run_grid(tiny_grid(tiny_home), strategy="processes", max_ensemble_size=2)
