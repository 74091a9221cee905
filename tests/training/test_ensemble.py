"""Ensembles: methods are stacked only if nothing but numbers differ, and the memory of an ensemble is counted correctly."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.method_cases import (
    CLASSES,
    ROWS,
    WIDTH,
    another_value,
    batches_of,
    build,
    changeable,
    fitted,
    make_batch,
    seeded_loss,
    settings,
    shapes,
    trained_phases,
    variant_id,
    variants,
    with_settings,
)
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from pipeline.nn.layers import LookupTable, register_hyperparameters
from pipeline.runtime import plugins
from pipeline.runtime.rng import KeyedRNG
from pipeline.runtime.runs import RunFolder
from pipeline.training.capacity import bytes_per_method
from pipeline.training.config import TrainConfig
from pipeline.training.ensemble import EnsembleTrainer, ModelEnsemble, clip_gradients_per_model, structure_key
from pipeline.training.loop import Trainer
from pipeline.training.state import TrainState

# Prefixes of the settings that are numbers in tensors; all other settings change code or shapes.
NUMERIC_SETTINGS = (
    "num_steps",
    "stage_step",
    "stage_order",
    "stages",
    "schedule",
    "train_min_step",
    "chain_steps",
    "ce_min_step",
    "on_policy",
    "tau",
    "w_",
    "dropout",
)


@pytest.mark.parametrize("name", ["baseline", "ema", "cdr", "marnet", "seda"])
def test_methods_that_differ_only_in_numbers_have_the_same_structure(name: str) -> None:
    default = settings(name, **({"adapter": "classifier"} if name in ("cdr", "seda") else {}))
    method = plugins.get("methods", name)
    known = structure_key(method(default, shapes()))
    assert structure_key(method(replace(default), shapes())) == known
    for field, hint in changeable(default).items():
        first = with_settings(default, **{field: another_value(default, field, hint)})
        other = structure_key(method(first, shapes()))
        if hint is float:  # two values, neither of which is 0: without dropout a head has another structure
            second = with_settings(default, **{field: another_value(first, field, hint)})
            same = other == structure_key(method(second, shapes()))
        else:
            same = other == known
        # the width of adapters, which MARNet has not, and that of the MLP, which is not SeDA's default
        is_unused = (name, field) in (("marnet", "cdr.width"), ("seda", "hidden"))
        assert same == (is_unused or field.rpartition(".")[2].startswith(NUMERIC_SETTINGS)), field


def test_the_length_of_an_ancestral_chain_is_part_of_the_structure() -> None:
    chains = [structure_key(build("marnet", sampler="ancestral", num_steps=num_steps)) for num_steps in (12, 14, 14)]
    assert chains[0] != chains[1] == chains[2]


class Plain(nn.Module):
    """A method with one attribute of any value."""

    def __init__(self, value: Any) -> None:
        super().__init__()
        self.value = value
        self.layer = nn.Linear(2, 2)


@dataclass(frozen=True)
class Choice:
    """A value that cannot change."""

    name: str


@dataclass
class Changeable:
    """A value that can change."""

    name: str


def a_function() -> None: ...


@pytest.mark.parametrize("value", [1, "a", (1, "a"), [1, {"b": 2.0}], Choice("a"), a_function, None])
def test_plain_attributes_are_compared_by_value(value: Any) -> None:
    known: Any = structure_key(Plain(value))  # pyright: ignore[reportArgumentType]
    assert structure_key(Plain(value)) == known  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (1, 2),
        (1, True),
        ([1], (1,)),
        ({"a": 1}, {"a": 2}),
        (Choice("a"), Choice("b")),
        (Changeable("a"), Changeable("a")),  # may change later, so it equals nothing
        (torch.ones(2), torch.ones(2)),
        ({1}, {1}),
        (lambda: 1, lambda: 1),
    ],
)
def test_other_attributes_keep_methods_apart(first: Any, second: Any) -> None:
    one: Any = structure_key(Plain(first))  # pyright: ignore[reportArgumentType]
    assert structure_key(Plain(second)) != one  # pyright: ignore[reportArgumentType]


class TableMethod(nn.Module):
    """A method whose loss reads the last number of its lookup table."""

    def __init__(self, length: int) -> None:
        super().__init__()
        self.needs, self.phases = (), ()
        self.layer = nn.Linear(1, 1)
        self.table = LookupTable(torch.arange(1.0, length + 1))
        register_hyperparameters(self, last=length - 1)
        self.register_buffer("seen", torch.zeros(()))

    def loss(self, batch: Any, phase: str) -> Any:
        assert isinstance(self.last, Tensor)
        assert isinstance(self.seen, Tensor)
        self.seen.add_(1.0)
        return {"loss": self.layer(self.table.values[self.last.long()].reshape(1, 1)).sum(), "whole": self.table.values.sum()}


def test_shorter_tables_are_padded_with_nan_and_each_method_keeps_its_own() -> None:
    methods: list[Any] = [TableMethod(length) for length in (5, 3, 4)]
    alone = [method.loss({}, "") for method in methods]
    ensemble = ModelEnsemble(methods)
    values = ensemble.loss({}, "")
    torch.testing.assert_close(values["loss"], torch.stack([value["loss"] for value in alone]))
    # The sum over a padded table is NaN, which shows that a method must never read beyond its own length.
    assert values["whole"].isnan().tolist() == [False, True, True]
    for method, before in zip(methods, alone, strict=True):
        torch.testing.assert_close(method.loss({}, ""), before)
        assert method.seen.item() == 3.0  # a value that a loss writes in place belongs to its method, also in an ensemble


def test_methods_see_the_steps_of_their_ensemble() -> None:
    methods = [build("baseline", seed=seed) for seed in range(3)]
    ensemble = ModelEnsemble(methods)
    with torch.no_grad():
        for _, parameter in ensemble.named_parameters():
            parameter.mul_(torch.tensor([1.0, 2.0, 3.0]).reshape(-1, *(1 for _ in parameter.shape[1:])))
    for factor, (method, fresh) in enumerate(((m, build("baseline", seed=s)) for s, m in enumerate(methods)), start=1):
        torch.testing.assert_close(method.classifier.weight, factor * fresh.classifier.weight)
    assert [name for name, _ in ensemble.named_parameters()] == [name for name, _ in methods[0].named_parameters()]


@pytest.mark.parametrize("limits", [(1e-3, 1.0, 1e6), (1.0, 1e-3, 1.0), (1e6, 1e-6, 1e-3)])
def test_each_model_is_clipped_by_itself(limits: tuple[float, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    gradients = [torch.randn(3, *shape, generator=generator) for shape in ((4, 5), (7,), ())]
    for gradient in gradients:
        gradient[1] *= 1e-4
        gradient[2] = torch.inf  # a model that diverges must not disturb the others
    expected = []
    for k in range(2):
        parameters = [nn.Parameter(torch.zeros_like(gradient[k])) for gradient in gradients]
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient[k].clone()
        nn.utils.clip_grad_norm_(parameters, limits[k])
        expected.append([parameter.grad for parameter in parameters])
    clip_gradients_per_model(gradients, torch.tensor(limits))
    for k in range(2):
        torch.testing.assert_close([gradient[k] for gradient in gradients], expected[k])


def test_the_memory_of_a_method_equals_a_count_by_hand() -> None:
    method, batch = build("baseline"), make_batch()
    weights = 4 * (WIDTH * CLASSES + CLASSES)
    # Saved for the backward pass: the standardised features, for the gradient of the weights, and the log-probabilities and
    # what belongs to them, for the gradient of the loss.
    saved = 4 * ROWS * (WIDTH + CLASSES)
    counted = bytes_per_method(method, batch, ROWS)
    assert 4 * weights + saved <= counted <= 4 * weights + 1.5 * saved
    assert bytes_per_method(method, batch, 10 * ROWS) - 4 * weights == 10 * (counted - 4 * weights)


@pytest.mark.parametrize("name", plugins.names("methods"))
def test_the_memory_of_a_method_is_what_its_graph_holds(name: str) -> None:
    method, batch = build(name), make_batch()
    weights = sum(4 * parameter.numel() for parameter in method.parameters())
    known = (*method.parameters(), *method.buffers(), *batch.values())
    phases = [phase.name for phase in trained_phases(method)]
    saved = max((_saved_bytes(lambda name=name: seeded_loss(method, batch, name)["loss"], known) for name in phases), default=0)
    before = torch.get_rng_state()
    assert bytes_per_method(method, batch, ROWS) == pytest.approx(4 * weights + saved, rel=0.05)
    assert torch.equal(torch.get_rng_state(), before)


WAITING_OPERATORS = (
    "_local_scalar_dense",
    "lift_fresh",
    "nonzero",
    "masked_select",
    "equal.default",
)  # they wait for the device, or copy data to it


class NoWaiting(TorchDispatchMode):
    """Fails on operators that make a program wait for a GPU."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        assert not any(name in str(func) for name in WAITING_OPERATORS), func
        if "aten.index" in str(func) and isinstance(args[1], list):
            assert all(index is None or index.dtype == torch.int64 for index in args[1]), (
                "indexing with a mask waits for the number of its rows"
            )
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("variant", variants(), ids=variant_id)
def test_neither_a_step_nor_a_prediction_waits_for_the_device(variant: tuple[str, dict[str, Any]], tmp_path: Path) -> None:
    name, changes = variant
    batch = make_batch()
    for number in (1,) if changes else (1, 2):
        methods = [fitted(name, **changes)[0] for _ in range(number)]
        for phase in range(len(methods[0].phases)):
            states = [TrainState(method=method, run=RunFolder(tmp_path, 0), config=TrainConfig()) for method in methods]
            for state in states:
                state.progress.phase = phase
                state.start_phase(batches_of(batch))
            trainer = Trainer(states) if number == 1 else EnsembleTrainer(states)
            with NoWaiting():
                for _ in range(2):
                    if states[0].phase.candidates:
                        for state in states:
                            state.choose_candidate()
                    else:
                        trainer.step(batch, states[0].phase.name)
                trainer.model.train(False)
                with torch.no_grad():
                    trainer.model.predict(batch["image"], KeyedRNG.seeded(0, batch["key"]))


def _saved_bytes(loss: Callable[[], Tensor], known_tensors: Sequence[Tensor]) -> int:
    """Return the bytes of the tensors that the nodes of a graph have saved, by walking over the graph."""
    known = {tensor.untyped_storage().data_ptr() for tensor in known_tensors}
    value = loss()
    storages, pending, seen = {}, [value.grad_fn], set()
    while pending:
        node = pending.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        for key in dir(node):
            tensor = getattr(node, key) if key.startswith("_saved_") else None
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in known:
                storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        pending.extend(previous for previous, _ in node.next_functions)
    return sum(storages.values())
