"""Exported runs: the graph gives what the run gives, in torch and in ONNX Runtime; the folder, its card, and the upload."""

from __future__ import annotations

import base64
import io
import json
import os
import re
import shlex
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from glob import glob
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
import yaml
from helpers.command_line import run
from helpers.photos import TRAINING, PhotoHome, make_photo_home
from helpers.tiny_heads import small_settings
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from safetensors.torch import load_file
from timm.data.transforms_factory import create_transform

import pipeline as da
from pipeline.data.manifest_files import write_manifest
from pipeline.data.media_digests import read_digest
from pipeline.encoders._factory import build_encoder
from pipeline.encoders._weights import image_to_uint8, split_transform
from pipeline.evaluation.classify import Classifier
from pipeline.runtime import plugins
from pipeline.runtime.rng import KeyedRNG, content_keys
from pipeline.studies.export_folder import FILES, _put_in_place, _without_folders, export_run, push_folder
from pipeline.studies.export_graph import ClassifierGraph, Draw, NoiseInput, run_noise, trace
from pipeline.studies.export_inputs import read_preprocessing, write_preprocessing
from pipeline.studies.model_card import _metrics

DOCS = Path(__file__).parents[2] / "docs"
VIT: dict[str, Any] = {"model": "test_vit", "weights": "random", "compute_dtype": "float32"}


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> PhotoHome:
    """The photos with image features of a small transformer, in float32 as every graph computes."""
    home = make_photo_home(tmp_path_factory.mktemp("export"))
    made = home.workspace.extract("photos", "timm", workers=0, max_failures=0.1, settings=VIT)
    return home._replace(caches={**home.caches, "image": made["timm"].path.name})


def train(photos: PhotoHome, method: str, **settings: Any) -> da.Run:
    chosen = {**small_settings(method), **settings}
    return photos.workspace.train_head("photos", method, train=TRAINING, settings=chosen, **photos.caches)


@pytest.fixture(scope="module")
def seda(photos: PhotoHome) -> da.Run:
    """A head that draws the start of two chains and noise in each step."""
    return train(photos, "seda", draws=2, eta=1.0, sample_steps=3)


def files_of_test(photos: PhotoHome) -> list[str]:
    manifest = photos.workspace.manifest("photos")
    return [str(manifest.media_path(sample)) for sample in manifest.split("test")]


def test_the_graph_with_the_noise_of_the_run_is_the_run(photos: PhotoHome, seda: da.Run, tmp_path: Path) -> None:
    """From the same files, with nothing of the home: pixels by the written preprocessing, noise by streams and digests."""
    files = files_of_test(photos)
    classifier = Classifier.of(seda.folder, seda.home)
    encoder = classifier.spec.build_encoder(seda.folder)
    write_preprocessing(encoder, tmp_path)
    prepare = read_preprocessing(tmp_path)
    pixels = torch.stack([prepare(Path(file)) for file in files])
    assert torch.equal(pixels, torch.stack([encoder.prepare(Path(file)) for file in files]))
    keys = content_keys(read_digest(Path(file)) for file in files)
    ids = [sample.id for sample in photos.workspace.manifest("photos").split("test")]
    expected = classifier.logits(photos.workspace.cache("photos", photos.caches["image"]).read(ids), keys)
    graph = ClassifierGraph(encoder, classifier.method, classifier.spec.store_dtype)
    graph.record_draws(pixels[:2])
    starts = [("draw", draw, "start") for draw in (0, 1)]
    steps = [("draw", draw, "step", k) for draw in (0, 1) for k in (0, 1)]
    assert {draw.names for draw in graph.draws} == {*starts, *steps}
    with torch.no_grad():
        found = graph(pixels, run_noise(graph.draws, seda.seed, keys))
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-4, atol=1e-4)


