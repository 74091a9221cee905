"""The command of stage 3: `finetune`. It imports the modules that it uses when it runs."""

from __future__ import annotations

import logging
from typing import Annotated

import typer

from pipeline.commands.checks import check_given_settings
from pipeline.commands.joint_options import Accumulate, Augment, Checkpointing, Compile, EncoderLr, Fast, LayerDecay, Workers
from pipeline.commands.options import DEFAULT_HOME, NO_PAIRS, AsJson, Home, Log, show
from pipeline.runtime.assignments import parse_assignments
from pipeline.runtime.errors import UserError

logger = logging.getLogger(__name__)


def finetune(
    init: Annotated[
        str,
        typer.Option(
            metavar="RUN",
            help="Run of stage 2 to start from: a folder …/seed<k>, or HEAD/seed<k> (diffalign runs ls); HEAD alone if it has "
            "one seed. It decides the head and the encoders.",
        ),
    ],
    method: Annotated[str, typer.Option(help="Method of that run; another one is refused. Default: that of the run.")] = "",
    dataset: Annotated[str, typer.Option(help="Dataset of that run; another one is refused. Default: that of the run.")] = "",
    unfreeze: Annotated[
        str,
        typer.Option(
            metavar="image|text|both|last:K|none",
            help="The encoders that are trained with the head; last:K: the last K blocks of the image encoder; none: the head "
            "is trained on alone, the control of joint training. Default: image.",
        ),
    ] = "",
    training: Annotated[
        list[str], typer.Option("--train", help="A training setting, KEY=VALUE; may be given several times.")
    ] = NO_PAIRS,
    encoder_lr: EncoderLr = 5e-5,
    layer_decay: LayerDecay = 1.0,
    augment: Augment = False,
    accumulate: Accumulate = 1,
    checkpointing: Checkpointing = False,
    fast: Fast = False,
    compile_encoders: Compile = False,
    workers: Workers = -1,
    log: Log = NO_PAIRS,
    home: Home = DEFAULT_HOME,
    as_json: AsJson = False,
) -> None:
    """Stage 3: train the encoders with a head of stage 2, keep the better of both, and extract the tuned encoders' features.

    Several GPUs: torchrun --nproc-per-node N -m pipeline finetune …; an interrupted run goes on where it was.
    """
    from pipeline.runtime.head_names import find_run
    from pipeline.training.config import TrainConfig

    run = find_run(home, init)
    config = run.config()
    for option, given, found in (("--method", method, config.method), ("--dataset", dataset, config.dataset)):
        if given not in ("", found):
            raise UserError(f"{option} is {given}, but {init} is a run of {found}")
    unfrozen = _read_unfreeze(unfreeze, [word for word in training if "=" not in word])
    given_training = parse_assignments((word for word in training if "=" in word), "--train")
    check_given_settings(TrainConfig, given_training)

    from pipeline.training.joint.ddp import is_first_process
    from pipeline.workspace import Workspace

    outcome = Workspace(home).finetune(
        run.path,
        unfreeze=unfrozen,
        encoder_lr=encoder_lr,
        layer_decay=layer_decay,
        augment=augment,
        train=given_training,
        accumulate=accumulate,
        checkpointing=checkpointing,
        fast=fast,
        compile_encoders=compile_encoders,
        workers=workers,
        log=log,
    )
    if not is_first_process():
        return
    stage = "joint training" if outcome.weights else "training the head on alone"
    verdict = f"{outcome.metric} on validation: {outcome.before:.2f} before, {outcome.after:.2f} after {stage}"
    if not outcome.is_better:
        verdict += "; the head of stage 2 stays the result"
    weights = {f"{key} weights": str(path) for key, path in outcome.weights.items()}
    show({"verdict": verdict, "run": str(outcome.run.path), **weights}, as_json)


def _read_unfreeze(unfreeze: str, words: list[str]) -> str:
    """Return which encoders are trained.

    Args:
        unfreeze: The value of --unfreeze; "" if it was not given.
        words: The values of --train that are no KEY=VALUE: the old way to say the same.

    Raises:
        UserError: it is given twice.
    """
    for word in words:
        logger.warning("--train %s is the old form and will be refused by the next release; write --unfreeze %s", word, word)
    given = list(dict.fromkeys([unfreeze, *words] if unfreeze else words))
    if len(given) > 1:
        raise UserError(
            f"--unfreeze takes one of image, text, both and last:K, not {' and '.join(given)}; none trains the head alone"
        )
    return given[0] if given else "image"
