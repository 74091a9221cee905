"""The method that stage 3 trains: a head together with the encoders that compute its features."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import chain
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pipeline.nn.feature_space import ADAPTER_PHASE
from pipeline.nn.method import Method
from pipeline.runtime.rng import KeyedRNG
from pipeline.training.joint.ddp import DistributedContext
from pipeline.types import Batch, Phase

EncodeFn = Callable[[Tensor], Tensor]  # prepared items [B, ...] -> features [B, *shape]


class MicroBatchEncoder(nn.Module):
    """An encoder that processes a batch in several parts to save memory.

    Only the activations of one part are in memory at a time; the backward pass computes those of the other parts again. The
    gradient is still that of the whole batch, also for contrastive losses.
    """

    def __init__(self, encoder: nn.Module, encode: EncodeFn, num_parts: int) -> None:
        """Wrap an encoder.

        Args:
            encoder: The encoder, whose parameters are registered here.
            encode: Runs the whole encoder, or its last blocks.
            num_parts: The number of parts of a batch.
        """
        super().__init__()
        self.encoder, self.num_parts = encoder, num_parts
        self._encode = (encode,)  # in a tuple, since `encode` may be the encoder, which must not be registered twice

    def forward(self, items: Tensor) -> Tensor:
        """Return the features [B, *shape] of items [B, ...]."""
        (encode,) = self._encode
        if self.num_parts == 1 or not torch.is_grad_enabled():
            return encode(items)
        parts = [checkpoint(encode, part, use_reentrant=False) for part in items.chunk(self.num_parts)]
        return torch.cat(cast(list[Tensor], parts))


class JointMethod(Method):
    """A head and the encoders that are trained with it, with one loss for all of them.

    The features of the other encoders are columns of the batch, as in stage 2. Besides the cached columns, a batch holds:

    - `<key>_items` [M, ...] for each trained encoder: this process's share of the prepared items;
    - `text_owner` [M'] if the text encoder is trained, since a sample can have several texts: for each of the M' texts of all
      processes, the position of its sample in the batch.

    The phases of the head become one phase, whose loss is the sum of theirs. Adapters are the exception and stay as they are,
    because a target that is learned together with its regression collapses. (Trained texts move as well, as in the papers:
    their classification losses and the standardisation prevent a collapse.)

    The encoders stay in evaluation mode: they keep the batch statistics of their pretraining, and use no dropout. The
    statistics of the head (standardisation, class centres: everything that `begin` takes) must follow the encoders, so
    `update_statistics` takes them again before every validation.
    """

    def __init__(
        self,
        head: Method,
        encoders: Mapping[str, nn.Module],
        encode: Mapping[str, EncodeFn],
        trains: tuple[str, ...],
        rates: tuple[tuple[str, float], ...],
        context: DistributedContext,
    ) -> None:
        """Combine a head and its encoders.

        Args:
            head: The head of stage 2.
            encoders: The trained encoders by batch key.
            encode: The functions that run the encoders in training, by batch key.
            trains: Prefixes of the names of all trained encoder parameters.
            rates: Prefixes of names of encoder parameters, with factors of the learning rate; see `Phase.rates`.
            context: The processes that train the model.
        """
        nn.Module.__init__(self)  # it has no Config: its parts are given
        self.head = head
        for key, encoder in encoders.items():
            self.add_module(key, encoder)
        self._encode, self._context = dict(encode), context
        self.needs = head.needs
        self.head_phases = tuple(phase for phase in head.phases if phase.name != ADAPTER_PHASE.name)
        inner = [phase.inside("head") for phase in self.head_phases]
        trains = (*chain.from_iterable(phase.trains for phase in inner), *trains)
        limits = tuple(chain.from_iterable(phase.limits for phase in inner))
        undecayed = tuple(chain.from_iterable(phase.undecayed for phase in inner))
        self.phases = (Phase("joint", trains, rates=rates, limits=limits, undecayed=undecayed),)
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(name.startswith(self.phases[0].trains))
        self.last_loss = torch.zeros(())  # loss of the previous step

    def train(self, mode: bool = True) -> JointMethod:
        """Set the mode of the head; the encoders always stay in evaluation mode."""
        self.training = mode
        self.head.train(mode)
        return self

    def begin(self, phase: str, train: Callable[[], Iterator[Batch]]) -> None:
        """Do nothing: the head already has its statistics."""

    def loss(self, batch: Batch, phase: str) -> Batch:
        """Return the sum of the head's losses on the features of the trained encoders, and the parts of each head phase."""
        batch = self.encode_batch(batch)
        losses, parts = [], {}
        for head_phase in self.head_phases:
            if self.training:
                self._train_parts(head_phase)
            phase_parts = self.head.loss(batch, head_phase.name)
            losses.append(phase_parts["loss"])
            parts |= {f"{head_phase.name}_{name}": value for name, value in phase_parts.items()}
        total = torch.stack(losses).sum()
        self.last_loss = total.detach()
        return {"loss": total, **parts}

    def _train_parts(self, phase: Phase) -> None:
        """Set the modes that the parts of the head have in a phase of stage 2: those that it does not train predict."""
        for name, part in self.head.named_children():
            has_weights = next(part.parameters(), None) is not None
            part.train(not has_weights or any(f"{name}.".startswith(it) or it.startswith(f"{name}.") for it in phase.trains))

    def encode_batch(self, batch: Batch) -> Batch:
        """Return the batch with new features of the trained encoders instead of the cached ones."""
        return {**batch, **{key: self._features(key, batch) for key in self._encode}}

    def _features(self, key: str, batch: Batch) -> Tensor:
        """Return new features [B, *shape] for a batch key; samples without an encoded text keep their cached feature."""
        items = batch[f"{key}_items"]
        if key != "text":
            return self._context.gather(self._encode[key](items), len(batch["key"]))
        owner, column = batch["text_owner"], batch["text"]
        if not len(owner):
            return column
        texts = self._context.gather(self._encode[key](items), len(owner)).to(column.dtype)
        is_owned = (owner == torch.arange(len(column), device=owner.device).unsqueeze(1)).to(texts.dtype)
        counts = is_owned.sum(dim=1, keepdim=True)
        # The mean is a matrix product, whose order of summation is fixed; a scattered addition on a GPU has no fixed order.
        # It is not autocast, so that the mean has the precision of stage 2.
        with torch.autocast(column.device.type, enabled=False):
            means = is_owned / counts.clamp(min=1) @ texts.flatten(1)
        return torch.where(counts > 0, means, column.flatten(1)).reshape(column.shape)

    @torch.no_grad()
    def update_statistics(self, batches: Iterable[Batch]) -> dict[str, float]:
        """Take the statistics of the head again, from the current features of the training split.

        The heads of all processes become equal to that of the first process.

        Args:
            batches: One ordered pass over the training split, with prepared items.

        Returns:
            For each trained encoder, the mean cosine similarity between its new and its cached features.
        """
        self.train(False)
        self._context.broadcast_from_first(self.head.state_dict().values())
        cosines: dict[str, list[Tensor]] = {f"cosine_{key}": [] for key in self._encode}
        encoded = []
        for batch in batches:
            features = self.encode_batch(batch)
            encoded.append({key: features[key] for key in (*self.needs, "key")})
            for key in self._encode:
                paired = batch["paired"] > 0 if key == "text" else slice(None)
                similarity = F.cosine_similarity(features[key].flatten(1).float(), batch[key].flatten(1).float())
                cosines[f"cosine_{key}"].append(similarity[paired])
        for head_phase in self.head_phases:
            self.head.begin(head_phase.name, lambda: iter(encoded))
        return {name: float(torch.cat(parts).mean()) for name, parts in cosines.items()}

    def predict(self, image: Tensor, rng: KeyedRNG) -> Tensor:
        """Return the logits [B,C] of prepared images [B, ...]; text cannot reach a prediction."""
        return self.head.predict(self._image_features(image), rng)

    def feature(self, image: Tensor, rng: KeyedRNG) -> Tensor:
        """Return the feature [B,D] of the head for prepared images [B, ...]."""
        return self.head.feature(self._image_features(image), rng)

    def _image_features(self, items: Tensor) -> Tensor:
        encode = self._encode.get("image")
        return encode(items) if encode else items
