"""The commands that train many heads: `demo`, `demo-joint`, `ablate strategy`. They import what they need when they run."""

from __future__ import annotations

from typing import Annotated

import typer

from pipeline.commands.joint_options import Accumulate, Augment, Checkpointing, EncoderLr, LayerDecay, Workers
from pipeline.commands.options import HOME, NONE, AsJson, CommandGroup, Home, assignments, parse_integers, show_table

ablations = CommandGroup("Studies of the papers.")


def demo(home: Home = HOME) -> None:
    """The whole idea on real images and text: five methods, three seeds, a report. Nothing is computed twice."""
    from pipeline.studies.demo import run_demo

    print(run_demo(home))


@ablations.command()
def strategy(
    method: Annotated[str, typer.Option(help="Name of a method that reads texts.")] = "seda",
    dataset: Annotated[str, typer.Option(help="Name of a prepared and extracted dataset.")] = "openmoji",
    seeds: Annotated[str, typer.Option(help="Comma-separated seeds.")] = "0,1,2",
    preset: Annotated[str, typer.Option(help="head, paper or tuned, of the heads, as in train-head.")] = "head",
    training: Annotated[list[str], typer.Option("--train", help="A setting of the joint training, KEY=VALUE.")] = NONE,
    encoder_lr: EncoderLr = 5e-5,
    layer_decay: LayerDecay = 1.0,
    augment: Augment = False,
    accumulate: Accumulate = 1,
    checkpointing: Checkpointing = False,
    workers: Workers = -1,
    image: Annotated[str, typer.Option(help="Cache of the image features; default: the dataset's image encoder.")] = "",
    text: Annotated[str, typer.Option(help="Cache of the text features; default: the dataset's text encoder.")] = "",
    home: Home = HOME,
    as_json: AsJson = False,
) -> None:
    """Which encoders to train (SeDA Table 3): freeze both, train the visual one, train both; metrics on the test split."""
    from pipeline.studies.ablation import strategies
    from pipeline.training.joint.trainer import JointOptions

    joint = {"encoder_lr": encoder_lr, "layer_decay": layer_decay, "augment": augment}
    work = JointOptions(accumulate=accumulate, checkpointing=checkpointing, workers=workers)
    caches = {"image": image, "text": text}
    chosen = parse_integers(seeds, "--seeds")
    show_table(strategies(home, dataset, method, preset, chosen, caches, joint, assignments(training), work), as_json)


def demo_joint(home: Home = HOME) -> None:
    """Two generations of a cache on small pictures: heads, joint training, heads on the tuned encoder. Minutes on two cores."""
    from pipeline.studies.demo_joint import run_demo_joint

    print(run_demo_joint(home))
