"""Ctrl-C during `internvl-trainer run`: the first is answered at once, the second ends everything."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from internvl_api.memory.stop_time import grace_seconds
from internvl_api.pipeline import PARALLEL_STAGES
from internvl_api.run_config import RunConfig
from internvl_api.status import StageName

from internvl_trainer.signals import noticed

INTERRUPTED = 130
"""Exit code after the second Ctrl-C, as a shell reports one of SIGINT."""


@contextmanager
def answered(say: Callable[[str], None], what_now: Callable[[], str], leave: Callable[[], None]) -> Iterator[None]:
    """Within the block, the first signal shows `what_now()`, and a second Ctrl-C ends this process with INTERRUPTED.

    The stage's processes die with their parent.

    Args:
        say: shows a line at once.
        what_now: what a stop does at this moment.
        leave: gives the terminal back before the process ends.
    """
    stopping = False

    def notice(number: int) -> None:
        nonlocal stopping
        if not stopping:
            stopping = True
            again = "; Ctrl-C again to stop now" if number == signal.SIGINT else ""
            say(f"{what_now()}{again}")
        elif number == signal.SIGINT:
            say("stopped now; the same command goes on from the newest checkpoint")
            leave()
            os._exit(INTERRUPTED)

    with noticed(notice):
        yield


def stop_notice(config: RunConfig, stage: StageName | None, *, takes_steps: bool) -> str:
    """What a stop does during a stage; None: between stages.

    `takes_steps`: whether a step has been seen; one of the last second may not have been.
    """
    if stage == "train":
        seconds = config.grace_seconds or grace_seconds(None, config)
        seen = "" if takes_steps else " if a step is done"
        return f"stopping: saving a checkpoint{seen}, up to {seconds} s"
    if stage in PARALLEL_STAGES and takes_steps:
        return "stopping: the answers so far are stored"
    return "stopping: finished stages stay, this one starts again" if stage else "stopping: finished stages stay"
