"""Options of joint training, shared by `finetune` and `ablate strategy`."""

from __future__ import annotations

from typing import Annotated

import typer

EncoderLr = Annotated[float, typer.Option(help="Learning rate of the encoders; the papers' range is 5e-5..1e-4.")]
LayerDecay = Annotated[float, typer.Option(help="Factor of that rate per block towards the input, 0..1.")]
Augment = Annotated[bool, typer.Option("--augment", help="Random crops and mirrored images in training.")]
Accumulate = Annotated[
    int,
    typer.Option(min=1, help="Parts in which a batch goes through the encoders; more need less memory."),
]
Checkpointing = Annotated[
    bool,
    typer.Option("--checkpointing", help="Recompute the blocks in the backward pass instead of keeping their activations."),
]
Fast = Annotated[
    bool,
    typer.Option("--fast/--deterministic", help="On a GPU: the fastest kernels, or those with the same bits in every run."),
]
Compile = Annotated[bool, typer.Option("--compile", help="Run whole encoders through torch.compile in training.")]
Workers = Annotated[int, typer.Option(min=-1, help="Processes that decode media; -1: one per core, 0: only this process.")]
