"""Write small imitations of the official files of NUS-WIDE, VIREO Food-172, Ingredients-101 and MSR-VTT, with all their quirks.

Everything in them is synthetic. `python tests/helpers/make_fixtures.py FOLDER` writes all four, one folder each.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import av
import numpy as np
from PIL import Image

from pipeline.data.spec import load_spec

# NUS-WIDE: (path in the list, split, concepts, tags). Row 3 has no concept, row 4 no tag, row 7 neither; rows 10 and 11 are one
# photo in two folders, in both splits; row 2 is a PNG, row 5 is grey, row 9 has no file.
NUS_ROWS = (
    ("actor\\0001_2124494179.jpg", "Train", ("person", "sky"), ("sky", "people")),
    ("actor\\0002_174174086.jpg", "Test", ("sky",), ("blue",)),
    ("albatross\\0213_10341804.jpg", "Train", ("animal", "birds"), ("bird", "naïve")),
    ("beach\\0100_300000001.jpg", "Train", (), ("sand",)),
    ("beach\\0101_300000002.jpg", "Test", ("beach", "ocean"), ()),
    ("cat\\0001_300000003.jpg", "Train", ("animal", "cat"), ("cat", "東京")),
    ("lake\\0001_300000004.jpg", "Train", ("lake", "water"), ("lake",)),
    ("dog\\0001_300000005.jpg", "Test", (), ()),
    ("dog\\0002_300000006.jpg", "Test", ("dog",), ("null", "nan", "NA")),
    ("sun\\0001_300000007.jpg", "Train", ("sun", "sunset"), ("sun",)),
    ("sunset\\0001_300000008.jpg", "Train", ("sunset",), ("lake", "sunset")),
    ("water\\0009_300000008.jpg", "Test", ("reflection", "water"), ("lake", "sunset")),
)
NUS_TAGS = ("sky", "people", "blue", "bird", "naïve", "sand", "cat", "東京", "lake", "null", "nan", "NA", "sun", "sunset")
NUS_VOCABULARY = (*NUS_TAGS, *(f"word{number:03d}" for number in range(len(NUS_TAGS), 1000)))

# VIREO: (line of the list, ingredients by column). Folders 1, 2 and 172; file names repeat; one has no ingredients.
VIREO_LISTS = {
    "TR.txt": (("/1/4_41.jpg", (0, 5)), ("/172/3_7.jpg", (352,)), ("/2/1_2.jpg", (1, 5, 200)), ("/1/5_5.jpg", ())),
    "VAL.txt": (("/2/9_9.jpg", (5,)),),
    "TE.txt": (("/1/1_2.jpg", (0,)), ("/172/8_1.jpg", (351, 352))),
}

# Ingredients-101: three of the 101 classes, by their numbers; the pictures of each split.
FOOD_CLASSES = {0: "Apple pie", 1: "baby_back_ribs", 100: "waffles"}
FOOD_INGREDIENTS = {0: "Butter,flour,,Brown sugar,", 1: "pork,salt", 100: "flour, egg"}
FOOD_SPLITS = {
    "train": ((100, "waffles/10"), (0, "apple_pie/1005649"), (1, "baby_back_ribs/7"), (0, "apple_pie/134")),
    "val": ((1, "baby_back_ribs/8"),),
    "test": ((0, "apple_pie/2"), (100, "waffles/11")),
}

# MSR-VTT: (number, split, category, captions by sentence number, file). Clip 1 cannot be decoded.
MSRVTT_CLIPS = (
    (0, "train", 9, {11: "a car is shown", 3: "a man drives a car"}, "TrainValVideo/video0.mp4"),
    (1, "train", 16, {4: "someone eats"}, "TrainValVideo/video1.mp4"),
    (6513, "validate", 9, {6: "a red truck", 5: "a red truck", 7: "a truck"}, "TrainValVideo/video6513.mp4"),
    (7010, "test", 14, {2: "children play", 1: "kids in a garden"}, "TestVideo/video7010.mp4"),
    (7011, "test", 0, {0: "a song"}, "TestVideo/video7011.webm"),
)


def write_text(path: Path, lines: Iterable[str], end: str = "\n", last: str = "\n") -> None:
    """Write a UTF-8 file of lines: `end` stands between the lines and `last` after the last one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes((end.join(lines) + last).encode())


def write_image(path: Path, mode: str = "RGB", kind: str = "JPEG") -> None:
    """Write a small picture of one colour in the format `kind`, whatever the suffix of its name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, (24, 16), 90 if mode == "L" else tuple(range(40, 40 + 30 * len(mode), 30))).save(path, kind)


def write_video(path: Path, codec: str) -> None:
    """Write a clip of four frames of 32 x 32 pixels."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=4)
        assert isinstance(stream, av.VideoStream)
        stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
        for shade in (0, 80, 160, 240):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.full((32, 32, 3), shade, np.uint8), format="rgb24")))
        container.mux(stream.encode())


