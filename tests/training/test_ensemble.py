"""Methods are stacked when only numbers differ, and never otherwise; what a stack needs is counted as torch counts it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, get_type_hints

import pytest
import torch
from helpers.method_cases import (
    CLASSES,
    ROWS,
    WIDTH,
    build,
    data,
    fitted,
    other,
    passes,
    settings,
    shapes,
    streams,
    variant_id,
    variants,
)
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from pipeline.nn.layers import LookupTable, register_hyperparameters
from pipeline.runtime import plugins
from pipeline.runtime.rng import KeyedRNG
from pipeline.runtime.runs import RunFolder
from pipeline.training.config import TrainConfig
from pipeline.training.ensemble import ModelEnsemble, clip_each, lane_bytes, structure
from pipeline.training.optim import EnsembleOptimizer
from pipeline.training.state import TrainState

# Settings that are numbers in tensors; all others decide about code or shapes.
FREE = ("num_steps", "stage_step", "schedule", "train_min_step", "ce_min_step", "tau", "w_", "dropout")


@pytest.mark.parametrize("name", ["baseline", "ema", "cdr", "marnet", "seda"])
def test_methods_that_differ_in_numbers_alone_have_one_structure(name: str) -> None:
    default = settings(name, **({"adapter": "classifier"} if name in ("cdr", "seda") else {}))
    method = plugins.get("methods", name)
    known = structure(method.build(default, shapes()))
    hints = get_type_hints(method.Config)
    assert structure(method.build(replace(default), shapes())) == known
    for field in fields(default):
        changed = replace(default, **{field.name: other(default, field.name, hints[field.name])})
        same = structure(method.build(changed, shapes())) == known
        assert same == field.name.startswith(FREE), field.name


def test_a_chain_over_all_steps_is_of_one_length_in_a_structure() -> None:
    chains = [structure(build("marnet", sampler="ancestral", num_steps=num_steps)) for num_steps in (12, 14, 14)]
    assert chains[0] != chains[1] == chains[2]


class Plain(nn.Module):
    """A method with whatever attribute."""

    def __init__(self, value: Any) -> None:
        super().__init__()
        self.value = value
        self.layer = nn.Linear(2, 2)


@dataclass(frozen=True)
class Choice:
    """A value."""

    name: str


@dataclass
class Changeable:
    """A value that can change."""

    name: str


def a_function() -> None: ...


@pytest.mark.parametrize("value", [1, "a", (1, "a"), [1, {"b": 2.0}], Choice("a"), a_function, None])
def test_plain_attributes_are_compared_by_value(value: Any) -> None:
    known: Any = structure(Plain(value))  # pyright: ignore[reportArgumentType]
    assert structure(Plain(value)) == known  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (1, 2),
        (1, True),
        ([1], (1,)),
        ({"a": 1}, {"a": 2}),
        (Choice("a"), Choice("b")),
        (Changeable("a"), Changeable("a")),  # cannot be compared for good
        (torch.ones(2), torch.ones(2)),
        ({1}, {1}),
        (lambda: 1, lambda: 1),
    ],
)
def test_other_attributes_keep_methods_apart(first: Any, second: Any) -> None:
    one: Any = structure(Plain(first))  # pyright: ignore[reportArgumentType]
    assert structure(Plain(second)) != one  # pyright: ignore[reportArgumentType]


class Lookup(nn.Module):
    """A method whose loss reads the last number of its own table."""

    def __init__(self, length: int) -> None:
        super().__init__()
        self.needs, self.phases = (), ()
        self.layer = nn.Linear(1, 1)
        self.table = LookupTable(torch.arange(1.0, length + 1))
        register_hyperparameters(self, last=length - 1)
        self.register_buffer("seen", torch.zeros(()))

    def loss(self, batch: Any, rng: Any, phase: str) -> Any:
        assert isinstance(self.last, Tensor)
        assert isinstance(self.seen, Tensor)
        self.seen.add_(1.0)
        return {"loss": self.layer(self.table.values[self.last.long()].reshape(1, 1)).sum(), "whole": self.table.values.sum()}


def test_shorter_tables_are_filled_up_with_nan_and_every_method_keeps_its_own() -> None:
    methods: list[Any] = [Lookup(length) for length in (5, 3, 4)]
    alone = [method.loss({}, None, "") for method in methods]
    stack = ModelEnsemble(methods)
    values = stack.loss({}, streams(), "")
    torch.testing.assert_close(values["loss"], torch.stack([value["loss"] for value in alone]))
    assert values["whole"].isnan().tolist() == [False, True, True]  # NaN is what a table must not be read for
    for method, before in zip(methods, alone, strict=True):
        torch.testing.assert_close(method.loss({}, None, ""), before)
        assert method.seen.item() == 3.0  # what a loss writes in place is the method's own, also in a stack


def test_methods_see_the_steps_of_their_stack() -> None:
    methods = [build("baseline", seed=seed) for seed in range(3)]
    stack = ModelEnsemble(methods)
    with torch.no_grad():
        for _, leaf in stack.named_parameters():
            leaf.mul_(torch.tensor([1.0, 2.0, 3.0]).reshape(-1, *(1 for _ in leaf.shape[1:])))
    for factor, (method, fresh) in enumerate(((m, build("baseline", seed=s)) for s, m in enumerate(methods)), start=1):
        torch.testing.assert_close(method.classifier.weight, factor * fresh.classifier.weight)
    assert [name for name, _ in stack.named_parameters()] == [name for name, _ in methods[0].named_parameters()]


@pytest.mark.parametrize("limits", [(1e-3, 1.0, 1e6), (1.0, 1e-3, 1.0), (1e6, 1e-6, 1e-3)])
def test_clipping_is_that_of_each_model(limits: tuple[float, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    gradients = [torch.randn(3, *shape, generator=generator) for shape in ((4, 5), (7,), ())]
    for gradient in gradients:
        gradient[1] *= 1e-4
        gradient[2] = torch.inf  # one that diverges disturbs no other
    expected = []
    for k in range(2):
        parameters = [nn.Parameter(torch.zeros_like(gradient[k])) for gradient in gradients]
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient[k].clone()
        nn.utils.clip_grad_norm_(parameters, limits[k])
        expected.append([parameter.grad for parameter in parameters])
    clip_each(gradients, torch.tensor(limits))
    for k in range(2):
        torch.testing.assert_close([gradient[k] for gradient in gradients], expected[k])


def test_the_memory_of_a_lane_is_counted_by_hand() -> None:
    method, batch = build("baseline"), data()
    weights = 4 * (WIDTH * CLASSES + CLASSES)
    # the standardised features, for the gradient of the weights; the log-probabilities and their share, for that of the loss
    left = 4 * ROWS * (WIDTH + CLASSES)
    counted = lane_bytes(method, batch, streams(), ROWS)
    assert 4 * weights + left <= counted <= 4 * weights + 1.5 * left
    assert lane_bytes(method, batch, streams(), 10 * ROWS) - 4 * weights == 10 * (counted - 4 * weights)


@pytest.mark.parametrize("name", plugins.names("methods"))
def test_the_memory_of_a_lane_is_what_its_graph_holds(name: str) -> None:
    method, batch = build(name), data()
    weights = sum(4 * parameter.numel() for parameter in method.parameters())
    known = (*method.parameters(), *method.buffers(), *batch.values())
    held = max(_held(lambda phase=phase: method.loss(batch, streams(), phase.name)["loss"], known) for phase in method.phases)
    assert lane_bytes(method, batch, streams(), ROWS) == pytest.approx(4 * weights + held, rel=0.05)


WAITS = (
    "_local_scalar_dense",
    "lift_fresh",
    "nonzero",
    "masked_select",
    "equal.default",
)  # for the device, or with data for it


class NoWaiting(TorchDispatchMode):
    """Refuses operators that make a program wait for a GPU."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        assert not any(name in str(func) for name in WAITS), func
        if "aten.index" in str(func) and isinstance(args[1], list):
            assert all(index is None or index.dtype == torch.int64 for index in args[1]), "a mask has a length to be asked for"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("variant", variants(), ids=variant_id)
