"""The commands of studies: `demo`, `demo-joint`, `ablate …`. They import the modules that they use when they run."""

from __future__ import annotations

from typing import Annotated

import typer

from pipeline.commands.checks import check_dataset, check_given_settings, check_method
from pipeline.commands.joint_options import Accumulate, Augment, Checkpointing, EncoderLr, LayerDecay, Workers
from pipeline.commands.options import (
    DEFAULT_HOME,
    NO_PAIRS,
    AsJson,
    CommandGroup,
    EvaluatedSplit,
    Home,
    ImageCache,
    PreparedDataset,
    Preset,
    Seeds,
    SettingOptions,
    Text,
    TextCache,
    TrainingOptions,
    VerdictSeeds,
    parse_integers,
    parse_numbers,
    show,
    show_table,
)
from pipeline.runtime import plugins
from pipeline.runtime.assignments import parse_assignments

ablate_commands = CommandGroup("Studies of the papers.")

MethodOfTexts = Annotated[str, typer.Option(help="Name of a method that reads texts.")]
JointTrainingOptions = Annotated[list[str], typer.Option("--train", help="A setting of the joint training, KEY=VALUE.")]


def demo(home: Home = DEFAULT_HOME) -> None:
    """The whole idea on real images and text: five methods, three seeds, a report. Nothing is computed twice."""
    from pipeline.studies.demo import run_demo

    print(run_demo(home))


@ablate_commands.command()
def strategy(
    method: MethodOfTexts = "seda",
    dataset: PreparedDataset = "openmoji",
    seeds: Seeds = "0,1,2",
    preset: Preset = "head",
    training: JointTrainingOptions = NO_PAIRS,
    encoder_lr: EncoderLr = 5e-5,
    layer_decay: LayerDecay = 1.0,
    augment: Augment = False,
    accumulate: Accumulate = 1,
    checkpointing: Checkpointing = False,
    workers: Workers = -1,
    image: ImageCache = "",
    text: TextCache = "",
    home: Home = DEFAULT_HOME,
    as_json: AsJson = False,
) -> None:
    """Which encoders to train (SeDA Table 3): freeze both, train the visual one, train both; metrics on the test split."""
    from pipeline.training.config import TrainConfig

    check_method(method, preset)
    check_dataset(dataset, home)
    chosen, given = parse_integers(seeds, "--seeds"), parse_assignments(training, "--train")
    check_given_settings(TrainConfig, given)

    from pipeline.studies.ablation import compare_strategies
    from pipeline.training.joint.plan import JointOptions

    joint = {"encoder_lr": encoder_lr, "layer_decay": layer_decay, "augment": augment}
    options = JointOptions(accumulate=accumulate, checkpointing=checkpointing, workers=workers)
    caches = {"image": image, "text": text}
    show_table(compare_strategies(home, dataset, method, preset, chosen, caches, joint, given, options), as_json)


@ablate_commands.command("text")
def ablate_text(
    method: MethodOfTexts = "seda",
    dataset: PreparedDataset = "openmoji",
    seeds: VerdictSeeds = "0,1,2,3,4",
    settings: SettingOptions = NO_PAIRS,
    training: TrainingOptions = NO_PAIRS,
    preset: Preset = "head",
    split: EvaluatedSplit = "test",
    image: ImageCache = "",
    text: TextCache = "",
    home: Home = DEFAULT_HOME,
    as_json: AsJson = False,
) -> None:
    """Does the text help? A method on real, shuffled and noise texts, on labels as text, and without its text term."""
    from pipeline.training.config import TrainConfig

    check_method(method, preset)
    check_dataset(dataset, home)
    chosen, given, given_training = (
        parse_integers(seeds, "--seeds"),
        parse_assignments(settings),
        parse_assignments(training, "--train"),
    )
    check_given_settings(TrainConfig, given_training)
    plugin = plugins.get("methods", method)
    check_given_settings(plugin.Config, given, plugin.symbols)

    from pipeline.studies.text_ablation import compare_texts

    caches = {"image": image, "text": text}
    result = compare_texts(home, dataset, method, preset, chosen, caches, given, given_training, split)
    if as_json:
        show({"rows": result.table.to_dict(orient="records"), "conclusion": result.conclusion}, as_json)
    else:
        show_table(result.table, as_json)
        print(result.conclusion)


@ablate_commands.command("data")
def ablate_data(
    method: Annotated[str, typer.Option(help="Name of a method; it is compared with the baseline.")] = "seda",
    dataset: PreparedDataset = "openmoji",
    fractions: Annotated[str, typer.Option(help="Comma-separated shares of every class of the training split.")] = "0.25,0.5,1",
    seeds: VerdictSeeds = "0,1,2,3,4",
    settings: SettingOptions = NO_PAIRS,
    training: TrainingOptions = NO_PAIRS,
    preset: Preset = "head",
    split: EvaluatedSplit = "test",
    image: ImageCache = "",
    text: Text = "",
    home: Home = DEFAULT_HOME,
    as_json: AsJson = False,
) -> None:
    """Where does a method help most? The method and the baseline on nested parts of the training split."""
    from pipeline.training.config import TrainConfig

    check_method(method, preset)
    check_dataset(dataset, home)
    chosen, shares = parse_integers(seeds, "--seeds"), parse_numbers(fractions, "--fractions")
    given, given_training = parse_assignments(settings), parse_assignments(training, "--train")
    check_given_settings(TrainConfig, given_training)
    plugin = plugins.get("methods", method)
    check_given_settings(plugin.Config, given, plugin.symbols)

    from pipeline.studies.data_ablation import compare_fractions

    caches = {"image": image, "text": text}
    table = compare_fractions(home, dataset, method, preset, chosen, shares, caches, given, given_training, split)
    show_table(table, as_json)


def demo_joint(home: Home = DEFAULT_HOME) -> None:
    """Two generations of a cache on small pictures: heads, joint training, heads on the tuned encoder. Minutes on two cores."""
    from pipeline.studies.demo_joint import run_demo_joint

    print(run_demo_joint(home))
