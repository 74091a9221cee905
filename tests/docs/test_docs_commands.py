"""Every command on the pages of docs/ and in README.md is run, or says what it needs and is checked against the parser."""

from __future__ import annotations

import glob
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from helpers.doc_blocks import PAGES, ROOT, Block, arguments_of, blocks_of, check_arguments
from helpers.docs_home import make_docs_folder, run_shortly, use_small_openmoji

from pipeline.commands import app as cli
from pipeline.runtime import plugins

GENERATED = ("api.md",)
# What is no command of diffalign stands in marked blocks; a path in it exists.
OTHER_PROGRAMS = ("pip", "python", "tensorboard", "export", "cp", "find", "dask")
PROGRAMS = [page for page in PAGES if page.name not in GENERATED and any(_ for _ in blocks_of(page))]


@pytest.fixture(scope="module")
def module_patch() -> Iterator[pytest.MonkeyPatch]:
    with pytest.MonkeyPatch.context() as patch:
        yield patch


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory, module_patch: pytest.MonkeyPatch) -> Path:
    """A folder with the small openmoji, its features, three heads, and pictures; pages begin with a copy of it."""
    folder = tmp_path_factory.mktemp("docs")
    use_small_openmoji(folder / "specs", module_patch)
    module_patch.delenv("DIFFALIGN_HOME", raising=False)
    (folder / "work").mkdir()
    make_docs_folder(folder / "work", module_patch)
    return folder / "work"


def runs_here(block: Block) -> bool:
    return not block.needs and block.language in ("bash", "python")


def as_shell(word: str) -> list[str]:
    """Return what a shell makes of a word; the files of examples/ are those of the repository."""
    if word.startswith("examples/"):
        return [str(ROOT / word)]
    return sorted(glob.glob(word)) if "*" in word else [word]


@pytest.fixture
def own_plugins() -> Iterator[None]:
    """Forget the plug-ins that the test has loaded."""
    before = plugins.loaded_files()
    yield
    for path in set(plugins.loaded_files()).difference(before):
        plugins.forget_file(path)


@pytest.mark.parametrize("page", PROGRAMS, ids=lambda page: page.stem)
def test_every_command_exists(page: Path) -> None:
    """Commands, options, make targets, files and Python of all blocks, of those that need hardware too."""
    for block in blocks_of(page):
        assert block.language in ("bash", "python", "text", "yaml", "toml"), f"{page.name}: name the language of every block"
        if block.language == "python":
            compile(block.text, page.name, "exec")
        for words in block.commands() if block.language == "bash" else ():
            if (arguments := arguments_of(words)) is not None:
                check_arguments(arguments)
                assert block.needs or words[0] in ("diffalign", "python"), f"{page.name}: {words} needs <!-- needs: … -->"
            elif words[0] == "make":
                subprocess.run([*words, "-n"], cwd=ROOT, capture_output=True, check=True)
            else:
                assert block.needs, f"{page.name}: {words} needs <!-- needs: … -->"
                assert words[0] in OTHER_PROGRAMS, words
                files = [word for word in words if re.fullmatch(r"(benchmarks|examples|docs)/\S+", word)]
                assert all((ROOT / file).exists() for file in files), words


@pytest.mark.slow
@pytest.mark.usefixtures("own_plugins")
@pytest.mark.parametrize(
    "page", [page for page in PROGRAMS if any(map(runs_here, blocks_of(page)))], ids=lambda page: page.stem
)
def test_the_commands_of_a_page_run_in_their_order(
    page: Path, template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Shell and Python of a page share one folder, and its Python one namespace; a glob is what the shell would make of it."""
    folder = Path(shutil.copytree(template, tmp_path / "work"))
    monkeypatch.chdir(folder)
    names: dict[str, object] = {"__name__": "page"}
    for block in filter(runs_here, blocks_of(page)):
        if block.language == "python":
            exec(compile(block.text, page.name, "exec"), names)
            continue
        for words in block.commands():
            if (arguments := arguments_of(words)) is not None:
                expanded = [found for word in arguments for found in as_shell(word)]
                assert run_shortly(expanded, monkeypatch) == 0, (words, capsys.readouterr().err)


def test_every_command_of_the_program_is_on_a_page() -> None:
    written = {arguments[0] for page in PAGES for block in blocks_of(page) if block.language == "bash"
               for words in block.commands() if (arguments := arguments_of(words))}  # fmt: skip
    text = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    named = set(re.findall(r"`diffalign ([a-z-]+)", text))
    commands = {command.name or command.callback.__name__.replace("_", "-") for command in cli.app.registered_commands
                if command.callback} | {group.name for group in cli.app.registered_groups}  # fmt: skip
    assert commands - written - named == set()


def test_the_readme_is_short_and_finished() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert not re.findall(r"@[A-Z_]+@", text)
    assert len(text.splitlines()) <= 90


def test_nobody_is_told_to_install_a_package_of_an_index_that_is_not_ours() -> None:
    files = [*PAGES, *ROOT.glob("examples/*.ipynb"), *ROOT.glob("pipeline/studies/*.py"), *ROOT.glob("pipeline/training/*.py")]
    for path in files:
        assert not re.search(r"pip install [\\'\"]*(diffalign|\{DISTRIBUTION)", path.read_text(encoding="utf-8")), path


@pytest.mark.parametrize(
    "shapes", [{"pixel_values": ("b", 3, 224, 224)}, {"pixel_values": ("b", 3, 64, 64), "noise": ("b", 7)}]
)
def test_the_snippet_of_onnx_runtime_takes_the_inputs_of_any_export(
    shapes: dict[str, tuple[object, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of heads without noise too, and of encoders of any size."""

    def run(names: list[str], inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
        assert {name: value.shape for name, value in inputs.items()} == {key: (2, *own[1:]) for key, own in shapes.items()}
        return [np.zeros((2, 5)) for _ in names]

    described = [SimpleNamespace(name=name, shape=shape) for name, shape in shapes.items()]
    session = SimpleNamespace(get_inputs=lambda: described, run=run)
    monkeypatch.setitem(sys.modules, "onnxruntime", SimpleNamespace(InferenceSession=lambda path: session))
    page = next(page for page in PAGES if page.stem == "export")
    names: dict[str, Any] = {}
    exec([block.text for block in blocks_of(page) if "onnxruntime" in block.text and block.language == "python"][-1], names)
    assert names["logits"].shape == (2, 5)


def test_every_number_of_the_readme_s_table_stands_in_the_results() -> None:
    """Levels and intervals, written the same way."""
    readme, results = ((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "docs/results.md"))
    numbers = set(re.findall(r"(?<!Python )[+-]?\b\d+\.\d\d\b(?: ± \d+\.\d\d)?", readme))
    assert len(numbers) > 20
    assert {number for number in numbers if number not in results} == set()


def test_every_page_is_in_the_navigation() -> None:
    navigation = (ROOT / "docs" / "site" / "mkdocs.yml").read_text(encoding="utf-8")
    assert {page.name for page in PAGES if page.parent.name == "docs"} == set(re.findall(r"\b([a-z-]+\.md)\b", navigation))
