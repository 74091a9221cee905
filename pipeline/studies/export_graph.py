"""The encoder and the head of a run as one graph, from prepared pixels to logits, for programs without this package.

Random numbers are an input of the graph: whoever runs it may draw them, and those that the run itself would draw are known by
the names of their streams, see `Draw`. The steps of the sampler are a loop in the graph.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor, fx, nn
from torchvision.transforms import Normalize

from pipeline.encoders._encoder import Encoder
from pipeline.nn.method import Method
from pipeline.runtime.errors import UserError
from pipeline.runtime.rng import KeyedRNG

OPTIONAL_PACKAGES = "pip install onnx onnxruntime onnxscript"
MAX_BATCH = 65_536
NUM_EXAMPLES = 2  # items of the batch that is traced; with one, its dimension would be taken for a constant
_HALF = {"float16": torch.float16, "bfloat16": torch.bfloat16}


class Draw(NamedTuple):
    """Standard normal numbers of one stream of `KeyedRNG`, for each item."""

    names: tuple[int | str, ...]  # of the stream, as `KeyedRNG.at` takes them
    shape: tuple[int, ...]  # of the numbers of one item

    @property
    def size(self) -> int:
        """The numbers of one item: columns of the noise."""
        return math.prod(self.shape)

    def of(self, rng: KeyedRNG) -> Tensor:
        """Return the numbers that a run draws, [B, size]."""
        return rng.at(*self.names).normal(*self.shape).flatten(1)


def run_noise(draws: Sequence[Draw], seed: int, keys: Tensor) -> Tensor:
    """Return the noise [B,M] that a run of this seed draws for items with these keys [B]."""
    rng = KeyedRNG.seeded(seed, keys).at("predict")
    return torch.cat([draw.of(rng) for draw in draws], dim=1) if draws else torch.zeros(len(keys), 0)


class NoiseInput:
    """Stands for a `KeyedRNG` whose numbers are columns of a tensor [B,M]; without one, it records what is drawn."""

    def __init__(self, draws: list[Draw], noise: Tensor | None, num_items: int, names: tuple[Any, ...] = ()) -> None:
        self.draws, self.noise, self.num_items, self.names = draws, noise, num_items, names

    def at(self, *names: Any) -> NoiseInput:
        """Return the streams with these names added."""
        return NoiseInput(self.draws, self.noise, self.num_items, (*self.names, *names))

    def normal(self, *shape: int) -> Tensor:
        """Return standard normal numbers [B, *shape]; the same stream gives the same numbers again."""
        draw = Draw(self.names, shape)
        if self.noise is None:
            if draw not in self.draws:
                self.draws.append(draw)
            return torch.zeros(self.num_items, *shape)
        first = sum(each.size for each in self.draws[: self.draws.index(draw)])
        return self.noise[:, first : first + draw.size].reshape(-1, *shape)

    def uniform(self, *shape: int) -> NoReturn:
        """Refuse: the noise of a graph is normal."""
        raise UserError("the head draws other numbers than normal ones in prediction: it cannot be exported")

    bits = uniform


class _ChannelNormalize(nn.Module):
    """The same numbers as torchvision's `Normalize`, whose check of the deviation cannot be traced."""

    mean: Tensor
    std: Tensor

    def __init__(self, normalize: Normalize) -> None:
        super().__init__()
        for name in ("mean", "std"):
            values = torch.as_tensor(getattr(normalize, name), dtype=torch.float32).reshape(-1, 1, 1)
            self.register_buffer(name, values, persistent=False)

    def forward(self, pixels: Tensor) -> Tensor:
        return (pixels - self.mean) / self.std


class ClassifierGraph(nn.Module):
    """An encoder and a head: logits [B,C] from prepared pixels [B, ...] and noise [B,M]."""

    def __init__(self, encoder: Encoder, head: Method, store_dtype: str) -> None:
        """Put both on the CPU.

        Args:
            encoder: computes as it did for the run.
            head: the trained method.
            store_dtype: the number format that features are rounded to between both, as in the cache.
        """
        super().__init__()
        self.encoder, self.head, self.stored_as = encoder.cpu(), head.cpu(), _HALF.get(store_dtype)
        for part in encoder.modules():
            if isinstance(part, Encoder):
                part.device = torch.device("cpu")
            if isinstance(normalize := getattr(part, "normalize", None), Normalize):
                setattr(part, "normalize", _ChannelNormalize(normalize))  # noqa: B010 - it is no attribute of nn.Module
        self.train(False).requires_grad_(False)  # the loop of a sampler is traced for its values alone
        self.draws: list[Draw] = []

    def record_draws(self, pixel_values: Tensor) -> None:
        """Find out which random numbers the head draws."""
        with torch.no_grad():
            self(pixel_values)

    def forward(self, pixel_values: Tensor, noise: Tensor | None = None) -> Tensor:
        """Return logits [B,C]."""
        features = self.encoder(pixel_values)
        features = features.to(self.stored_as).float() if self.stored_as else features
        rng: Any = NoiseInput(self.draws, noise, pixel_values.shape[0])
        return self.head.predict(features, rng)


def trace(graph: ClassifierGraph, examples: tuple[Tensor, ...]) -> torch.export.ExportedProgram:
    """Return the graph as a program for batches of any size.

    Args:
        graph: the encoder and the head, whose draws are recorded.
        examples: pixels and, if the head draws any, noise, of NUM_EXAMPLES items.

    Raises:
        UserError: an operation of the encoder or the head cannot be traced.
    """
    batch = torch.export.Dim("batch", min=1, max=MAX_BATCH)
    shapes = dict(zip(("pixel_values", "noise"), ({0: batch} for _ in examples), strict=False))
    try:
        with torch.no_grad():
            program = torch.export.export(graph, examples, dynamic_shapes=shapes, strict=False)
    except Exception as error:  # torch.export raises errors of many kinds, and each means the same
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"this run cannot be exported: {type(graph.head).__name__} or its encoder cannot be traced ({first})"
        ) from error
    for module in program.graph_module.modules():
        for node in module.graph.nodes if isinstance(module, fx.GraphModule) else ():
            node.meta.pop("stack_trace", None)  # it names source files of this machine
    return program


def used_weights(program: torch.export.ExportedProgram) -> dict[str, Tensor]:
    """Return the weights that the program reads, by name: "encoder.…" and "head.…"."""
    used = {node.name for node in program.graph.nodes if node.op == "placeholder" and node.users}
    names = [spec.target for spec in program.graph_signature.input_specs if spec.arg.name in used and spec.target]
    tensors: Mapping[str, Any] = {**program.state_dict, **program.constants}
    return {name: tensors[name].detach().contiguous().clone() for name in names if isinstance(tensors.get(name), Tensor)}