def make_nuswide(root: Path) -> Path:
    """Write 12 photos, 7 for training and 5 for testing, interleaved; return the folder NUS-WIDE.

    The tags are in a folder beside it.
    """
    official = root / "NUS-WIDE"
    concepts = load_spec("nuswide")["class_names"]
    write_text(official / "ConceptsList" / "Concepts81.txt", (f"{name} " for name in concepts))
    write_text(official / "ImageList" / "Imagelist.txt", (path for path, *_ in NUS_ROWS), last="\n\n")
    for split, prefix, end in (("Train", "C:\\ImageData\\Flickr\\", "\n"), ("Test", "", "\r\n")):
        own = [row for row in NUS_ROWS if row[1] == split]
        write_text(official / "ImageList" / f"{split}Imagelist.txt", (prefix + path for path, *_ in own), end, end)
        for name in concepts:
            marks = ["1" if name in labels else "0" for _, _, labels, _ in own]
            if (name, split) == ("lake", "Train"):
                marks[2] = "-1130179"
            write_text(official / "Groundtruth" / "TrainTestLabels" / f"Labels_{name}_{split}.txt", marks)
        _write_tags(root / "NUS_WID_Tags" / f"{split}_Tags1k.dat", own)
        write_text(root / "NUS_WID_Tags" / f"{split}_Tags81.txt", ("1 " * 81 for _ in own))  # tags, not labels
    for name in concepts:
        marks = ("1" if name in labels else "0" for _, _, labels, _ in NUS_ROWS)
        write_text(official / "Groundtruth" / "AllLabels" / f"Labels_{name}.txt", marks)
    _write_tags(root / "NUS_WID_Tags" / "AllTags1k.txt", NUS_ROWS)
    write_text(root / "NUS_WID_Tags" / "TagList1k.txt", NUS_VOCABULARY)
    numbers = (path.rpartition("_")[2].removesuffix(".jpg") for path, *_ in NUS_ROWS)
    words = ("  ".join(["", *tags, "next\u0085line", "out\u2028side"]) for *_, tags in NUS_ROWS)
    write_text(root / "NUS_WID_Tags" / "All_Tags.txt", (f"{number}{own}" for number, own in zip(numbers, words, strict=True)))
    for row, (path, *_) in enumerate(NUS_ROWS):
        if row != 9:
            kind = "PNG" if row == 2 else "JPEG"
            write_image(official / "Flickr" / path.replace("\\", "/"), "L" if row == 5 else "RGB", kind)
    return official


def _write_tags(path: Path, rows: Sequence[tuple[str, str, tuple[str, ...], tuple[str, ...]]]) -> None:
    write_text(path, ("".join(f"{int(word in tags)}\t" for word in NUS_VOCABULARY) for *_, tags in rows))


def make_nuswide_imports(root: Path) -> Path:
    """Write the same photos as the csv, hashnet and mmcv imports, with the tags beside them; return the folder of the lists."""
    make_nuswide(root)
    folder = root / "imports"
    concepts = load_spec("nuswide")["class_names"]
    relative = [path.replace("\\", "/") for path, *_ in NUS_ROWS]
    names = [str(list(labels)) for _, _, labels, _ in NUS_ROWS]
    splits = ["train" if split == "Train" else "val" for _, split, _, _ in NUS_ROWS]
    cells = (f'{path},"{own}",{split}' for path, own, split in zip(relative, names, splits, strict=True) if own != "[]")
    write_text(folder / "nus_wid_data.csv", ["filepath,label,split_name", *cells])
    for split in ("Train", "Test"):
        own = [(row, path, labels) for row, (path, of, labels, _) in enumerate(NUS_ROWS) if of == split]
        ids = [path.rpartition("_")[2].removesuffix(".jpg") for _, path, _ in own]
        files = [f"{row}_{number}_f86eb60ccf_m.jpg" for (row, _, _), number in zip(own, ids, strict=True)]
        marks = [" ".join("1" if name in labels else "0" for name in concepts) for _, _, labels in own]
        lines = (f"./data/nuswide_81/images/{file} {mark}" for file, mark in zip(files, marks, strict=True))
        write_text(folder / "hashnet" / f"{split.lower()}.txt", lines)
        numbers = (" ".join([path.replace("\\", "/"), *(str(concepts.index(n)) for n in labels)]) for _, path, labels in own)
        write_text(folder / "mmcv" / f"{split.lower()}.txt", numbers)
        for file in files:
            write_image(folder / "images" / file)
    return folder


