"""Files of features that are cut, forged or wrong: one line of error, no code is run, little memory, and no cache is left."""

from __future__ import annotations

import io
import json
import pickle
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers.feature_caches import make_cache, make_manifest
from safetensors.numpy import save_file

from pipeline.cache import verify
from pipeline.cache.transfer import export_cache, import_features
from pipeline.data.manifest import Manifest

NUM = 600
GOOD = np.ones((NUM, 3), np.float32)
FileWriter = Callable[[Path, list[str]], object]  # (file, valid ids): writes the file


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home that holds only a manifest."""
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def manifest(home: Path) -> Manifest:
    return make_manifest(home, NUM)


class Bomb:
    """An object that runs code when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.write_text, (Path("exploded"), "yes")


def npy_file(array: Any) -> FileWriter:
    """Return a writer of a .npy with this array, and of valid ids beside it."""

    def write(file: Path, ids: list[str]) -> None:
        np.save(file, array, allow_pickle=True)
        file.with_suffix(".json").write_text(json.dumps(ids))

    return write


def npy_with_header(shape: str, descr: str = "'<f4'", data: bytes = GOOD.tobytes(), version: bytes = b"\x01\x00") -> FileWriter:
    """Return a writer of a .npy with this header, and of valid ids beside it."""

    def write(file: Path, ids: list[str]) -> None:
        header = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}}}".encode() + b"\n"
        file.write_bytes(b"\x93NUMPY" + version + struct.pack("<H", len(header)) + header + data)
        file.with_suffix(".json").write_text(json.dumps(ids))

    return write


def npy_with_sidecar(text: str, suffix: str = ".json") -> FileWriter:
    """Return a writer of a valid .npy with this text in the sidecar; IDS stands for the valid ids."""

    def write(file: Path, ids: list[str]) -> None:
        np.save(file, GOOD)
        file.with_suffix(suffix).write_text(text.replace("IDS", json.dumps(ids)))

    return write


def h5_file(**datasets: Any) -> FileWriter:
    """Return a writer of a .h5 with valid features and ids, except the given datasets; None leaves one out."""

    def write(file: Path, ids: list[str]) -> None:
        with h5py.File(file, "w") as opened:
            for name, data in {"features": GOOD, "ids": ids, **datasets}.items():
                if isinstance(data, (h5py.ExternalLink, h5py.SoftLink)):
                    opened[name] = data
                elif isinstance(data, dict):
                    opened.create_dataset(name, **data)
                elif data is not None:
                    opened.create_dataset(name, data=data)

    return write


def h5_virtual(file: Path, ids: list[str]) -> None:
    """Write a .h5 whose features are in another file."""
    layout = h5py.VirtualLayout(GOOD.shape, np.float32)
    layout[:] = h5py.VirtualSource(str(file.with_name("secret.h5")), "features", GOOD.shape)
    with h5py.File(file, "w") as opened:
        opened.create_virtual_dataset("features", layout)
        opened.create_dataset("ids", data=ids)


def parquet_file(**columns: Any) -> FileWriter:
    """Return a writer of a .parquet with valid columns, except the given ones; None leaves one out."""

    def write(file: Path, ids: list[str]) -> None:
        good = {"id": ids, "features": pa.FixedSizeListArray.from_arrays(GOOD.ravel(), 3)}
        table = {name: column for name, column in {**good, **columns}.items() if column is not None}
        pq.write_table(pa.table(table), file)

    return write


def parquet_with_dictionary(words: list[str]) -> FileWriter:
    """Return a writer of a .parquet whose ids are all the first word. The words are stored once, in a dictionary."""
    return parquet_file(id=pa.DictionaryArray.from_arrays(pa.array([0] * NUM, pa.int32()), words))


def parquet_with_long_ids(**options: Any) -> FileWriter:
    """Return a writer of a .parquet with long ids that compress very well."""
    columns = {"id": ["x" * 4000 + f"{row:04}" for row in range(NUM)], "features": [[1.0]] * NUM}
    return lambda file, ids: pq.write_table(pa.table(columns), file, use_dictionary=False, **options)


