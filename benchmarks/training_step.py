"""Our training step of one head from outside: the functions it enters and the ATen operators it dispatches.

    python benchmarks/training_step.py            # print the tables of docs/training-step.md
    python benchmarks/training_step.py --write    # put them into the page

Functions are found with `sys.setprofile`: those that are entered more often in an epoch of more steps, and the loop itself.
Operators are counted with a `TorchDispatchMode` over forward, backward, clipping and optimiser; views are counted too.
"""

from __future__ import annotations

import argparse
import linecache
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import product
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

import pipeline
from pipeline.cache.table import FeatureTable, shuffled_batches
from pipeline.runtime import plugins
from pipeline.runtime.device import default_device, reproducible
from pipeline.runtime.rng import sample_keys
from pipeline.runtime.runs import RunFolder
from pipeline.runtime.settings import configure
from pipeline.training.config import TrainConfig
from pipeline.training.ensemble import EnsembleTrainer
from pipeline.training.loop import Trainer, train_epoch
from pipeline.training.seeds import stacked_source
from pipeline.training.state import TrainState
from pipeline.types import Batch

PACKAGE = Path(pipeline.__file__).parent
PAGE = Path(__file__).parents[1] / "docs" / "training-step.md"
START, END = "<!-- printed by benchmarks/training_step.py -->\n", "<!-- end -->\n"
METHODS = ("seda", "ema", "baseline")
KINDS = ("random numbers", "casts", "losses", "network", "clipping", "optimiser")
WIDTH, CLASSES, BATCH_SIZE = 768, 172, 64  # of the tables


def make_raw_columns(rows: int, width: int, classes: int, multi: bool, device: torch.device) -> Batch:
    """Return random features and labels, as a table of the cache has them."""
    generator = torch.Generator().manual_seed(0)
    image, text = (torch.randn(rows, width, generator=generator) for _ in range(2))
    label = torch.randint(0, classes, (rows,), generator=generator)
    if multi:
        label = (torch.rand(rows, classes, generator=generator) < 2 / classes).float()
    columns = {"image": image, "text": text, "paired": torch.ones(rows), "label": label}
    return {name: column.to(device) for name, column in columns.items()}