def make_vireo172(root: Path) -> Path:
    """Write seven pictures of folders 1, 2 and 172; one of them is CMYK, one is grey."""
    lists = root / "SplitAndIngreLabel"
    write_text(lists / "TR.txt", (path for path, _ in VIREO_LISTS["TR.txt"]))
    write_text(lists / "VAL.txt", (path for path, _ in VIREO_LISTS["VAL.txt"]), last="\n\n")
    write_text(lists / "TE.txt", (path for path, _ in VIREO_LISTS["TE.txt"]), last="")
    dishes = ["Braised Pork", "Sauteed Crème Fraîche;", *(f"Dish {number}" for number in range(3, 172)), "Rice Soup "]
    write_text(lists / "FoodList.txt", dishes)
    write_text(lists / "IngredientList.txt", (f"minced thing {number}" for number in range(353)))
    pictures = [picture for own in VIREO_LISTS.values() for picture in own]
    marks = ((path, ("1" if column in found else "-1" for column in range(353))) for path, found in reversed(pictures))
    write_text(lists / "IngreLabel.txt", (f"{path}  {' '.join(values)}" for path, values in marks))
    modes = {"/172/8_1.jpg": "CMYK", "/1/5_5.jpg": "L"}
    for path, _ in pictures:
        write_image(root / "ready_chinese_food" / path.removeprefix("/"), modes.get(path, "RGB"))
    return root


def make_ingredients101(root: Path, folder: str = "annotations") -> Path:
    """Write seven pictures of three of the 101 classes; one is grey, and the ingredients of one class hold empty names."""
    annotations = root / "Ingredients101" / folder
    write_text(annotations / "classes.txt", (FOOD_CLASSES.get(number, f"dish {number:03d}") for number in range(101)))
    write_text(annotations / "ingredients.txt", (FOOD_INGREDIENTS.get(number, "water") for number in range(101)), last="")
    write_text(annotations / "ingredients_simplified.txt", (FOOD_INGREDIENTS.get(n, "x").split(",")[0] for n in range(101)))
    for split, pictures in FOOD_SPLITS.items():
        write_text(annotations / f"{split}_images.txt", (name for _, name in pictures), last="" if split == "test" else "\n")
        write_text(annotations / f"{split}_labels.txt", (str(number) for number, _ in pictures))
        for _, name in pictures:
            write_image(root / "food-101" / "images" / f"{name}.jpg", "L" if name == "apple_pie/134" else "RGB")
    write_text(root / "food-101" / "meta" / "train.txt", sorted(name for s in ("train", "val") for _, name in FOOD_SPLITS[s]))
    write_text(root / "food-101" / "meta" / "test.txt", sorted(name for _, name in FOOD_SPLITS["test"]))
    return root


def clip_records(clips: Iterable[Sequence[Any]], validate: str = "validate") -> dict[str, list[dict[str, Any]]]:
    """Return the JSON of an annotation file, with keys that hold spaces, as in the official files.

    Videos are in order, sentences in reverse order.
    """
    clips = list(clips)
    videos = [
        {
            "category": category,
            "url": f"https://www.youtube.com/watch?v=-{number:08d}xY",
            "video_id": f"video{number}",
            "start time": 1.5,
            "end time": 11.5,
            "split": validate if split == "validate" else split,
            "id": number,
        }
        for number, split, category, _, _ in clips
    ]
    sentences = [
        {"caption": caption, "video_id": f"video{number}", "sen_id": sentence}
        for number, _, _, captions, _ in reversed(clips)
        for sentence, caption in captions.items()
    ]
    return {"videos": videos, "sentences": sentences}


def make_msrvtt(root: Path, validate: str = "validate") -> Path:
    """Write five clips and the two official JSON files; one clip is webm, one cannot be decoded."""
    root.mkdir(parents=True, exist_ok=True)
    for name, splits in (("train_val", ("train", "validate")), ("test", ("test",))):
        records = clip_records((clip for clip in MSRVTT_CLIPS if clip[1] in splits), validate)
        (root / f"{name}_videodatainfo.json").write_text(json.dumps({"info": {"year": "2016"}, **records}), encoding="utf-8")
    write_text(root / "category.txt", (f"{name}\t{number}" for number, name in enumerate(load_spec("msrvtt")["class_names"])))
    for number, *_, file in MSRVTT_CLIPS:
        write_video(root / file, "libvpx" if file.endswith(".webm") else "mpeg4")
        if number == 1:
            (root / file).write_bytes(b"\x00\x00\x00\x20ftypisom" + bytes(200))
    return root


def main() -> None:
    """Write all of them into the folder that is the only argument."""
    (folder,) = map(Path, sys.argv[1:])
    for name, make in (
        ("nuswide", make_nuswide_imports),
        ("vireo172", make_vireo172),
        ("ingredients101", make_ingredients101),
        ("msrvtt", make_msrvtt),
    ):
        print(make(folder / name))


if __name__ == "__main__":
    main()
