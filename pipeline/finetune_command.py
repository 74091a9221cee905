"""The commands of stage 3: `finetune`, `ablate strategy`, `demo-joint`; like those of cli.py they import when they run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pipeline.console import HOME, NONE, AsJson, Home, assignments, numbers, show, show_table

ablations = typer.Typer(help="Studies of the papers.", no_args_is_help=True, rich_markup_mode=None)

EncoderLr = Annotated[float, typer.Option(help="Learning rate of the encoders; the papers' band is 5e-5..1e-4.")]
LayerDecay = Annotated[float, typer.Option(help="Factor of that rate per block towards the input, 0..1.")]
Augment = Annotated[bool, typer.Option("--augment", help="Random crops and mirrored images in training.")]
Accumulate = Annotated[
    int,
    typer.Option(min=1, help="Parts in which a batch goes through the encoders; more need less memory."),
]
Checkpointing = Annotated[
    bool, typer.Option("--checkpointing", help="Run blocks again backwards instead of keeping what they computed.")
]
Workers = Annotated[int, typer.Option(min=-1, help="Processes that decode; -1: one per core, 0: this one does it.")]


def finetune(
    init: Annotated[Path, typer.Option(help="Run of stage 2 to start from, …/seed<k>; it decides the head and the encoders.")],
    method: Annotated[str, typer.Option(help="Method of that run; another one is refused. Default: whichever it is.")] = "",
    dataset: Annotated[str, typer.Option(help="Dataset of that run; another one is refused. Default: whichever it is.")] = "",
    training: Annotated[
        list[str],
        typer.Option(
            "--train",
            help="What is trained beside the head: image (the default), text, both or last:K, the last K blocks of the image "
            "encoder; or a training setting, KEY=VALUE. May be given often.",
        ),
    ] = NONE,
    encoder_lr: EncoderLr = 5e-5,
    layer_decay: LayerDecay = 1.0,
    augment: Augment = False,
    accumulate: Accumulate = 1,
    checkpointing: Checkpointing = False,
    workers: Workers = -1,
    home: Home = HOME,
    as_json: AsJson = False,
) -> None:
    """Stage 3: train the encoders with a head of stage 2, keep the better of both, and extract the tuned encoders' features.

    Several GPUs: torchrun --nproc-per-node N -m cli finetune …; an interrupted run goes on where it was.
    """
    from pipeline import plugins
    from pipeline.finetune import finetune as run_finetune
    from pipeline.finetune import resolve
    from pipeline.ranks import is_first
    from pipeline.runs import Run
    from pipeline.together import JointConfig, Work

    run = Run.at(init)
    config = run.config()
    for option, given, found in (("--method", method, config.method), ("--dataset", dataset, config.dataset)):
        if given not in ("", found):
            raise ValueError(f"{option} is {given}, but {init} is a run of {found}")
    what = [each for each in training if "=" not in each]
    if len(what) > 1:
        raise ValueError(f"--train takes one of image, text, both and last:K, not {' and '.join(what)}")
    given = {"encoder_lr": encoder_lr, "layer_decay": layer_decay, "augment": augment, "train": what[0] if what else "image"}
    joint = plugins.configure(JointConfig, given)
    work = Work(accumulate=accumulate, checkpointing=checkpointing, workers=workers)
    outcome = run_finetune(home, run, joint, resolve(run, assignments(each for each in training if "=" in each)), work)
    if not is_first():
        return
    verdict = f"{outcome.metric} on validation: {outcome.before:.2f} before, {outcome.after:.2f} after joint training"
    if not outcome.is_better:
        verdict += "; the head of stage 2 stays the result"
    weights = {f"{key} weights": str(path) for key, path in outcome.weights.items()}
    show({"verdict": verdict, "run": str(outcome.run.path), **weights}, as_json)


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
    from pipeline.strategy import strategies
    from pipeline.together import Work

    joint = {"encoder_lr": encoder_lr, "layer_decay": layer_decay, "augment": augment}
    work = Work(accumulate=accumulate, checkpointing=checkpointing, workers=workers)
    caches = {"image": image, "text": text}
    chosen = numbers(seeds, "--seeds")
    show_table(strategies(home, dataset, method, preset, chosen, caches, joint, assignments(training), work), as_json)


def demo_joint(home: Home = HOME) -> None:
    """Two generations of a cache on small pictures: heads, joint training, heads on the tuned encoder. Minutes on two cores."""
    from pipeline.joint_demo import run_demo_joint

    print(run_demo_joint(home))
