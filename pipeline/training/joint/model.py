"""A head and the encoders under it as one method: what stage 3 trains, in the loop of stage 2."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pipeline.nn.feature_space import ADAPT
from pipeline.runtime.rng import KeyedRNG
from pipeline.training.joint.ddp import DistributedContext
from pipeline.types import Batch, Method, Phase

Encode = Callable[[Tensor], Tensor]  # prepared items [B, ...] to features [B, *shape]


class Parts(nn.Module):
    """An encoder that takes a batch in parts: those of all but the one at work are forgotten and computed again backwards.

    The gradient is that of the whole batch, contrasts included; the memory is that of a part.
    """

    def __init__(self, encoder: nn.Module, encode: Encode, num_parts: int) -> None:
        """`encode` runs the encoder, whole or from a block on."""
        super().__init__()
        self.encoder, self.num_parts = encoder, num_parts
        self._encode = (encode,)  # in a tuple: it may be the encoder, which is registered already

    def forward(self, items: Tensor) -> Tensor:
        """Features [B, *shape] of items [B, ...]."""
        (encode,) = self._encode
        if self.num_parts == 1 or not torch.is_grad_enabled():
            return encode(items)
        parts = [checkpoint(encode, part, use_reentrant=False) for part in items.chunk(self.num_parts)]
        return torch.cat(cast(list[Tensor], parts))


class Joint(nn.Module):
    """One loss of a head and of encoders that are trained with it; the features of the others are columns of the batch.

    A batch brings, beside the cached columns, `<key>_items` [M, ...], this process's share of the prepared items of every live
    encoder, and, as a sample can have several texts, `text_owner` [M'], the sample of each of the M' texts of all processes.

    The phases of the head become one, whose loss is the sum of theirs; only adapters stay as they are, since a target that is
    learned together with its regression collapses (live texts move as well, as in the papers: their classification losses and
    the standardisation hold them). The encoders stay in evaluation mode: their batch statistics are those they were pretrained
    with, and nothing is dropped. The head's statistics (of standardisation, class centres: what `begin` takes) follow the
    encoders: `follow` takes them anew before every validation.
    """

    def __init__(
        self,
        head: Method,
        encoders: Mapping[str, nn.Module],
        encode: Mapping[str, Encode],
        trains: tuple[str, ...],
        rates: tuple[tuple[str, float], ...],
        ranks: DistributedContext,
    ) -> None:
        """`encoders` by batch key, and what runs them in training; names of trained parameters begin with one of `trains`."""
        super().__init__()
        self.head = head
        for key, encoder in encoders.items():
            self.add_module(key, encoder)
        self._encode, self._ranks = dict(encode), ranks
        self.needs = head.needs
        self.steps = tuple(phase for phase in head.phases if phase.name != ADAPT.name)
        heads = tuple(f"head.{beginning}" for phase in self.steps for beginning in phase.trains)
        self.phases = (Phase("joint", (*heads, *trains), rates=rates),)
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(name.startswith(self.phases[0].trains))
        self.last_loss = torch.zeros(())  # of the step before

    def train(self, mode: bool = True) -> Joint:
        """Set the head's mode; the encoders have one only."""
        self.training = mode
        self.head.train(mode)
        return self

    def begin(self, phase: str, train: Callable[[], Iterator[Batch]]) -> None:
        """Nothing: the head comes with its statistics."""

    def loss(self, batch: Batch, rng: KeyedRNG, phase: str) -> Batch:
        """The sum of the head's losses on live features; the parts are named by the phase they come from."""
        batch = self.live(batch)
        losses, parts = [], {}
        for step in self.steps:
            own = self.head.loss(batch, rng.at(step.name), step.name)
            losses.append(own["loss"])
            parts |= {f"{step.name}_{name}": value for name, value in own.items()}
        total = torch.stack(losses).sum()
        self.last_loss = total.detach()
        return {"loss": total, **parts}

    def live(self, batch: Batch) -> Batch:
        """The batch with live features instead of the cached ones."""
        return {**batch, **{key: self._features(key, batch) for key in self._encode}}

    def _features(self, key: str, batch: Batch) -> Tensor:
        """Live features [B, *shape] of a batch key; samples without a live text keep what is in the column."""
        items = batch[f"{key}_items"]
        if key != "text":
            return self._ranks.gather(self._encode[key](items), len(batch["key"]))
        owner, column = batch["text_owner"], batch["text"]
        if not len(owner):
            return column
        texts = self._ranks.gather(self._encode[key](items), len(owner)).to(column.dtype)
        member = (owner == torch.arange(len(column), device=owner.device).unsqueeze(1)).to(texts.dtype)
        counts = member.sum(dim=1, keepdim=True)  # a product sums in one order, unlike a scattered addition on a GPU
        with torch.autocast(column.device.type, enabled=False):  # a mean of texts is that of stage 2
            means = member / counts.clamp(min=1) @ texts
        return torch.where(counts > 0, means, column)

    @torch.no_grad()
    def follow(self, batches: Iterable[Batch]) -> dict[str, float]:
        """Take the head's statistics of the training split, from one ordered pass of batches with items; see `loss`.

        Returns, for every live key, the mean cosine of live and cached features. Heads of all processes become the first one's.
        """
        self.train(False)
        self._ranks.align(self.head.state_dict().values())
        cosines: dict[str, list[Tensor]] = {f"cosine_{key}": [] for key in self._encode}
        seen = []
        for batch in batches:
            live = self.live(batch)
            seen.append({key: live[key] for key in (*self.needs, "key")})
            for key in self._encode:
                paired = batch["paired"] > 0 if key == "text" else slice(None)
                near = F.cosine_similarity(live[key].flatten(1).float(), batch[key].flatten(1).float())
                cosines[f"cosine_{key}"].append(near[paired])
        for step in self.steps:
            self.head.begin(step.name, lambda: iter(seen))
        return {name: float(torch.cat(parts).mean()) for name, parts in cosines.items()}

    def predict(self, image: Tensor, rng: KeyedRNG) -> Tensor:
        """Logits [B,C] of prepared images [B, ...]; text cannot reach it."""
        return self.head.predict(self._image(image), rng)

    def feature(self, image: Tensor, rng: KeyedRNG) -> Tensor:
        """The head's feature [B,D] of prepared images [B, ...]."""
        return self.head.feature(self._image(image), rng)

    def _image(self, items: Tensor) -> Tensor:
        encode = self._encode.get("image")
        return encode(items) if encode else items
