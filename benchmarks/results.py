"""Run the benchmarks, write the figures of each to a JSON file, and put the tables into RESULTS.md: `make bench`.

    python benchmarks/results.py [--parts extraction,decoding,stores,streaming,heads,grid,joint] [--note TEXT]
    python benchmarks/results.py --parts ""     # only the table, from the files in measured/

A line of a program with a goal, "what: ratio 0.98 (0.96 to 1.00, 9 rounds) (wanted >= 1.0)", becomes a row, which says "short"
where the goal is missed. Everything in RESULTS.md outside the two marks is written by hand. `gpu.sh --out benchmarks/measured`
adds the figures of a GPU.
"""

from __future__ import annotations

import argparse
import json
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

from gpu import HERE, device_name, run_program, table

MEASURED = HERE / "measured"  # <part>.json of each program
RESULTS = HERE / "RESULTS.md"
BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"
LIMIT = 3600  # seconds of a program
PARTS = {
    "extraction": "extract.py --parts bound,loop,overhead,identity,memory",
    "decoding": "extract.py --parts decoding --images 1536",
    "stores": "extract.py --parts store,opening --images 2",
    "streaming": "streaming.py",
    "heads": "plain_heads.py",
    "grid": "grid.py --rows 16384",
    "joint": "joint.py",
}
PACKAGES = ("torch", "numpy", "zarr")


def measure(part: str, note: str) -> dict[str, Any]:
    """Run a part, and return its figures with the device, the versions, and a note about the machine."""
    versions = {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}}
    about = {"device": device_name(), **versions, "note": note, "command": PARTS[part]}
    return about | {"parts": {part: run_program(part, PARTS[part].split(), LIMIT)}}


def tables(folder: Path) -> str:
    """Return the tables of all files of a folder as Markdown."""
    sections = []
    for file in sorted(folder.glob("*.json")):
        results = json.loads(file.read_text())
        about = [f"`{results['command']}`" if "command" in results else "`gpu.sh`", results.get("note", "")]
        sections.append(f"### {file.stem}\n\n{'; '.join(filter(None, about))}.\n{table(results)}")
    return "\n".join(sections)


def put_between_marks(text: str, inserted: str) -> str:
    """Return a text with what is between the two marks replaced."""
    before, _, rest = text.partition(BEGIN)
    _, mark, after = rest.partition(END)
    if not mark:
        raise SystemExit(f"{RESULTS.name} has no lines {BEGIN} and {END}")
    return f"{before}{BEGIN}\n\n{inserted}\n{END}{after}"


def main() -> None:
    """Run the parts that are asked for, and renew the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--note", default="", help='about the machine, such as "beside other work"')
    given = parser.parse_args()
    MEASURED.mkdir(exist_ok=True)
    for part in filter(None, given.parts.split(",")):
        (MEASURED / f"{part}.json").write_text(json.dumps(measure(part, given.note), indent=1) + "\n")
        RESULTS.write_text(put_between_marks(RESULTS.read_text(), tables(MEASURED)))
    RESULTS.write_text(put_between_marks(RESULTS.read_text(), tables(MEASURED)))


if __name__ == "__main__":
    main()
