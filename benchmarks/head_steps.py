"""Compare our training steps on a GPU, captured as CUDA graphs, with steps without a graph and with the loop by hand.

    python benchmarks/head_steps.py [--parts one,cells,seeds,figure] [--precision float32|mixed] [--small]

one     a step of one head (SeDA, EMA, the baseline): milliseconds, and the ratio to plain_heads.py and to ours without a graph
cells   a step of the 48 cells of SeDA's Fig. 3 as one model: milliseconds, and the ratio to the loop by hand, one cell after
        another; how long the bytes of weights and optimiser take at the rate at which the device copies memory
seeds   a step of 1, 4 and 48 cells with three seeds as one model, over three models, one for each seed
figure  the whole of Fig. 3, three seeds and 20 epochs of 66,071 rows, extrapolated from 500 steps of an epoch and a validation

`--small` runs every part with small numbers, also without a GPU; there no step is captured, and the figures mean nothing.
"""

from __future__ import annotations

import argparse
import itertools
import math
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from plain_heads import AS_BY_HAND, Rounds, make_columns, plain_training, wait_seconds
from training_step import OurTraining, make_raw_columns

from pipeline.cache.table import FeatureTable
from pipeline.evaluation.evaluate import predict
from pipeline.runtime import plugins
from pipeline.runtime.device import Precision, default_device, reproducible
from pipeline.runtime.rng import sample_keys
from pipeline.training.captured import WARM_UP_STEPS

SEEDS, EPOCHS = 3, 20  # of SeDA's Fig. 3
BYTES_PER_WEIGHT = 28  # Adam reads weight, gradient and two moments, and writes weight and moments, 4 bytes each


@dataclass(frozen=True)
class Size:
    """How much is measured."""

    width: int = 768
    classes: int = 172
    batch: int = 64
    rows: int = 66_071
    validated: int = 7_341
    cells: int = 48
    steps: int = 100  # of a round
    figure_steps: int = 500
    rounds: int = 3


SMALL = Size(width=64, classes=7, batch=16, rows=512, validated=64, cells=3, steps=3, figure_steps=4, rounds=2)


def report(what: str, measured: float, unit: str = "", wanted: str = "", note: str = "") -> None:
    """Print a figure on one line, with the goal if there is one."""
    goal = f" (wanted {wanted})" if wanted else ""
    print(f"{what}: {unit or 'ratio'} {measured:.2f}{goal}{'; ' if note else ''}{note}", flush=True)


def cells_of_figure(number: int) -> list[dict[str, Any]]:
    """Return the settings of the first cells of SeDA's Fig. 3."""
    axes: Mapping[str, tuple[Any, ...]] = plugins.get("methods", "seda").grid
    return [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())][:number]


class Steps:
    """Trainings of ours on one table of random features."""

    def __init__(self, size: Size, precision: Precision) -> None:
        self.size = size
        self.precision: Precision = precision
        self.raw = make_raw_columns(size.rows, size.width, size.classes, False, default_device())

    def training(
        self, method: str, captures: bool, cells: Sequence[Mapping[str, Any]] = ({},), seeds: Sequence[int] = (0,)
    ) -> OurTraining:
        """Return a training that is warm: its step is captured, if it is to be."""
        captures = captures and torch.cuda.is_available()
        ours = OurTraining(
            method,
            self.raw,
            self.size.classes,
            self.precision,
            self.size.batch,
            captures,
            cells,
            seeds,
            **AS_BY_HAND.get(method, {}),
        )
        ours.epoch(WARM_UP_STEPS + 2)
        if graph := ours.trainer.graph:
            assert graph.is_recorded, graph.refusal
        return ours

    def by_hand(self, method: str) -> Callable[[], Any]:
        """Return an epoch of the loop by hand of as many steps as a round has; it has run once."""
        rows = self.size.steps * self.size.batch
        raw = {name: column[:rows] for name, column in self.raw.items()}
        loop = plain_training(method, raw, self.size.classes, self.precision, self.size.batch)
        columns = make_columns(raw)

        def epoch() -> None:
            with reproducible(default_device()):
                loop.epoch(columns)

        epoch()
        return epoch


def one(steps: Steps) -> None:
    """Compare one head of each method."""
    size = steps.size
    for method in ("seda", "ema", "baseline"):
        captured, eager = steps.training(method, True), steps.training(method, False)
        beside_plain, beside_eager = Rounds(), Rounds()
        plain = steps.by_hand(method)
        for _ in range(size.rounds):
            beside_plain.measure(partial(captured.epoch, size.steps), plain)
            beside_eager.measure(partial(captured.epoch, size.steps), partial(eager.epoch, size.steps))
        wanted = ("<= 1.5", ">= 3") if method == "seda" else ("", ">= 3")
        name = f"one {method} head, {steps.precision}"
        report(f"{name}, a step", 1e3 * min(beside_plain.ours) / size.steps, "ms", wanted[0])
        report(f"{name}, over the loop by hand", beside_plain.median(), "", wanted[1], beside_plain.ratio())
        report(f"{name}, over ours without a graph", beside_eager.median(), "", "", beside_eager.ratio())


