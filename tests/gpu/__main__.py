"""Measures this machine's card: `python -m gpu` runs the parts that are not measured yet, for up to nine minutes.

Call it again until it says that every part is measured. The figures of a part are in build/gpu/CARD/PART.json, and the
table of all is in docs/gpu.md.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from gpu.results import Result, write_page
from gpu.suite import PARTS
from internvl_trainer.distributed import prepare_environment

CHECKOUT = Path(__file__).resolve().parents[2]
PAGE = CHECKOUT / "docs" / "gpu.md"
UNFINISHED = 3
"""Exit code when parts are left: call it again."""


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m gpu", description=__doc__)
    parser.add_argument("parts", nargs="*", help=f"of {', '.join(PARTS)}; default: all that are not measured yet")
    parser.add_argument("--seconds", type=int, default=540, help="begin no part that may end later (default 540)")
    parser.add_argument("--measure", nargs=2, metavar=("PART", "FILE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if unknown := {*options.parts} - {*PARTS}:
        parser.error(f"found {', '.join(sorted(unknown))}; expected some of {', '.join(PARTS)}")
    if not torch.cuda.is_available():
        print(
            "found no GPU that PyTorch can use; nothing is measured. `internvl-trainer doctor` says why",
            file=sys.stderr,
        )
        return 1
    prepare_environment("cuda", 1)
    if options.measure:
        part, file = options.measure
        Path(file).write_text(json.dumps(PARTS[part].measure()), encoding="utf-8")
        return 0
    card = ask_card()
    folder = CHECKOUT / "build" / "gpu" / card.replace(" ", "-").replace("/", "-")
    left = run_parts(options.parts or waiting(folder), folder, card, options.seconds)
    write_page(PAGE, folder, {name: part.title for name, part in PARTS.items()})
    print(f"left: {', '.join(left)}; call it again" if left else f"every part is measured; see {PAGE}")
    return UNFINISHED if left else 0


def ask_card() -> str:
    """The card's name, from another process: this one shall take none of the card's memory."""
    ask = "import torch; print(torch.cuda.get_device_name(0))"
    done = subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True, check=True)
    return done.stdout.strip().splitlines()[-1]


def waiting(folder: Path) -> list[str]:
    """Parts without a result, then those that failed."""
    found = {name: Result.read(folder / f"{name}.json") for name in PARTS}
    never = [name for name, result in found.items() if result is None]
    return never or [name for name, result in found.items() if result is not None and result.failure]


def run_parts(names: list[str], folder: Path, card: str, seconds: float) -> list[str]:
    """Measure parts one after the other, each in its own process; those for which no time was left."""
    began = time.monotonic()
    for number, name in enumerate(names):
        part = PARTS[name]
        if number and time.monotonic() - began + part.limit > seconds:
            return names[number:]
        print(f"{name}: {part.title}", flush=True)
        result = run_part(name, card, part.limit)
        result.write(folder / f"{name}.json")
        print(f"  {result.failure or 'done'} ({result.seconds:.0f} s)", flush=True)
    return []


def run_part(name: str, card: str, limit: int) -> Result:
    """The result of a part in a process of its own, whose memory is free afterwards."""
    began = time.monotonic()
    failure, figures = "", {}
    with tempfile.TemporaryDirectory(prefix="part-") as folder:
        file = Path(folder) / "figures.json"
        command = [sys.executable, "-m", "gpu", "--measure", name, str(file)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=limit, check=False)
            if done.returncode:
                failure = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1][:300]
            else:
                figures = json.loads(file.read_text(encoding="utf-8"))
        except subprocess.TimeoutExpired:
            failure = f"not done after {limit} s"
    return Result(name, card, time.monotonic() - began, figures, failure)


if __name__ == "__main__":
    sys.exit(main())
