"""Tiny data, and all variants of all methods. They are found by introspection, so a new method needs no edit here."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any, Literal, get_args, get_origin

import numpy as np
import torch
from scipy.special import log_softmax
from torch import Tensor, nn

from pipeline.runtime import plugins
from pipeline.runtime.errors import UserError
from pipeline.runtime.rng import KeyedRNG, sample_keys
from pipeline.runtime.settings import aliases_of, configure, field_types, find_settings, flatten, name_settings
from pipeline.types import Batch, Phase, Shapes

ROWS, WIDTH, CLASSES = 64, 16, 5
# Numeric settings that get a variant of their own, with its value.
VARIED_NUMBERS = {
    "dropout": 0.5,
    "eta": 1.0,
    "draws": 3,
    "train_min_step": 0.5,
    "ce_min_step": 0.5,
    "on_policy": 0.5,
    "crossfit": 2,
}
LABEL_KINDS = ("single", "multi")


def shapes(kind: str = "single", text_width: int = WIDTH) -> Shapes:
    return {
        "image": (WIDTH,),
        "text": (text_width,),
        "label": () if kind == "single" else (CLASSES,),
        "classes": (CLASSES,),
    }


def settings(method: str, **changes: Any) -> Any:
    """Return the config of a method with tiny sizes."""
    method_class = plugins.get("methods", method)
    return with_settings(configure(method_class.Config, method_class.small()), **changes)


def with_settings(config: Any, **changes: Any) -> Any:
    """Return a config with some settings changed, by name or alias."""
    return configure(type(config), {**flatten(asdict(config)), **name_settings(type(config), changes)})


def value_of(config: Any, name: str) -> Any:
    """Return a setting, by name or alias; an alias of several settings has the value of the first."""
    return flatten(asdict(config))[find_settings(type(config), name)[0]]


def changeable(config: Any) -> dict[str, Any]:
    """Return the types of all settings that can change by themselves, by name, and those that change together, by alias."""
    types = field_types(type(config))
    together = {alias: types[names[0]] for alias, names in aliases_of(type(config)).items() if len(names) > 1}
    return {name: kind for name, kind in {**types, **together}.items() if another_value(config, name, kind) is not None}


def variants() -> list[tuple[str, dict[str, Any]]]:
    """Return, for every method, its defaults and each config that differs from them in one setting, as (method, changes)."""
    result: list[tuple[str, dict[str, Any]]] = []
    for method in plugins.names("methods"):
        default = settings(method)
        result.append((method, {}))
        for name, hint in changeable(default).items():
            number = VARIED_NUMBERS.get(name.rpartition(".")[2])
            choices: tuple[Any, ...] = () if number is None else (number,)
            if get_origin(hint) is Literal:
                choices = get_args(hint)
            elif hint is bool:
                choices = (True, False)
            choices = tuple(choice for choice in choices if choice != value_of(default, name))
            result += [(method, {name: choice}) for choice in choices if _is_valid(default, name, choice)]
    return result


def variant_id(variant: object) -> str:
    if isinstance(variant, tuple):
        method, changes = variant
        return "-".join([method, *(f"{key}={value}" for key, value in changes.items())])
    return str(variant)


def build(method: str, kind: str = "single", text_width: int = WIDTH, seed: int = 0, **changes: Any) -> Any:
    torch.manual_seed(seed)
    return plugins.get("methods", method)(settings(method, **changes), shapes(kind, text_width))


def make_sample_keys(rows: int = ROWS) -> Tensor:
    return sample_keys(f"sample-{i}" for i in range(rows))


def make_batch(kind: str = "single", text_width: int = WIDTH, rows: int = ROWS, seed: int = 0) -> Batch:
    """Return a batch of features that are not standardised and depend on the class; every eighth sample has no text."""
    generator = torch.Generator().manual_seed(seed)
    label = torch.arange(rows) % CLASSES
    image, text = (3.0 * torch.randn(rows, width, generator=generator) + 1.0 for width in (WIDTH, text_width))
    image[:, 0] += 5.0 * label
    text[:, 1] += 5.0 * label
    if kind == "multi":
        label = (torch.rand(rows, CLASSES, generator=generator) < 0.4).float()
        label[:, 0] = 1.0
    paired = (torch.arange(rows) % 8 != 3).float()
    return {"image": image, "text": text, "paired": paired, "label": label, "key": make_sample_keys(rows)}


def batches_of(batch: Batch, size: int = 24) -> Callable[[], Iterator[Batch]]:
    """Return a function that starts an ordered pass over the batch, in small batches, as over a training split."""

    def train() -> Iterator[Batch]:
        for start in range(0, len(batch["key"]), size):
            yield {key: column[start : start + size] for key, column in batch.items()}

    return train


def make_rng(seed: int = 0, samples: Tensor | None = None) -> KeyedRNG:
    return KeyedRNG.seeded(seed, make_sample_keys() if samples is None else samples)


def seeded_loss(method: Any, batch: Batch, phase: str = "head", seed: int = 0) -> Batch:
    """Return the loss of a method, or of an ensemble, and its parts, with the random numbers of a seed."""
    torch.manual_seed(seed)
    return method.loss(batch, phase)


def trained_phases(method: Any) -> list[Phase]:
    """The phases that train by gradient; the others try candidates, and have no loss."""
    return [phase for phase in method.phases if not phase.candidates]


def freeze(method: nn.Module, phase: Phase) -> None:
    """Freeze all parameters that a phase does not train, as the training loop does."""
    for name, parameter in method.named_parameters():
        parameter.requires_grad_(name.startswith(phase.trains))
        parameter.grad = None


def fitted(method: str, kind: str = "single", text_width: int = WIDTH, seed: int = 0, **changes: Any) -> tuple[Any, Batch]:
    """Return a method with statistics but without training, in evaluation mode, and its training split."""
    model, batch = build(method, kind, text_width, seed, **changes), make_batch(kind, text_width)
    for phase in model.phases:
        model.begin(phase.name, batches_of(batch))
    return model.train(False), batch


def to_numpy(x: Tensor) -> np.ndarray:
    return x.detach().to(torch.float64).numpy()


def cross_entropy(logits: Tensor, label: Tensor, rows: np.ndarray | slice = slice(None)) -> float:
    """Return the mean cross-entropy of the given rows, with scipy; multi-hot labels become a uniform target distribution."""
    target = np.eye(CLASSES)[label.numpy()] if label.ndim == 1 else to_numpy(label) / to_numpy(label).sum(1, keepdims=True)
    return float(-(target * log_softmax(to_numpy(logits), axis=1)).sum(1)[rows].mean())


def noise_levels(num_steps: int) -> np.ndarray:
    """Return abar [T] of the linear schedule."""
    return np.cumprod(1.0 - np.linspace(1e-4, 0.02, num_steps))


class StubDenoiser(nn.Module):
    """A denoiser that returns the visual feature ("image") or the noisy text ("input")."""

    def __init__(self, returns: Literal["image", "input"]) -> None:
        super().__init__()
        self.returns = returns

    def image_context(self, x_v: Tensor) -> Tensor:
        return x_v

    def embed_step(self, n: Tensor) -> Tensor:
        return n

    def forward(self, x_n: Tensor, e: Tensor, context: Tensor) -> Tensor:
        return context if self.returns == "image" else x_n


def another_value(config: Any, field: str, hint: Any) -> Any:
    """Return a valid value of a setting that differs from the one in the config; None if the others need other changes, too."""
    value, candidates = value_of(config, field), (True, False)
    if hint is str:
        return None  # a name means something only together with other settings
    if get_origin(hint) is Literal:
        candidates = tuple(reversed(get_args(hint)))
    elif hint is not bool:
        candidates = (
            (2 * value, value // 2, value + 1, value - 1, value + 2) if hint is int else (0.5, value / 2, 2 * value, 1.0)
        )
    known = (value, 0.0) if hint is float else (value,)
    return next((each for each in candidates if each not in known and _is_valid(config, field, each)), None)


def _is_valid(config: Any, field: str, value: Any) -> bool:
    try:
        with_settings(config, **{field: value})
    except UserError:
        return False
    return True
