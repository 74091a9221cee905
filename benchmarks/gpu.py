"""Measure this project on a machine with a GPU in less than eight minutes; results are in gpu.json and gpu.md.

    benchmarks/gpu.sh [--out DIR] [--parts tests,heads,heads-mixed,extraction,joint] [--small]

It runs from a source tree that is not installed, and needs no network. Every part is a program of its own with a limit on its
time; its lines are printed as they come. Lines with a goal, "(wanted >= 3)", become rows of the table. `--small` runs all parts
with small numbers, also without a GPU; its figures mean nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from dask.system import CPU_COUNT

HERE = Path(__file__).parent
NO_TESTS = 5  # what pytest returns where there is no GPU, and therefore no test
# what to run, what to run with --small, and the limit in seconds
PARTS: dict[str, tuple[str, str, int]] = {
    "heads": ("head_steps.py", "head_steps.py --small", 120),
    "tests": ("-m pytest -m gpu -p no:cacheprovider", "-m pytest -m gpu -p no:cacheprovider", 105),
    "heads-mixed": (
        "head_steps.py --precision mixed --parts one,cells",
        "head_steps.py --precision mixed --parts one,cells --small",
        70,
    ),
    "extraction": ("extract.py --parts bound --images 4096", "extract.py --parts bound --images 16", 90),
    "joint": (
        "joint.py --encoder timm --set model=vit_base_patch16_224 --images 512 --batch 64",
        "joint.py --set side=64 --images 16 --batch 8",
        90,
    ),
}
SMALL_LIMIT = 4  # times the limit of a part with --small, for a processor that may be slow
GOAL = re.compile(
    r"^(?P<what>.+?): .*?(?P<measured>\d[\d.]*)(?P<spread> \([^()]* rounds\))?[^\d]*"
    r"\(wanted (?P<wanted>(?P<sign>[<>]=?) (?P<limit>[\d.]+)).*?\)"
)


def rows_of(part: str, lines: Sequence[str]) -> list[dict[str, Any]]:
    """Return the figures that have a goal, from the lines that a part has printed."""
    rows = []
    for line in lines:
        if found := GOAL.match(line):
            measured, limit = float(found["measured"]), float(found["limit"])
            is_met = measured <= limit if found["sign"].startswith("<") else measured >= limit
            row = {"part": part, "what": found["what"], "wanted": found["wanted"], "measured": measured, "is_met": is_met}
            rows.append(row | {"spread": (found["spread"] or "").strip(" ()")})
    return rows


def run(part: str, is_small: bool) -> dict[str, Any]:
    """Run a part for a GPU, and return what came of it."""
    full, small, limit = PARTS[part]
    command = (small if is_small else full).split() + (gpu_tests() if part == "tests" else [])
    result = run_program(part, command, limit * (SMALL_LIMIT if is_small else 1))
    if part == "tests" and result["returned"] == NO_TESTS and not torch.cuda.is_available():
        result["returned"] = 0
    return result


def run_program(part: str, command: Sequence[str], limit: int) -> dict[str, Any]:
    """Run a program, print its lines as they come, and return its figures.

    Args:
        part: how the program is called in the tables.
        command: what Python gets; the name of a program in this folder is enough.
        limit: seconds after which the program is ended.
    """
    located = [str(HERE / each) if each.endswith(".py") and (HERE / each).is_file() else each for each in command]
    print(f"== {part}", flush=True)
    started, lines = time.monotonic(), list[str]()
    with subprocess.Popen(
        ["timeout", "--signal=KILL", str(limit), sys.executable, *located],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env={**os.environ, "PYTHONUNBUFFERED": "1"},
    ) as process:  # fmt: skip
        assert process.stdout
        for line in process.stdout:
            print(line, end="", flush=True)
            lines.append(line.rstrip())
    return {
        "seconds": round(time.monotonic() - started, 1),
        "returned": process.returncode,
        "rows": rows_of(part, lines),
        "lines": lines,
    }


def gpu_tests() -> list[str]:
    """Return the files of the tests that need a GPU: importing all tests takes most of a minute."""
    return [str(path) for path in sorted((HERE.parent / "tests").rglob("test_*.py")) if "pytest.mark.gpu" in path.read_text()]


def device_name() -> str:
    """Return the name of the GPU, or of the processor."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else f"{CPU_COUNT} cores, {platform.machine()}"


def table(results: dict[str, Any]) -> str:
    """Return the results as Markdown."""
    lines = [f"Device: {results['device']}; torch {results['torch']}, Python {results['python']}.", ""]
    lines += ["| part | what | wanted | measured |", "|---|---|---|---|"]
    for part in results["parts"].values():
        for row in part["rows"]:
            spread = f" ({row['spread']})" if row["spread"] else ""
            measured = f"{row['measured']:g}{spread}{'' if row['is_met'] else ': **short**'}"
            lines.append(f"| {row['part']} | {row['what']} | {row['wanted']} | {measured} |")
    for name, part in results["parts"].items():
        ending = "ended" if part["returned"] == 0 else f"**failed** ({part['returned']})"
        lines.append(f"| {name} | the whole part | | {ending} after {part['seconds']:.0f} s |")
    return "\n".join([*lines, ""])


def main() -> int:
    """Run the parts, and write the results after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(), help="where gpu.json and gpu.md are written")
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--small", action="store_true", help="small numbers, to try the program")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {"device": device_name(), "torch": torch.__version__, "python": platform.python_version()}
    results |= {"small": given.small, "parts": {}}
    print(f"{results['device']}, torch {results['torch']}, Python {results['python']}", flush=True)
    for part in given.parts.split(","):
        results["parts"][part] = run(part, given.small)
        (given.out / "gpu.json").write_text(json.dumps(results, indent=1) + "\n")
        (given.out / "gpu.md").write_text(table(results))
    print(table(results))
    return max(abs(part["returned"]) for part in results["parts"].values())


if __name__ == "__main__":
    sys.exit(main())