def test_columns_of_the_noise_are_the_streams_of_the_run() -> None:
    keys = torch.arange(4)
    rng = KeyedRNG.seeded(3, keys).at("predict")
    recorder = NoiseInput([], None, 4)
    for source in (recorder.at("draw", 0), recorder.at("draw", 1), recorder.at("draw", 0)):
        assert source.at("start").normal(2, 3).shape == (4, 2, 3)
    recorder.normal(5)
    assert recorder.draws == [Draw(("draw", 0, "start"), (2, 3)), Draw(("draw", 1, "start"), (2, 3)), Draw((), (5,))]
    noise = run_noise(recorder.draws, 3, keys)
    assert noise.shape == (4, 17)
    given = NoiseInput(recorder.draws, noise, 4)
    assert torch.equal(given.at("draw", 1, "start").normal(2, 3), rng.at("draw", 1, "start").normal(2, 3))
    assert torch.equal(given.normal(5), rng.normal(5))
    with pytest.raises(da.UserError, match="other numbers than normal ones"):
        recorder.uniform(2)


def check_graphs(head: da.Run, folder: Path, files: list[str]) -> None:
    """Check that both graphs give the classes of the run, and equal logits for noise that was never traced."""
    expected = head.predict(files, top=3, workers=0)
    models = {backend: da.load_export(folder, backend) for backend in ("onnx", "torch")}
    for model in models.values():
        found = model.predict(files, top=3)
        assert found["class_1"].tolist() == expected["class_1"].tolist()
        np.testing.assert_allclose(found["probability_1"], expected["probability_1"], atol=1e-3)
    rng = np.random.default_rng(1)
    size = models["onnx"].facts["noise_size"]
    for batch in (1, 5):
        pixels = rng.integers(0, 256, (batch, 3, 160, 160), dtype=np.uint8)
        noise = rng.standard_normal((batch, size), dtype=np.float32)
        onnx, program = (model.graph(pixels, noise) for model in models.values())
        np.testing.assert_allclose(onnx, program, atol=1e-3)


@pytest.mark.slow
def test_both_graphs_give_what_the_run_gives(
    photos: PhotoHome, seda: da.Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """By the commands of the page, whose upload goes to a server of this test; the example without this package is run, too."""
    page = (DOCS / "export.md").read_text(encoding="utf-8")
    seda.evaluate("test")
    shutil.copytree(seda.home, tmp_path / "artifacts")
    (tmp_path / "new" / "more").mkdir(parents=True)
    for name in ("new/cat.png", "new/more/dog.png"):
        shutil.copyfile(files_of_test(photos)[0], tmp_path / name)
    monkeypatch.chdir(tmp_path)
    lines = [line for block in re.findall(r"```bash\n(.*?)```", page, re.DOTALL) for line in block.splitlines()]
    assert [line.split()[:2] for line in lines] == [["pip", "install"], ["diffalign", "export"], ["diffalign", "export"]]
    assert lines[2].startswith(lines[1])
    with hub(monkeypatch) as received:
        words = [each for word in shlex.split(lines[2])[1:] for each in (glob(word) if "*" in word else [word])]
        assert run(words, monkeypatch) == 0, capsys.readouterr().err
    made = {path.name: path for path in Path("exported").iterdir()}
    assert received["me/photos-seda"].keys() == made.keys()
    check_card(made["README.md"].read_text())
    config = json.loads(made["config.json"].read_text())
    assert config["id2label"] == {"0": "blue", "1": "green", "2": "red"}
    assert config["diffalign"]["onnx_differs_by"] < 1e-3
    weights = load_file(made["model.safetensors"])
    assert {name.partition(".")[0] for name in weights} == {"encoder", "head"}
    names: dict[str, Any] = {}
    for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
        exec(block, names)
    assert names["logits"].shape == (2, 3)
    for path in made.values():
        assert not [
            each for each in (tmp_path, seda.home, DOCS.parent, sys.prefix) if os.fsencode(each) in path.read_bytes()
        ], path
    assert run(["export", str(seda.path), "exported"], monkeypatch) == 2
    assert "exported is there: take another folder, or --overwrite this export" in capsys.readouterr().err
    check_graphs(seda, Path("exported"), files_of_test(photos))


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.parametrize("method", plugins.names("methods"))
def test_every_head_can_be_exported(method: str, photos: PhotoHome, tmp_path: Path) -> None:
    head = train(photos, method)
    if method == "knn":  # its search among the training samples depends on the size of the batch
        with pytest.raises(da.UserError, match=r"cannot be exported: KNearest or its encoder cannot be traced"):
            export_run(head.folder, tmp_path / method, head.home)
        return
    export_run(head.folder, tmp_path / method, head.home)
    check_graphs(head, tmp_path / method, files_of_test(photos))


def check_card(text: str) -> None:
    head, body = text.removeprefix("---\n").split("---\n", 1)
    assert yaml.safe_load(head) == {
        "library_name": "diffalign",
        "pipeline_tag": "image-classification",
        "tags": ["diffalign", "seda"],
        "datasets": ["photos"],
    }
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in body.splitlines() if line.startswith("|")]
    (accuracy,) = [row for row in rows if row[:1] == ["test"] and row[2] == "acc1"]
    low, high = map(float, accuracy[4].split(" to "))
    assert low <= float(accuracy[3]) <= high
    assert ["licence of the encoder's weights", "apache-2.0"] in rows


