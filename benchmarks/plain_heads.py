"""SeDA, EMA and the baseline as a PyTorch user writes them by hand, and what our training loop costs beside such a loop.

    python benchmarks/plain_heads.py [--method seda|ema|baseline] [--width 768] [--classes 172] [--batch 64] [--rows 16384]
                                     [--threads 1] [--precision float32|mixed] [--rounds 7] [--multi]

It prints steps per second of both loops, each round on the same data one after the other, the median and the range of the
ratio of a round, and the number of ATen operators of one step. The heads here use nothing of this package. They have the
default settings of ours, and tests/benchmarks/test_plain_heads.py shows that losses and gradients are equal to ours at equal
weights, noise, steps and stage. What is done once and not in every step: features are standardised, label distributions, the
sinusoids of the steps and the levels of noise are tables.
"""

from __future__ import annotations

import argparse
import math
import platform
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from training_step import OurTraining, count_operators, make_raw_columns

from pipeline.runtime.device import default_device

Columns = dict[str, Tensor]  # "image" [N,D], "text" [N,D], "paired" [N], "label" [N] or [N,C], "target" as label


# ---- the heads: nothing below this line and above the next one is ours ----


def make_columns(raw: Columns) -> Columns:
    """Return resident training data: standardised features, and a distribution over classes where labels are multi-hot."""
    columns = dict(raw)
    for name in {"image", "text"} & raw.keys():  # the baseline has no text
        rows = raw[name][raw["paired"] > 0] if name == "text" else raw[name]
        columns[name] = (raw[name] - rows.mean(0)) / rows.std(0, correction=0).clamp(min=1e-3)
    label = raw["label"]
    columns["target"] = label if label.ndim == 1 else label / label.sum(1, keepdim=True).clamp(min=1.0)
    return columns


class PlainHead(nn.Module):
    """A head whose `loss` gets a batch and the random numbers that `draw` has drawn for it."""

    loss: Callable[..., Columns]

    def draw(self, batch: Columns) -> tuple[Any, ...]:
        """Draw the random numbers of a step."""
        return ()


class PlainBaseline(PlainHead):
    """Dropout and a linear classifier."""

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.dropout, self.classifier = nn.Dropout(0.0), nn.Linear(width, classes)

    def loss(self, batch: Columns) -> Columns:
        """Return the cross-entropy."""
        return {"loss": F.cross_entropy(self.classifier(self.dropout(batch["image"])), batch["target"])}


class PlainEMA(PlainHead):
    """MARNet's embedding-matching alignment: two projections, InfoNCE between them, a classifier on the image's."""

    def __init__(self, width: int, classes: int, embedding: int = 768, tau: float = 0.07) -> None:
        super().__init__()
        self.dropout, self.tau = nn.Dropout(0.0), tau
        self.image, self.text = nn.Linear(width, embedding), nn.Linear(width, embedding)
        self.classifier = nn.Linear(embedding, classes)

    def loss(self, batch: Columns) -> Columns:
        """Return the loss and its parts; a sample without a text is no anchor and no negative."""
        x_v = F.leaky_relu(self.image(self.dropout(batch["image"])))
        x_s = F.leaky_relu(self.text(batch["text"]))
        ita = contrast(x_v, x_s, self.tau, batch["paired"] > 0)
        ce = F.cross_entropy(self.classifier(x_v), batch["target"])
        return {"loss": ce + ita, "ce": ce, "ita": ita}


def contrast(a: Tensor, b: Tensor, tau: float, paired: Tensor) -> Tensor:
    """Return InfoNCE from a to b plus that from b to a."""
    similarity = F.normalize(a, dim=1) @ F.normalize(b, dim=1).T / tau
    own = torch.where(paired, torch.arange(len(a), device=a.device), -100)  # cross_entropy ignores -100
    a2b = F.cross_entropy(similarity.masked_fill(~paired, -1e9), own)
    return a2b + F.cross_entropy(similarity.T.masked_fill(~paired, -1e9), own)


