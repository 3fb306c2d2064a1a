"""Run commands, wait for conditions, and show how long each phase took."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TypeVar

from rich.console import Console

T = TypeVar("T")
console = Console(stderr=True, highlight=False)


class HarnessError(RuntimeError):
    """Something that the harness needs is missing or failed; the message has the next step."""


def run(
    argv: Sequence[str | Path],
    *,
    input: str | None = None,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    log: Path | None = None,
) -> str:
    """Run a command and return its standard output.

    With `log`, all output goes there instead. Raises HarnessError with the command and the end of its errors.
    """
    words = [str(word) for word in argv]
    if log is None:
        done = subprocess.run(words, input=input, env=env, cwd=cwd, capture_output=True, text=True)
        output, errors = done.stdout, done.stderr
    else:
        with log.open("w") as sink:
            done = subprocess.run(
                words, input=input, env=env, cwd=cwd, stdout=sink, stderr=subprocess.STDOUT, text=True
            )
        output, errors = "", tail(log)
    if done.returncode:
        shown = " ".join(words)
        raise HarnessError(
            f"exit code {done.returncode} from: {shown[:400]}\n{(errors or output).strip()[-4000:]}"
            + (f"\nwhole log: {log}" if log else "")
        )
    return output


def tail(path: Path, lines: int = 20) -> str:
    return "\n".join(path.read_text(errors="replace").splitlines()[-lines:]) if path.exists() else ""


def wait_for(
    what: str,
    probe: Callable[[], T | None],
    *,
    timeout: float = 60,
    every: float = 0.05,
    on_timeout: Callable[[], str] = lambda: "",
) -> T:
    """Call `probe` until it returns something true; an exception counts as 'not yet'.

    Raises HarnessError naming `what`, the last exception, and what `on_timeout` tells (the end of a log, say).
    """
    last: Exception | None = None
    deadline = time.monotonic() + timeout
    while True:
        try:
            if result := probe():
                return result
        except Exception as error:  # noqa: BLE001 - a server that is still starting fails in many ways
            last = error
        if time.monotonic() > deadline:
            because = f" (last: {type(last).__name__}: {last})" if last else ""
            raise HarnessError(f"{what}: not after {timeout:.0f} s{because}\n{on_timeout()}".rstrip())
        time.sleep(every)


@contextmanager
def phase(title: str, *, live: bool = True) -> Iterator[None]:
    """Show the current phase, then its duration. Concurrent phases must not be `live`."""
    start = time.monotonic()
    if not live:
        console.print(f"[dim]… {title}[/dim]")
    with console.status(f"{title} …") if live else nullcontext():
        yield
    console.print(f"[green]✓[/green] {title} [dim]{time.monotonic() - start:.1f} s[/dim]")
