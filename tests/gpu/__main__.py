"""Measures this machine's card: `python -m gpu` runs the parts that are not measured yet, for up to nine minutes.

Call it again until it says that every part is measured. The figures of a part are in build/gpu/CARD/PART.json, and the
table of all is in docs/gpu.md.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import torch
from gpu.results import Result, write_page
from gpu.suite import PARTS
from internvl_trainer.distributed import prepare_environment

CHECKOUT = Path(__file__).resolve().parents[2]
PAGE = CHECKOUT / "docs" / "gpu.md"
UNFINISHED = 3
"""Exit code when parts are left or have failed: run it again."""
_ENDING = (signal.SIGTERM, signal.SIGHUP)


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
    for number in _ENDING:  # a part is in a session of its own and would go on alone
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    card = ask_card()
    folder = CHECKOUT / "build" / "gpu" / card.replace(" ", "-").replace("/", "-")
    left = run_parts(options.parts or waiting(folder), folder, card, options.seconds)
    write_page(PAGE, folder, {name: part.title for name, part in PARTS.items()})
    left = left if options.parts else unmeasured(folder)
    measured = ", ".join(options.parts) or "every part"
    again = f"not measured: {', '.join(left)}; run it again. {PAGE} says why a part failed"
    print(again if left else f"measured: {measured}; see {PAGE}")
    return UNFINISHED if left else 0


def ask_card() -> str:
    """The card's name, from another process: this one shall take none of the card's memory."""
    ask = "import torch; print(torch.cuda.get_device_name(0))"
    done = subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True, check=True)
    return done.stdout.strip().splitlines()[-1]


def unmeasured(folder: Path) -> list[str]:
    """Parts without figures: not begun, or failed."""
    found = {name: Result.read(folder / f"{name}.json") for name in PARTS}
    return [name for name, result in found.items() if result is None or result.failure]


def waiting(folder: Path) -> list[str]:
    """Parts without a result, then those that failed."""
    left = unmeasured(folder)
    return [name for name in left if not (folder / f"{name}.json").exists()] or left


def run_parts(names: list[str], folder: Path, card: str, seconds: float) -> list[str]:
    """Measure parts one after the other, each in its own process; those that failed or for which no time was left."""
    began, failed = time.monotonic(), list[str]()
    for number, name in enumerate(names):
        part = PARTS[name]
        if number and time.monotonic() - began + part.limit > seconds:
            return failed + names[number:]
        print(f"{name}: {part.title}", flush=True)
        result = run_part(name, card, part.limit)
        result.write(folder / f"{name}.json")
        print(f"  {result.failure or 'done'} ({result.seconds:.0f} s)", flush=True)
        failed += [name] if result.failure else []
    return failed


def run_part(name: str, card: str, limit: int) -> Result:
    """The result of a part in a process of its own, whose memory is free afterwards."""
    began = time.monotonic()
    figures: dict[str, float | str] = {}
    with tempfile.TemporaryDirectory(prefix="part-") as folder:
        file = Path(folder) / "figures.json"
        failure = run_alone([sys.executable, "-m", "gpu", "--measure", name, str(file)], limit)
        if not failure:
            figures = json.loads(file.read_text(encoding="utf-8"))
    return Result(name, card, time.monotonic() - began, figures, failure)


def run_alone(command: list[str], limit: int) -> str:
    """Why a command failed; empty when it did not. Every process that it started has ended then: none keeps the card.

    Args:
        limit: seconds after which it is stopped.
    """
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=errors, start_new_session=True)
        try:
            code = process.wait(timeout=limit)
        except subprocess.TimeoutExpired:
            return f"not done after {limit} s"
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        errors.seek(0)
        lines = errors.read().decode(errors="replace").strip().splitlines()
    return (lines or [f"exit code {code}"])[-1][:300] if code else ""


if __name__ == "__main__":
    sys.exit(main())