class ChunkLinear(nn.Module):
    """One linear layer per chunk of a vector: [B,D] to tokens [T,B,width]."""

    def __init__(self, width: int, tokens: int, token_width: int) -> None:
        super().__init__()
        bound = (width // tokens) ** -0.5
        self.weight = nn.Parameter(torch.empty(tokens, width // tokens, token_width).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(tokens, 1, token_width).uniform_(-bound, bound))

    def forward(self, x: Tensor) -> Tensor:
        return torch.baddbmm(self.bias, x.view(len(x), len(self.weight), -1).transpose(0, 1), self.weight)


class PlainSeDA(PlainHead):
    """SeDA with cross-attention between chunk tokens, both stages, and one stage per batch."""

    signal: Tensor
    noise: Tensor
    sinusoid: Tensor

    def __init__(
        self, width: int, classes: int, num_steps: int = 1500, stage_step: int = 300, gamma: float = 1.5,
        tokens: int = 8, token_width: int = 128, heads: int = 4, time_width: int = 128,
    ) -> None:  # fmt: skip
        super().__init__()
        self.num_steps, self.border, self.gamma, self.heads, self.classes = num_steps, stage_step + 1, gamma, heads, classes
        self.learner_share = self.border / num_steps
        self.query, self.key_value = (ChunkLinear(width, tokens, size) for size in (token_width, 2 * token_width))
        self.attended, self.visual = nn.Linear(tokens * token_width, width), nn.Linear(width, width, bias=False)
        self.time = nn.Sequential(
            nn.Linear(time_width, 2 * time_width), nn.GELU(), nn.Linear(2 * time_width, time_width), nn.GELU()
        )
        self.hidden, self.out = nn.Linear(width + time_width, 2 * width), nn.Linear(2 * width, width)
        self.dropout, self.classifier = nn.Dropout(0.0), nn.Linear(width, classes)
        level = torch.cumprod(1.0 - torch.linspace(1e-4, 0.02, num_steps, dtype=torch.float64), dim=0).float().unsqueeze(1)
        self.register_buffer("signal", level.sqrt())
        self.register_buffer("noise", (1.0 - level).sqrt())
        frequency = torch.exp(torch.arange(time_width // 2) * (-math.log(1e4) / (time_width // 2 - 1)))
        angle = torch.arange(num_steps).float().unsqueeze(1) * frequency
        self.register_buffer("sinusoid", torch.cat([angle.sin(), angle.cos()], dim=1))

    def draw(self, batch: Columns) -> tuple[bool, Tensor, Tensor]:
        """Draw the stage of the batch (true: the learner), a step of that stage for each sample, and noise."""
        x_s = batch["text"]
        learner = random.random() < self.learner_share
        low, high = (0, self.border) if learner else (self.border, self.num_steps)
        return learner, torch.randint(low, high, (len(x_s),), device=x_s.device), torch.randn_like(x_s)

    def denoise(self, x_n: Tensor, n: Tensor, x_v: Tensor) -> Tensor:
        """Predict the clean text feature [B,D]."""
        size, heads = len(x_n), self.heads
        query = self.query(x_n).view(-1, size, heads, self.query.bias.shape[2] // heads).permute(1, 2, 0, 3)
        key, value = (
            part.unflatten(2, (heads, -1)).permute(1, 2, 0, 3) for part in self.key_value(x_v).chunk(2, dim=2)
        )  # [B, heads, tokens, width of a head]
        attended = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(1)
        h = torch.cat([self.attended(attended) + self.visual(x_v), self.time(self.sinusoid[n])], dim=1)
        return self.out(self.dropout(F.gelu(self.hidden(h))))

    def loss(self, batch: Columns, learner: bool, n: Tensor, noise: Tensor) -> Columns:
        """Return the loss of the stage and its parts."""
        x_v, x_s = batch["image"], batch["text"]
        x_r = self.denoise(self.signal[n] * x_s + self.noise[n] * noise, n, x_v)
        ce = F.cross_entropy(self.classifier(x_r), batch["target"])
        zero = torch.zeros((), device=x_v.device)
        if learner:
            sc, mse = structural_consistency(x_r, x_v, batch["label"], self.classes), zero
            loss = sc + ce
        else:
            sc, mse = zero, squared_error(x_r, x_s, batch["paired"])
            loss = mse + self.gamma * ce
        return {"loss": loss, "sc": sc, "mse": mse, "ce": ce}


def structural_consistency(x_r: Tensor, x_v: Tensor, label: Tensor, classes: int) -> Tensor:
    """Return the mean distance of class centres over the root of the width, plus the mean absolute difference."""
    member = (F.one_hot(label, classes) if label.ndim == 1 else label).float()
    count = member.sum(0)
    present = (count > 0).float()
    between = (member.T @ (x_r - x_v)) / count.clamp(min=1.0).unsqueeze(1)
    distance = torch.linalg.vector_norm(between, dim=1)
    return (distance * present).sum() / present.sum() / math.sqrt(x_v.shape[1]) + F.l1_loss(x_r.float(), x_v)


def squared_error(x_r: Tensor, x_s: Tensor, paired: Tensor) -> Tensor:
    """Return the squared error, mean over the dimensions and the samples that have a text."""
    return ((x_r - x_s).square().mean(1) * paired).sum() / paired.sum().clamp(min=1.0)


AS_BY_HAND = {"seda": {"dropout": 0.0, "scale": "per_dim"}}  # settings with which ours computes what the head by hand does
PLAIN_HEADS: dict[str, Callable[..., PlainHead]] = {"seda": PlainSeDA, "ema": PlainEMA, "baseline": PlainBaseline}


class PlainTraining:
    """The training of a head by hand: fused Adam with L2 decay, clipping, StepLR, sums of losses that stay on the device."""

    def __init__(self, head: PlainHead, precision: str, batch_size: int = 64) -> None:
        self.head, self.parameters = head.train(), list(head.parameters())
        self.mixed, self.batch_size = precision == "mixed", batch_size
        self.optimizer = torch.optim.Adam(self.parameters, lr=1e-3, weight_decay=1e-4, fused=True)
        self.schedule = torch.optim.lr_scheduler.StepLR(self.optimizer, 4, 0.5)

    def step(self, batch: Columns) -> Columns:
        """Train one step and return the loss and its parts."""
        self.optimizer.zero_grad()
        draws = self.head.draw(batch)
        with torch.autocast(batch["image"].device.type, torch.bfloat16, enabled=self.mixed):
            parts = self.head.loss(batch, *draws)
        parts["loss"].backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        return parts

    def epoch(self, columns: Columns) -> dict[str, float]:
        """Train one pass in a new order and return the mean of every part; an incomplete last batch is left out."""
        totals: Columns = {}
        order = torch.randperm(len(columns["image"]), device=columns["image"].device)
        steps = len(order) // self.batch_size
        for rows in order[: steps * self.batch_size].split(self.batch_size):
            for name, value in self.step({name: column[rows] for name, column in columns.items()}).items():
                totals[name] = totals.get(name, 0.0) + value.detach()
        self.schedule.step()
        return {name: float(total) / steps for name, total in totals.items()}


# ---- the comparison with ours ----


def wait_seconds(function: Callable[[], Any]) -> float:
    """Return the wall time of a call, until the device has finished."""
    started = time.perf_counter()
    function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started


@dataclass
class Rounds:
    """Times of ours and of the peer, in rounds that measure one directly after the other."""

    ours: list[float] = field(default_factory=list)
    plain: list[float] = field(default_factory=list)

    def measure(self, ours: Callable[[], Any], plain: Callable[[], Any]) -> None:
        """Add a round; who begins alternates."""
        sides = [(self.ours, ours), (self.plain, plain)]
        for times, function in reversed(sides) if len(self.ours) % 2 else sides:
            times.append(wait_seconds(function))

    def ratios(self, scale: float = 1.0) -> list[float]:
        """Return the plain time over ours, each round by itself."""
        return [scale * plain / ours for ours, plain in zip(self.ours, self.plain, strict=True)]

    def median(self, scale: float = 1.0) -> float:
        """Return the median ratio of a round."""
        return statistics.median(self.ratios(scale))

    def ratio(self, scale: float = 1.0) -> str:
        """Return the median ratio of a round, and the smallest and largest one."""
        ratios = self.ratios(scale)
        return f"{self.median(scale):.2f} ({min(ratios):.2f} to {max(ratios):.2f}, {len(ratios)} rounds)"


def plain_training(
    method: str, raw: Columns, classes: int, precision: str, batch_size: int = 64, **settings: Any
) -> PlainTraining:
    """Return a plain head on the device of the columns, ready to train."""
    torch.manual_seed(0)
    head = PLAIN_HEADS[method](raw["image"].shape[1], classes, **settings).to(raw["image"].device)
    return PlainTraining(head, precision, batch_size)


def plain_operators(training: PlainTraining, columns: Columns) -> dict[str, int]:
    """Return the operators of one step; SeDA has two kinds of step, of which it draws the learner's in one of five."""
    batch = {name: column[: training.batch_size] for name, column in columns.items()}
    training.step(batch)  # Adam's state is made in the first step
    head = training.head
    if not isinstance(head, PlainSeDA):
        return {"": sum(count_operators(lambda: training.step(batch)).values())}
    counts, share = {}, head.learner_share
    for stage, head.learner_share in (("translator", 0.0), ("learner", 1.0)):
        counts[stage] = sum(count_operators(lambda: training.step(batch)).values())
    head.learner_share = share
    return counts


def main() -> None:
    """Compare the two loops."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", choices=PLAIN_HEADS, default="seda")
    for name, value in (("width", 768), ("classes", 172), ("batch", 64), ("rows", 16_384), ("rounds", 7)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--threads", type=int, default=1, help="of the plain loop; ours has one")
    parser.add_argument("--precision", choices=["float32", "mixed"], default="float32")
    parser.add_argument("--multi", action="store_true", help="multi-label data")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    raw = make_raw_columns(given.rows, given.width, given.classes, given.multi, default_device())
    columns = make_columns(raw)
    plain = plain_training(given.method, raw, given.classes, given.precision, given.batch)
    same = AS_BY_HAND.get(given.method, {})
    ours = OurTraining(given.method, raw, given.classes, given.precision, given.batch, **same)
    counts = plain_operators(plain, columns)
    shown = " and ".join(f"{count} {stage}".strip() for stage, count in counts.items())
    print(f"{given.method} {given.precision}: {sum(ours.operators().values())} operators a step, plain {shown}", flush=True)
    rounds, steps = Rounds(), given.rows // given.batch
    ours.epoch()
    plain.epoch(columns)
    for _ in range(given.rounds):
        rounds.measure(ours.epoch, lambda: plain.epoch(columns))
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{platform.machine()}, {given.threads} thread(s)"
    print(
        f"{given.method} {given.precision}: {steps / statistics.median(rounds.ours):.1f} steps/s, plain "
        f"{steps / statistics.median(rounds.plain):.1f}: ratio {rounds.ratio()} (wanted >= 1.0); {device}"
    )


if __name__ == "__main__":
    main()