def safetensors_file(tensors: dict[str, np.ndarray], metadata: dict[str, str] | None = None) -> FileWriter:
    """Return a writer of a .safetensors with these tensors, and with valid ids unless metadata is given."""
    return lambda file, ids: save_file(tensors, file, {"ids": json.dumps(ids)} if metadata is None else metadata)


def safetensors_with_header(header: dict[str, Any], size: int = 0) -> FileWriter:
    """Return a writer of a .safetensors with this header."""

    def write(file: Path, ids: list[str]) -> None:
        data = json.dumps({"__metadata__": {"ids": json.dumps(ids)}, **header}).encode()
        file.write_bytes(struct.pack("<Q", size or len(data)) + data + GOOD.tobytes())

    return write


def raw_bytes(data: bytes) -> FileWriter:
    """Return a writer of these bytes, and of valid ids beside them."""

    def write(file: Path, ids: list[str]) -> None:
        file.write_bytes(data)
        file.with_suffix(".json").write_text(json.dumps(ids))

    return write


def npz_archive() -> bytes:
    """Return the bytes of an .npz archive."""
    file = io.BytesIO()
    np.savez(file, features=GOOD)
    return file.getvalue()


CASES: dict[str, tuple[str, FileWriter, str]] = {
    "object array": (".npy", npy_file(np.array([[Bomb()]] * NUM, dtype=object)), "features must be numbers, not object"),
    "bare pickle": (".npy", raw_bytes(pickle.dumps(Bomb())), "cannot be read: the magic string is not correct"),
    "archive": (".npy", raw_bytes(npz_archive()), "the magic string is not correct"),
    "empty npy": (".npy", raw_bytes(b""), "cannot be read"),
    "strings": (".npy", npy_file(np.array([["a", "b"]] * NUM)), "must be numbers, not <U1"),
    "complex": (".npy", npy_file(GOOD.astype(complex)), "must be numbers, not complex128"),
    "truth values": (".npy", npy_file(GOOD > 0), "must be numbers, not bool"),
    "structured": (".npy", npy_file(np.zeros(NUM, dtype=[("a", "f4")])), "must be numbers"),
    "one dimension": (".npy", npy_file(GOOD[:, 0]), r"must be \[rows, width\] or .*, not \[600\]"),
    "no width": (".npy", npy_file(GOOD[:, :0]), r"must be \[rows, width\] .* not \[600, 0\]"),
    "no rows": (".npy", npy_file(GOOD[:0]), r"not \[0, 3\]"),
    "fewer rows than ids": (".npy", npy_file(GOOD[:-1]), "has 600 ids for 599 rows"),
    "absurd npy": (".npy", npy_with_header("(600, 1000000000000)"), "declares features of shape .* cannot hold"),
    "overflowing npy": (".npy", npy_with_header(f"({2**62}, 8)"), "declares features of shape .* cannot hold"),
    "negative npy": (".npy", npy_with_header("(-600, 3)"), r"not \[-600, 3\]"),
    "too long npy": (".npy", npy_with_header("(600, 2)"), "holds 7200 bytes of features, its shape .* needs 4800"),
    "code in the header": (".npy", npy_with_header("__import__('os').system('touch exploded')"), "cannot be read"),
    "unknown version": (".npy", npy_with_header("(600, 3)", version=b"\x09\x00"), "cannot be read|version"),
    "no ids": (".npy", npy_with_sidecar("", ".md"), "has no ids: put them into file.json, a JSON list, or file.txt"),
    "ids cut off": (".npy", npy_with_sidecar('["a", "b'), "cannot be read"),
    "ids of numbers and lists": (".npy", npy_with_sidecar("[1, [2]]"), "an id must be a string or a whole number, not"),
    "ids nested without end": (".npy", npy_with_sidecar("[" * 100_000), "cannot be read"),
    "ids a number": (".npy", npy_with_sidecar("3"), "must be a JSON list of ids"),
    "ids twice": (".npy", npy_with_sidecar(json.dumps(["a", "b", "a"])), "rows 0 and 2 have the same id 'a'"),
    "ids empty": (".npy", npy_with_sidecar(json.dumps([""])), "the id of row 0 must have 1 to 4096 characters"),
    "ids endless": (".npy", npy_with_sidecar(json.dumps(["x" * 5000])), "must have 1 to 4096 characters"),
    "strangers": (
        ".npy",
        npy_with_sidecar(json.dumps([f"x{i}" for i in range(NUM)])),
        "no id of .* is in toy: it has 'x0', the dataset",
    ),
    "offsets": (".npy", npy_with_sidecar('{"ids": IDS, "offsets": [0, 1]}'), "its offsets do not share its 600 rows"),
    "fractions": (".npy", npy_with_sidecar('{"ids": IDS, "offsets": [0.5]}'), "no list of whole numbers"),
    "not HDF5": (".h5", raw_bytes(b"\x89HDF\r\n\x1a\nrubbish" * 50), "file.h5 cannot be read|file.h5"),
    "no features": (".h5", h5_file(features=None), "no dataset 'features', only: ids"),
    "a group": (".h5", h5_file(features=None, **{"features/deep": GOOD}), "'features' is no dataset of the file itself"),
    "h5 strings": (".h5", h5_file(features=[b"a"] * NUM), "must be numbers, not"),
    "h5 compound": (".h5", h5_file(features=np.zeros((NUM, 2), dtype=[("a", "f4")])), "must be numbers"),
    "h5 scalar": (".h5", h5_file(features=3.0), r"must be \[rows, width\]"),
    "h5 null": (".h5", h5_file(features=h5py.Empty("f")), r"must be \[rows, width\]"),
    "absurd h5": (".h5", h5_file(features={"shape": (2**40, 2**20), "dtype": "f4", "chunks": (1, 64)}), "cannot hold"),
    "wide h5": (".h5", h5_file(features={"shape": (NUM, 2**33), "dtype": "f4", "chunks": (1, 64)}), "cannot hold"),
    "large chunks": (
        ".h5",
        h5_file(features={"shape": (NUM, 3), "maxshape": (None, None), "dtype": "f4", "chunks": (2**14, 2**14)}),
        r"declares features of shape \[16384, 16384\]",
    ),
    "absurd ids": (
        ".h5",
        h5_file(ids={"shape": (2**40,), "dtype": h5py.string_dtype(), "chunks": (64,)}),
        "that the file can hold",
    ),
    "ids of floats": (".h5", h5_file(ids=np.zeros(NUM)), "'ids' must be strings or whole numbers, not float64"),
    "ids in columns": (".h5", h5_file(ids=np.zeros((NUM, 2), int)), r"'ids' must be one list .* not of shape \(600, 2\)"),
    "link to another file": (
        ".h5",
        h5_file(features=h5py.ExternalLink("secret.h5", "features")),
        "no dataset of the file itself",
    ),
    "soft link": (".h5", h5_file(features=h5py.SoftLink("/ids")), "'features' is no dataset of the file itself"),
    "another file's bytes": (
        ".h5",
        h5_file(features={"shape": (NUM, 3), "dtype": "f4", "external": [("secret.h5", 0, NUM * 12)]}),
        "no dataset of the file itself",
    ),
    "another file's rows": (".h5", h5_virtual, "no dataset of the file itself"),
    "record no object": (".h5", h5_file(about="[1]"), "its JSON document is no object"),
    "fixed strings of a mebibyte": (
        ".h5",
        h5_file(ids={"shape": (NUM,), "dtype": "S1048576", "chunks": (1,)}),
        "'ids' are strings of 1048576 bytes; an id has 4096 characters at most",
    ),
    "ids that are compressed away": (
        ".h5",
        h5_file(ids={"data": np.full(4 * NUM, b"x" * 4096), "chunks": (NUM,), "compression": 9}),
        "and its ids would take more than",
    ),
    "not Parquet": (".parquet", raw_bytes(b"PAR1" * 100), "file.parquet cannot be read"),
    "no id column": (".parquet", parquet_file(id=None), "no column 'id', only: features"),
    "no feature column": (".parquet", parquet_file(features=None), "no column of features"),
    "a label among the columns": (
        ".parquet",
        parquet_file(features=None, f0=GOOD[:, 0], label=[1] * NUM),
        "'label' holds int64",
    ),
    "words": (".parquet", parquet_file(features=["a"] * NUM), "'features' holds string instead of lists of numbers"),
    "uneven lists": (
        ".parquet",
        parquet_file(features=[[1.0]] * (NUM - 1) + [[1.0, 2.0]]),
        "not every row of `features` has 1",
    ),
    "a null row": (
        ".parquet",
        parquet_file(features=[[1.0, 2.0]] * (NUM - 1) + [None]),
        "a row of `features` is null; leave it out",
    ),
    "a null number": (".parquet", parquet_file(features=[[1.0, None]] * NUM), "a row of `features` is null"),
    "a null id": (
        ".parquet",
        parquet_file(id=["a"] * (NUM - 1) + [None]),
        "an id must be a string or a whole number, not 'None'",
    ),
    "a long id in a dictionary": (".parquet", parquet_with_dictionary(["x" * 2**18]), "and its ids would take more than"),
    "long ids, compressed": (".parquet", parquet_with_long_ids(compression="zstd"), "and its ids would take more than"),
    "long ids, delta encoded": (
        ".parquet",
        parquet_with_long_ids(column_encoding={"id": "DELTA_BYTE_ARRAY"}),
        "and its ids would take more than",
    ),
    "not safetensors": (".safetensors", raw_bytes(b"\xff" * 500), "file.safetensors cannot be read"),
    "no tensor": (".safetensors", safetensors_file({"x": GOOD}), "no tensor 'features', only: x"),
    "no ids in safetensors": (".safetensors", safetensors_file({"features": GOOD}, {}), "has no ids"),
    "ids no list": (".safetensors", safetensors_file({"features": GOOD}, {"ids": "3"}), "cannot be read"),
    "tensor of truth values": (
        ".safetensors",
        safetensors_file({"features": GOOD > 0}),
        "features are BOOL; choose one of: F64, F32",
    ),
    "absurd header": (".safetensors", safetensors_with_header({}, 2**60), "cannot be read"),
    "absurd tensor": (
        ".safetensors",
        safetensors_with_header({"features": {"dtype": "F32", "shape": [NUM, 2**40], "data_offsets": [0, NUM * 2**42]}}),
        "cannot be read",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_bad_file_is_one_line_and_leaves_no_cache(
    home: Path, manifest: Manifest, tmp_path: Path, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    h5_file(features=GOOD)(tmp_path / "secret.h5", [])
    suffix, write, message = CASES[case]
    file = tmp_path / f"file{suffix}"
    write(file, [sample.id for sample in manifest.samples])
    tracemalloc.start()
    with pytest.raises(ValueError, match=message) as error:
        import_features(file, home, dataset="toy", name="theirs")
    assert tracemalloc.get_traced_memory()[1] < 2**25
    tracemalloc.stop()
    assert "file" in str(error.value)
    assert not list(home.rglob("zarr.json"))
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("suffix", [".h5", ".npy", ".parquet", ".safetensors"])
def test_damage_of_an_exported_file_is_found(home: Path, manifest: Manifest, tmp_path: Path, suffix: str) -> None:
    features = np.random.default_rng(0).normal(size=(NUM, 4)).astype(np.float16).astype(np.float32)
    path = make_cache(tmp_path / "source", make_manifest(tmp_path / "source", NUM), features)
    file = export_cache(path, tmp_path / f"file{suffix}")
    whole = file.read_bytes()
    rng = np.random.default_rng(1)
    damaged = [whole[:cut] for cut in rng.integers(0, len(whole), 15).tolist()]
    for position in rng.integers(0, len(whole), 35).tolist():
        flipped = bytearray(whole)
        flipped[position] ^= 1 << int(rng.integers(0, 8))
        damaged.append(bytes(flipped))
    shard = Path("features", "c", "0", "0")
    refused = 0
    for number, data in enumerate(damaged):
        file.write_bytes(data)
        message = ""
        try:
            done = import_features(file, tmp_path / f"{number}")
        except ValueError as error:
            message = str(error)
            refused += 1
        else:  # the bit does not belong to features, ids or identity
            assert verify(done.path) == []
            assert (done.path / shard).read_bytes() == (path / shard).read_bytes()
            assert (done.path / "ids" / "c" / "0").read_bytes() == (path / "ids" / "c" / "0").read_bytes()
        if message:
            assert file.name in message
            assert not list((tmp_path / f"{number}").rglob("zarr.json"))
    assert refused >= 25


RECORDS: dict[str, Callable[[dict[str, Any]], object]] = {
    "a dataset outside": lambda about: about["identity"].update(dataset="../../etc"),
    "an encoder outside": lambda about: about["identity"]["encoder"].update(name="/tmp/x"),
    "no encoder": lambda about: about["identity"].pop("encoder"),
    "another number format": lambda about: about["identity"].update(store_dtype="float32"),
    "not a number": lambda about: about["identity"].update(extra=float("nan")),
    "no command": lambda about: about["provenance"].pop("command"),
    "identity a list": lambda about: about.update(identity=[]),
    "forged shards": lambda about: about.update(shard_rows=7),
    "shards a string": lambda about: about.update(shard_rows="512"),
    "shards a truth": lambda about: about.update(shard_rows=True),
    "shards a fraction": lambda about: about.update(shard_rows=512.0),
    "another program's command": lambda about: about["provenance"].update(command="rm -rf ~"),
    "a command of two lines": lambda about: about["provenance"].update(command="diffalign extract x\nrm -rf ~"),
    "a command of numbers": lambda about: about["provenance"].update(command=[1]),
    "provenance a list": lambda about: about.update(provenance=["command"]),
    "settings a list": lambda about: about["provenance"].update(settings=["width"]),
    "settings of numbers": lambda about: about["provenance"].update(settings={"width": 8}),
    "versions of nothing": lambda about: about["provenance"].update(versions={"torch": None}),
    "batches of words": lambda about: about["provenance"].update(batch_size="16"),
    "failures at no stage": lambda about: about.update(failures=[{"row": 3, "id": "ä/00003", "stage": 1, "error": ""}]),
    "failures for no reason": lambda about: about.update(failures=[{"row": 3, "id": "ä/00003", "stage": "", "error": None}]),
    "failures outside": lambda about: about.update(failures=[{"row": NUM, "id": "ä/00003", "stage": "", "error": ""}]),
    "failures of nobody": lambda about: about.update(failures=[{"row": 3, "id": "nobody", "stage": "", "error": ""}]),
    "failures of nothing": lambda about: about.update(failures=[{"row": "x", "id": "y", "stage": "z", "error": ""}]),
    "failures invented": lambda about: about.update(failures=[{"row": 3, "id": "y", "stage": "z", "error": ""}]),
    "failures a word": lambda about: about.update(failures="none"),
    "no digests": lambda about: about.pop("sha256"),
    "digests short": lambda about: about["sha256"].update(chunks=[]),
    "digests a number": lambda about: about["sha256"].update(chunks=3),
    "ids of others": lambda about: about["sha256"].update(ids="0" * 64),
}


@pytest.mark.parametrize("case", RECORDS)
def test_a_forged_record_is_refused(tmp_path: Path, case: str) -> None:
    path = make_cache(tmp_path / "source", make_manifest(tmp_path / "source", NUM), GOOD)
    file = export_cache(path, tmp_path / "file.npy")
    sidecar = file.with_suffix(".json")
    described = json.loads(sidecar.read_text())
    RECORDS[case](described["about"])
    sidecar.write_text(json.dumps(described))
    with pytest.raises(
        ValueError, match=r"the record in .*file.npy is damaged or does not fit|file.npy is damaged: rows 0 to 599"
    ):
        import_features(file, tmp_path / "other")
    assert not (tmp_path / "other").exists() or not list((tmp_path / "other").rglob("zarr.json"))
