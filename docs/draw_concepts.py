"""Draw docs/concepts-*.svg: the stages, a cache, which text reaches what, and SeDA's diffusion. Run by `make docs`."""

from __future__ import annotations

from dataclasses import dataclass
from html import escape
from pathlib import Path

FOLDER = Path(__file__).parent
# Colours of the paper, of boxes, lines and letters, of what is image, text, or left out.
LIGHT = {
    "paper": "#fff",
    "box": "#f1f4fa",
    "line": "#5f6c80",
    "ink": "#1d2430",
    "image": "#1f5fae",
    "text": "#b3541e",
    "off": "#9aa4b2",
}
DARK = {
    "paper": "#1e2129",
    "box": "#2a2f3a",
    "line": "#98a4b8",
    "ink": "#e8ecf3",
    "image": "#7db4ff",
    "text": "#ff9d66",
    "off": "#6d7786",
}


def style() -> str:
    """The style of a picture: a paper of its own, so that it is readable on any page, and a dark one where asked for."""

    def colours(of: dict[str, str]) -> str:
        kinds = "".join(f".{kind}{{stroke:{of[kind]}}}" for kind in ("image", "text", "off"))
        return (
            f".paper{{fill:{of['paper']}}}.box{{fill:{of['box']};stroke:{of['line']}}}path{{stroke:{of['line']}}}"
            f"text{{fill:{of['ink']}}}.tip{{fill:{of['line']}}}{kinds}"
        )

    shapes = (
        "path{fill:none;stroke-width:1.6}rect.image,rect.text{stroke-width:2}.off{stroke-dasharray:5 4}"
        "text{font:13px sans-serif}.name{font-weight:bold;font-size:14px}.note{font-size:12px}path.tip{stroke:none}"
    )
    return f"{colours(LIGHT)}{shapes}@media(prefers-color-scheme:dark){{{colours(DARK)}}}"


@dataclass(frozen=True)
class Box:
    """A box with a name and lines below it; x, y, width in pixels."""

    x: int
    y: int
    width: int
    name: str
    lines: tuple[str, ...] = ()
    kind: str = ""  # image, text or off

    @property
    def height(self) -> int:
        return 30 + 17 * len(self.lines)

    def svg(self) -> str:
        parts = [
            f'<rect class="box {self.kind}" x="{self.x}" y="{self.y}" width="{self.width}" height="{self.height}" rx="7"/>',
            f'<text class="name" x="{self.x + 11}" y="{self.y + 20}">{escape(self.name)}</text>',
        ]
        for row, line in enumerate(self.lines):
            parts.append(f'<text x="{self.x + 11}" y="{self.y + 39 + 17 * row}">{escape(line)}</text>')
        return "\n".join(parts)


def arrow(x: int, y: int, to_x: int, to_y: int, kind: str = "", label: str = "") -> str:
    """A straight arrow; its label stands above the middle."""
    text = f'\n<text class="note" x="{(x + to_x) // 2}" y="{(y + to_y) // 2 - 7}" text-anchor="middle">{escape(label)}</text>'
    return f'<path class="{kind}" marker-end="url(#tip)" d="M{x} {y}L{to_x} {to_y}"/>' + (text if label else "")


def note(x: int, y: int, text: str) -> str:
    """A line of small text."""
    return f'<text class="note" x="{x}" y="{y}">{escape(text)}</text>'


def picture(title: str, height: int, *parts: Box | str) -> str:
    """A whole picture, 860 pixels wide."""
    drawn = "\n".join(part if isinstance(part, str) else part.svg() for part in parts)
    tip = '<marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8" markerHeight="8" orient="auto">'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 860 {height}" width="860" role="img">\n'
        f"<title>{escape(title)}</title>\n"
        f'<style>{style()}</style>\n<defs>{tip}<path class="tip" d="M0 0L8 4L0 8z"/></marker></defs>\n'
        f'<rect class="paper" width="860" height="{height}" rx="10"/>\n{drawn}\n</svg>\n'
    )