def test_neither_a_step_nor_a_prediction_waits_for_the_device(variant: tuple[str, dict[str, Any]], tmp_path: Path) -> None:
    name, changes = variant
    batch = data()
    for number in (1,) if changes else (1, 2):
        methods = [fitted(name, **changes)[0] for _ in range(number)]
        for phase in range(len(methods[0].phases)):
            lanes = [TrainState(method=method, run=RunFolder(tmp_path, 0), config=TrainConfig()) for method in methods]
            for lane in lanes:
                lane.state.phase = phase
                lane.begin(passes(batch))
            learner = EnsembleOptimizer(lanes)
            with NoWaiting():
                for step in range(2):
                    rng = KeyedRNG.seeded(0, batch["key"]).at(step)
                    learner.step(learner.loss(batch, rng, lanes[0].phase.name)["loss"])
                learner.model.train(False)
                with torch.no_grad():
                    learner.model.predict(batch["image"], KeyedRNG.seeded(0, batch["key"]))


def _held(loss: Callable[[], Tensor], known_tensors: Sequence[Tensor]) -> int:
    """Bytes of the saved tensors of a graph's nodes, found by walking over it."""
    known = {tensor.untyped_storage().data_ptr() for tensor in known_tensors}
    value = loss()
    storages, todo, seen = {}, [value.grad_fn], set()
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        for key in dir(node):
            tensor = getattr(node, key) if key.startswith("_saved_") else None
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in known:
                storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        todo.extend(before for before, _ in node.next_functions)
    return sum(storages.values())