class OurTraining:
    """A head, or several that are one model, in the real loop, on a table in memory; nothing is written.

    `cells` has the settings of each head beside `settings`, which all have; each is trained with all `seeds`.
    """

    def __init__(
        self,
        method: str,
        raw: Batch,
        classes: int,
        precision: Any,
        batch_size: int = BATCH_SIZE,
        captures: bool = False,
        cells: Sequence[Mapping[str, Any]] = ({},),
        seeds: Sequence[int] = (0,),
        **settings: Any,
    ) -> None:
        ids = tuple(f"{row:07d}" for row in range(len(raw["image"])))
        columns = {**raw, "key": sample_keys(ids).to(raw["image"].device)}
        widths = {name: (raw[name].shape[1],) for name in ("image", "text")}
        shapes = {**widths, "label": tuple(raw["label"].shape[1:]), "classes": (classes,)}
        plugin = plugins.get("methods", method)
        needed = {name: columns[name] for name in (*plugin.needs, "key")}
        table = FeatureTable(ids=ids, columns=needed, excluded=())
        self.batches = stacked_source([shuffled_batches(table, batch_size, seed) for seed in seeds])
        config = TrainConfig(precision=precision, batch_size=batch_size, lr_step=1_000)  # a round records no new graph
        states = []
        for cell, seed in product(cells, seeds):
            torch.manual_seed(seed)
            head = plugin(configure(plugin.Config, {**settings, **cell}), shapes).to(raw["image"].device)
            states.append(TrainState(method=head, run=RunFolder(Path("unused"), seed), config=config))
            states[-1].start_phase(lambda: iter([needed]))
        self.head = states[0].method
        self.trainer = Trainer(states, captures) if len(states) == 1 else EnsembleTrainer(states, captures)

    def epoch(self, steps: int | None = None) -> list[dict[str, Any]]:
        """Train one epoch, or the first `steps` steps of it, and return the rows of the history."""

        def first(epoch: int) -> Iterator[Batch]:
            yield from (batch for _, batch in zip(range(steps or 0), self.batches(epoch), strict=False))

        with reproducible(default_device()):
            return train_epoch(self.trainer, self.batches if steps is None else first)

    def step(self, batch: Batch) -> Batch:
        """Take one step as the loop does."""
        return self.trainer.step(batch, self.trainer.states[0].phase.name)

    def operators(self) -> dict[str, int]:
        """Return the operators of one step by kind."""
        self.head.train()
        batch = next(self.batches(0))
        self.step(batch)  # Adam's state is made in the first step
        return count_operators(lambda: self.step(batch))

    def functions(self) -> list[tuple[str, int]]:
        """Return the functions of ours outside nn/ and methods/ that a step enters, and how often; 0: the loop itself."""
        few, many = self._calls(2), self._calls(5)
        found = [("training/loop.py train_epoch", 0)]
        for code, number in many.items():
            path = Path(code.co_filename)
            is_ours = path.is_relative_to(PACKAGE) and path.relative_to(PACKAGE).parts[0] not in ("nn", "methods")
            if is_ours and number > few[code] and code.co_name not in ("<genexpr>", "<dictcomp>", "<listcomp>"):
                found.append((f"{path.relative_to(PACKAGE).as_posix()} {code.co_qualname}", (number - few[code]) // 3))
        return found

    def _calls(self, steps: int) -> Counter[CodeType]:
        calls: Counter[CodeType] = Counter()

        def record(frame: FrameType, event: str, argument: Any) -> None:
            if event == "call":
                calls[frame.f_code] += 1

        sys.setprofile(record)
        try:
            self.epoch(steps)
        finally:
            sys.setprofile(None)
        return calls


class OperatorCounter(TorchDispatchMode):
    """Counts the ATen operators that are dispatched inside it, by kind."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter(dict.fromkeys(KINDS, 0))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[kind_of(func, where())] += 1
        return func(*args, **(kwargs or {}))


def where() -> str:
    """Return the Python lines that lead to the current operator; in the backward pass, to the one it is the gradient of."""
    node: Any = torch._C._current_autograd_node()
    if node is not None:
        return "".join(node.metadata.get("traceback_", [])).split("in count_operators")[-1]
    lines, frame = [], sys._getframe(1)
    while frame is not None and frame.f_code.co_name != "count_operators":
        code = frame.f_code
        line = linecache.getline(code.co_filename, frame.f_lineno)
        lines.append(f'File "{code.co_filename}", line {frame.f_lineno}, in {code.co_name}\n{line}')
        frame = frame.f_back
    return "".join(lines)


def kind_of(operator: Any, lines: str) -> str:
    """Return the kind of an operator, from the lines that lead to it."""
    if "clip_grad" in lines:
        return "clipping"
    if "/torch/optim/" in lines:
        return "optimiser"
    if "rand" in operator.name() or "in draw" in lines:
        return "random numbers"
    if operator.overloadpacket is torch.ops.aten._to_copy:
        return "casts"
    return "losses" if "nn/losses.py" in lines or "cross_entropy" in lines else "network"


def count_operators(step: Callable[[], Any]) -> Counter[str]:
    """Return the number of ATen operators that a step dispatches by kind; casts inside random numbers count as those."""
    with OperatorCounter() as counter, torch.autograd.set_detect_anomaly(True, check_nan=False):  # keeps lines for backward
        step()
    return counter.counts


def tables() -> str:
    """Return the tables of the page in Markdown."""
    raw = make_raw_columns(8 * BATCH_SIZE, WIDTH, CLASSES, False, default_device())
    lines = [f"| operators of a step | {' | '.join(KINDS)} | all |", f"|---|{'---|' * len(KINDS)}---|"]
    functions: dict[str, dict[str, int]] = {}
    for method in METHODS:
        for precision in ("float32", "mixed"):
            training = OurTraining(method, raw, CLASSES, precision)
            counts = training.operators()
            cells = [str(counts[kind]) for kind in KINDS]
            lines.append(f"| {method}, {precision} | {' | '.join(cells)} | {sum(counts.values())} |")
        for name, number in OurTraining(method, raw, CLASSES, "float32").functions():
            functions.setdefault(name, {})[method] = number
    lines += ["", f"| entered per step | {' | '.join(METHODS)} |", f"|---|{'---|' * len(METHODS)}"]
    for name, numbers in functions.items():
        cells = [str(numbers.get(method, "")) for method in METHODS]
        lines.append(f"| `{name}` | {' | '.join(cells)} |")
    totals = [str(sum(method in numbers for numbers in functions.values())) for method in METHODS]
    return "\n".join([*lines, f"| functions | {' | '.join(totals)} |", ""])


def main() -> None:
    """Print the tables, or write them into the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write the tables into docs/training-step.md")
    printed = tables()
    if not parser.parse_args().write:
        print(printed)
        return
    before, rest = PAGE.read_text(encoding="utf-8").split(START)
    PAGE.write_text(before + START + printed + END + rest.split(END)[1], encoding="utf-8")


if __name__ == "__main__":
    main()