def stages() -> str:
    return picture(
        "From official files to a report, in three stages", 330,
        Box(20, 30, 180, "official files", ("pictures, clips", "texts, labels, splits")),
        Box(280, 30, 200, "manifest", ("one row per sample,", "checked, hashed")),
        Box(560, 30, 280, "feature cache", ("an image vector per sample,", "a text vector where there is one")),
        arrow(202, 62, 276, 62, "", "prepare"), arrow(482, 62, 556, 62, "", "extract"),
        note(575, 112, "stage 1: once per encoder, minutes to days"),
        Box(560, 150, 280, "run", ("a head: weights, history, predictions", "on validation; one folder per seed")),
        arrow(700, 120, 700, 146), note(575, 217, "stage 2: train-head, grid, tune: seconds"),
        Box(280, 150, 200, "metrics", ("evaluate: images alone,", "every test read is logged")), arrow(558, 182, 484, 182),
        Box(20, 150, 180, "tables, pictures", ("report, compare,", "reproduce")), arrow(278, 182, 204, 182),
        Box(280, 250, 560, "joint training (stage 3): finetune",
            ("the encoder is trained with a head, and makes another cache",)),
        arrow(700, 225, 700, 247), '<path class="off" marker-end="url(#tip)" d="M840 272H850V62H844"/>',
    )  # fmt: skip


def cache() -> str:
    return picture(
        "A cache is a folder of shards; a shard counts when its commit record is there", 300,
        Box(20, 30, 250, "name of the cache", ("sha256 of encoder, weights,", "preprocessing, number format,", "manifest")),
        arrow(272, 70, 326, 70),
        Box(330, 30, 510, "caches/openmoji/efficientnet_lite-d066…/  (a Zarr group)",
            ("ids [N], features [N, D], failures.parquet",)),
        Box(330, 110, 160, "shard 0", ("rows 0 to 8,191", "commit: sha256, rows,", "norms, media digests")),
        Box(505, 110, 160, "shard 1", ("rows 8,192 to …", "commit: sha256, rows,", "norms, media digests")),
        Box(680, 110, 160, "shard 2", ("being written", "no commit yet:", "it does not exist"), "off"),
        arrow(405, 80, 405, 106), arrow(585, 80, 585, 106), arrow(765, 80, 765, 106, "off"),
        note(20, 220, "Killed here? The same command writes shard 2 anew, and ends in the same bytes."),
        note(20, 242, "A picture that cannot be decoded is a row of NaN and a line in failures.parquet, never zeros."),
        note(20, 264, "Another encoder, other weights or another manifest: another name, another cache."),
    )  # fmt: skip


def lupi() -> str:
    return picture(
        "Which text reaches what", 320,
        note(20, 28, "training"), note(20, 190, "validation, test, and any new picture"),
        Box(20, 40, 170, "picture", ("of a training sample",), "image"),
        Box(20, 110, 170, "its text", ("read in training only",), "text"),
        Box(300, 40, 200, "image features", (), "image"), Box(300, 110, 200, "text features", (), "text"),
        arrow(192, 62, 296, 56, "image", "image encoder"), arrow(192, 132, 296, 126, "text", "text encoder"),
        Box(610, 60, 230, "loss of the head", ("label, and the text as target",)),
        arrow(502, 56, 606, 80, "image"), arrow(502, 124, 606, 96, "text"),
        Box(20, 205, 170, "picture", (), "image"), Box(300, 205, 200, "image features", (), "image"),
        Box(610, 195, 230, "head: predict(image)", ("no parameter for text",)),
        arrow(192, 220, 296, 220, "image"), arrow(502, 220, 606, 220, "image"),
        Box(20, 255, 170, "its text", (), "off"),
        note(205, 275, "never opened: a test fills the text cache with NaN and wants the same bits"),
    )  # fmt: skip


def diffusion() -> str:
    return picture(
        "SeDA: two stages of one diffusion", 330,
        note(20, 28, "step n of the chain:  T (noise)  →  0"),
        Box(20, 45, 150, "noise, n = T", ("keyed by seed", "and sample id")),
        Box(230, 45, 250, "t < n ≤ T: translator (DST)", ("its target is the text feature", "of the picture"), "text"),
        Box(550, 45, 250, "n ≤ t: learner (DSL)", ("it gathers what is made around", "the images of the class"), "image"),
        arrow(172, 75, 226, 75), arrow(482, 75, 546, 75), arrow(675, 112, 675, 172),
        Box(230, 170, 250, "image feature", ("the condition of every step",), "image"),
        arrow(330, 168, 330, 114, "image"), arrow(470, 168, 580, 114, "image"),
        Box(550, 175, 250, "what the chain ends in", ("a feature without noise",)),
        arrow(675, 224, 675, 256, "", ""), Box(550, 258, 250, "classifier: logits"),
        note(20, 300, "Training draws one step n per batch; prediction walks some of the steps, down to 0."),
    )  # fmt: skip


PICTURES = {"stages": stages, "cache": cache, "lupi": lupi, "diffusion": diffusion}

if __name__ == "__main__":
    for name, draw in PICTURES.items():
        (FOLDER / f"concepts-{name}.svg").write_text(draw(), encoding="utf-8")