def cells(steps: Steps) -> None:
    """Compare the cells of Fig. 3, trained as one model, with the loop by hand for one cell after another."""
    size, name = steps.size, f"{steps.size.cells} SeDA cells, {steps.precision}"
    captured, plain = steps.training("seda", True, cells_of_figure(size.cells)), steps.by_hand("seda")
    rounds = Rounds()
    for _ in range(size.rounds):
        rounds.measure(partial(captured.epoch, size.steps), plain)
    milliseconds = 1e3 * min(rounds.ours) / size.steps
    report(f"{name}, a step", milliseconds, "ms", "<= 10")
    report(f"{name}, over the loop by hand", rounds.median(size.cells), "", ">= 25", rounds.ratio(size.cells))
    num_bytes = BYTES_PER_WEIGHT * sum(parameter.numel() for parameter in captured.trainer.parameters)
    bound = 1e3 * num_bytes / copy_rate()
    report(f"{name}, least time of Adam's {num_bytes / 1e9:.1f} GB", bound, "ms", "", f"{milliseconds / bound:.1f} times that")
    eager = steps.training("seda", False, cells_of_figure(size.cells))
    few = max(1, size.steps // 10)
    report(f"{name}, a step without a graph", 1e3 * wait_seconds(partial(eager.epoch, few)) / few, "ms")


def seeds(steps: Steps) -> None:
    """Compare cells with several seeds as one model with a model for each seed."""
    for number in sorted({1, min(4, steps.size.cells), steps.size.cells}):
        settings, name = cells_of_figure(number), f"{number} SeDA cells, {SEEDS} seeds, {steps.precision}"
        together, apart = steps.training("seda", True, settings, range(SEEDS)), steps.training("seda", True, settings)
        rounds = Rounds()
        for _ in range(steps.size.rounds):
            rounds.measure(partial(together.epoch, steps.size.steps), partial(apart.epoch, steps.size.steps))
        report(f"{name}, a step", 1e3 * min(rounds.ours) / steps.size.steps, "ms")
        report(f"{name}, over one model for each seed", rounds.median(SEEDS), "", "", rounds.ratio(SEEDS))


def copy_rate() -> float:
    """Return the bytes per second that the device reads and writes while it copies memory."""
    source = torch.zeros(2**28 if torch.cuda.is_available() else 2**20, device=default_device())
    target = torch.empty_like(source)
    return 2 * source.nbytes / min(wait_seconds(partial(target.copy_, source)) for _ in range(5))


def figure(steps: Steps) -> None:
    """Extrapolate the training of the whole of Fig. 3."""
    size = steps.size
    training = steps.training("seda", True, cells_of_figure(size.cells))
    step_seconds = wait_seconds(partial(training.epoch, size.figure_steps)) / size.figure_steps
    ids = tuple(map(str, range(size.validated)))
    columns = {"image": steps.raw["image"][: size.validated], "key": sample_keys(ids).to(default_device())}
    table = FeatureTable(ids=ids, columns=columns, excluded=())

    def validate() -> None:
        with reproducible(default_device()):
            predict(training.trainer.model, table, 0, precision=steps.precision)

    validate()
    validation_seconds = wait_seconds(validate)
    seconds = SEEDS * EPOCHS * (size.rows // size.batch * step_seconds + validation_seconds)
    note = f"{1e3 * step_seconds:.2f} ms a step and {validation_seconds:.2f} s a validation"
    report(
        f"Fig. 3, {size.cells} cells, {SEEDS} seeds, {EPOCHS} epochs, {steps.precision}", seconds / 60, "minutes", "<= 15", note
    )


PARTS: dict[str, Callable[[Steps], None]] = {"one": one, "cells": cells, "seeds": seeds, "figure": figure}


def main() -> None:
    """Run the parts that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--precision", choices=["float32", "mixed"], default="float32", help="of all sides")
    parser.add_argument("--small", action="store_true", help="small numbers, to try the program")
    given = parser.parse_args()
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
    print(f"torch {torch.__version__}, {device}", flush=True)
    size = SMALL if given.small else Size()
    assert math.prod(map(len, plugins.get("methods", "seda").grid.values())) == Size().cells
    steps = Steps(size, given.precision)
    for part in given.parts.split(","):
        PARTS[part](steps)


if __name__ == "__main__":
    main()