class Hub(BaseHTTPRequestHandler):
    """A stand-in of the hub's address for one repository, which takes all files inside the commit."""

    files: ClassVar[dict[str, dict[str, bytes]]] = {}

    def log_message(self, format: str, *args: Any) -> None:
        """Print nothing."""

    def do_GET(self) -> None:
        self.answer({"id": "me/photos-seda", "sha": "0" * 40, "siblings": []})

    def do_POST(self) -> None:
        data = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        own = self.files.setdefault("me/photos-seda", {})
        if self.path.endswith("/repos/create"):
            assert json.loads(data)["name"] == "photos-seda"
            self.answer(
                {"url": f"http://{self.headers['Host']}/me/photos-seda", "name": "me/photos-seda", "id": "me/photos-seda"}
            )
        elif self.path.endswith("/validate-yaml"):
            assert "diffalign" in json.loads(data)["content"]
            self.answer({"errors": [], "warnings": []})
        elif "/preupload/" in self.path:
            names = [each["path"] for each in json.loads(data)["files"]]
            self.answer({"files": [{"path": name, "uploadMode": "regular", "shouldIgnore": False} for name in names]})
        else:
            assert "/models/me/photos-seda/commit/main" in self.path
            assert self.headers["Authorization"] == "Bearer hf_test"
            for line in data.decode().splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    own[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
            url = f"http://{self.headers['Host']}/me/photos-seda/commit/{'0' * 40}"
            self.answer({"success": True, "commitOid": "0" * 40, "commitUrl": url})

    def answer(self, content: dict[str, Any]) -> None:
        body = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@contextmanager
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, dict[str, bytes]]]:
    """Inside the block, the hub is a server of this process; yields the files of each repository."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    Hub.files = {}
    Thread(target=server.serve_forever, daemon=True).start()
    yield Hub.files
    server.shutdown()
    server.server_close()


def test_a_folder_is_uploaded_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model.onnx").write_bytes(bytes(range(256)))
    (tmp_path / "README.md").write_text("---\ntags: [diffalign]\n---\n# Card\n")
    with hub(monkeypatch) as received:
        assert push_folder(tmp_path, "me/photos-seda").endswith("/me/photos-seda")
    assert received["me/photos-seda"] == {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(da.UserError, match=r"is written, but it could not be uploaded to 'me/photos-seda'"):
        push_folder(tmp_path, "me/photos-seda")  # the server is gone
    with pytest.raises(da.UserError, match=r"could not be uploaded to 'no/such/name'"):
        push_folder(tmp_path, "no/such/name")


def openclip_transform() -> Any:
    return image_transform_v2(PreprocessCfg(size=32), is_train=False)


def timm_transform() -> Any:
    return create_transform((3, 32, 32), interpolation="bilinear", crop_pct=0.9)


@pytest.mark.parametrize("transform", [openclip_transform, timm_transform])
def test_preprocessing_is_read_back(transform: Any, tmp_path: Path) -> None:
    """Of the two libraries whose transforms most encoders have, without their networks."""
    resize, _ = split_transform(transform())
    built: Any = SimpleNamespace(
        modality="image", resize=resize, drawing_side=32, prepare_image=lambda image: image_to_uint8(resize(image))
    )
    write_preprocessing(built, tmp_path)
    pixels = np.random.default_rng(2).integers(0, 256, (133, 157, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "picture.png")
    expected = built.prepare_image(Image.fromarray(pixels))
    assert torch.equal(read_preprocessing(tmp_path)(tmp_path / "picture.png"), expected)


def test_a_program_of_torch_is_not_loaded_unasked(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"diffalign": {"calibration": {"kind": "softmax"}}}))
    (tmp_path / "labels.json").write_text('["a", "b"]')
    (tmp_path / "model.pt2").write_bytes(b"code of strangers")
    backends: tuple[Any, ...] = ("auto", "onnx")
    for backend in backends:
        with pytest.raises(da.UserError, match=r'has no model.onnx, .* pass backend="torch", only for folders that you trust'):
            da.load_export(tmp_path, backend)
    (tmp_path / "config.json").write_text(json.dumps({"diffalign": {"calibration": {"kind": "softmax", "temperature": 0}}}))
    with pytest.raises(da.UserError, match=r"is damaged .*temperature is not above 0"):
        da.load_export(tmp_path)


def test_exports_name_no_folder_of_this_machine() -> None:
    class Doubled(torch.nn.Module):
        def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
            return torch.relu(2 * pixel_values)

    file = io.BytesIO()
    graph: Any = Doubled()
    torch.export.save(trace(graph, (torch.ones(2, 3),)), file)
    assert os.fsencode(DOCS.parent) not in file.getvalue()
    nested = {"weights": "/home/me/x.pth", "settings": "weights=/home/me/x.pth,layer=3", "mean": [0.5, "a/b"]}
    cut = {"weights": "x.pth", "settings": "weights=x.pth,layer=3", "mean": [0.5, "a/b"]}
    assert _without_folders(nested) == cut


def test_intervals_of_the_card_are_over_groups(photos: PhotoHome, seda: da.Run, tmp_path: Path) -> None:
    seda.evaluate("test")
    home, manifest = photos.workspace.home, photos.workspace.manifest("photos")
    classifier = Classifier.of(seda.folder, home)
    grouped = tuple(replace(each, group=each.id.partition("-")[0] + each.split) for each in manifest.samples)
    write_manifest(replace(manifest, samples=grouped), tmp_path)
    (independent, *_), (of_groups, *_) = (_metrics(classifier, each)[2:] for each in (home, tmp_path))
    assert independent.rpartition("|")[0].split("|")[:5] == of_groups.split("|")[:5]
    assert independent != of_groups
    for folder, said in ((home, "over samples,"), (tmp_path, "over groups of samples,"), (tmp_path / "x", "as independent,")):
        assert said in _metrics(classifier, folder)[-1]


def test_what_is_no_export_is_never_replaced(
    photos: PhotoHome, seda: da.Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "exported"
    (folder / "inner").mkdir(parents=True)
    monkeypatch.chdir(folder / "inner")
    for here in (Path(), folder, Path("..")):
        with pytest.raises(da.UserError, match="is the current folder or has it inside"):
            export_run(seda.folder, here, seda.home, overwrite=True)
    monkeypatch.chdir(tmp_path)
    (folder / "inner").rmdir()
    for name in (*FILES, "thesis.tex"):
        (folder / name).touch()
    with pytest.raises(da.UserError, match=r"has 'thesis.tex', which is no file of an export"):
        export_run(seda.folder, folder, seda.home, overwrite=True)
    with pytest.raises(FileNotFoundError):  # the new folder cannot be renamed
        _put_in_place(tmp_path / "missing", folder, tmp_path / "old")
    assert {path.name for path in folder.iterdir()} == {*FILES, "thesis.tex"}


def test_what_cannot_be_exported_says_why(photos: PhotoHome, tmp_path: Path) -> None:
    with pytest.raises(da.UserError, match="RandomProjection prepares images in a way of its own"):
        write_preprocessing(build_encoder("random_projection", {}), tmp_path)
    with pytest.raises(da.UserError, match="is no folder of `diffalign export`"):
        da.load_export(tmp_path / "nowhere")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").touch()
    for overwrite in (False, True):  # it is no export, and stays
        with pytest.raises(da.UserError, match=r"is there: take another folder$"):
            export_run(train(photos, "baseline").folder, tmp_path / "full", tmp_path, overwrite=overwrite)
    assert (tmp_path / "full" / "thesis.tex").is_file()
