"""The command of stage 3: `finetune`. It imports the modules that it uses when it runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pipeline.commands.joint_options import Accumulate, Augment, Checkpointing, EncoderLr, LayerDecay, Workers
from pipeline.commands.options import DEFAULT_HOME, NO_PAIRS, AsJson, Home, parse_assignments, show


def finetune(
    init: Annotated[Path, typer.Option(help="Run of stage 2 to start from, …/seed<k>; it decides the head and the encoders.")],
    method: Annotated[str, typer.Option(help="Method of that run; another one is refused. Default: that of the run.")] = "",
    dataset: Annotated[str, typer.Option(help="Dataset of that run; another one is refused. Default: that of the run.")] = "",
    training: Annotated[
        list[str],
        typer.Option(
            "--train",
            help="What is trained beside the head: image (the default), text, both or last:K, the last K blocks of the image "
            "encoder; or a training setting, KEY=VALUE. May be given several times.",
        ),
    ] = NO_PAIRS,
    encoder_lr: EncoderLr = 5e-5,
    layer_decay: LayerDecay = 1.0,
    augment: Augment = False,
    accumulate: Accumulate = 1,
    checkpointing: Checkpointing = False,
    workers: Workers = -1,
    home: Home = DEFAULT_HOME,
    as_json: AsJson = False,
) -> None:
    """Stage 3: train the encoders with a head of stage 2, keep the better of both, and extract the tuned encoders' features.

    Several GPUs: torchrun --nproc-per-node N -m pipeline finetune …; an interrupted run goes on where it was.
    """
    from pipeline.runtime import plugins
    from pipeline.runtime.runs import RunFolder
    from pipeline.training.joint.ddp import is_first_process
    from pipeline.training.joint.finetune import finetune as run_finetune
    from pipeline.training.joint.finetune import resolve_joint_settings
    from pipeline.training.joint.plan import JointConfig, JointOptions

    run = RunFolder.at(init)
    config = run.config()
    for option, given, found in (("--method", method, config.method), ("--dataset", dataset, config.dataset)):
        if given not in ("", found):
            raise ValueError(f"{option} is {given}, but {init} is a run of {found}")
    trained = [word for word in training if "=" not in word]
    if len(trained) > 1:
        raise ValueError(f"--train takes one of image, text, both and last:K, not {' and '.join(trained)}")
    given = {"encoder_lr": encoder_lr, "layer_decay": layer_decay, "augment": augment}
    joint = plugins.configure(JointConfig, {**given, "train": trained[0] if trained else "image"})
    joint_training = resolve_joint_settings(run, parse_assignments(word for word in training if "=" in word))
    options = JointOptions(accumulate=accumulate, checkpointing=checkpointing, workers=workers)
    outcome = run_finetune(home, run, joint, joint_training, options)
    if not is_first_process():
        return
    verdict = f"{outcome.metric} on validation: {outcome.before:.2f} before, {outcome.after:.2f} after joint training"
    if not outcome.is_better:
        verdict += "; the head of stage 2 stays the result"
    weights = {f"{key} weights": str(path) for key, path in outcome.weights.items()}
    show({"verdict": verdict, "run": str(outcome.run.path), **weights}, as_json)
