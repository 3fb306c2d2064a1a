"""The processes of a stage, each in a pod of its own with a memory limit, and a table of what every phase needed."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from internvl_trainer.distributed import free_port
from trainer.memory_limits import MemoryGroup, memory_groups
from trainer.runs import Stage, environment, pod_environment, started

_PROGRAM = Path(__file__).with_name("limited_stage.py")
_SECONDS = 1500  # of a phase, at most
_HEAD = ("phase", "processes", "limit, MB", "most of one, MB", "seconds")


@dataclass
class PhaseTable:
    """Rows of text, for people."""

    rows: list[Sequence[object]] = field(default_factory=lambda: [_HEAD, ["---"] * len(_HEAD)])

    def __str__(self) -> str:
        return "\n".join(f"| {' | '.join(map(str, row))} |" for row in self.rows)


@dataclass
class LimitedRanks:
    """Running processes of a stage.

    Attributes:
        limit: bytes of each; None for none.
    """

    stages: list[Stage]
    groups: list[MemoryGroup]
    limit: int | None
    table: PhaseTable
    began: float = field(default_factory=time.monotonic)

    def wait_for(self, text: str, phase: str) -> None:
        """Until rank 0 has printed `text`, which ends the phase."""
        self.stages[0].wait_for(text, _SECONDS)
        self._note(phase)

    def stop(self) -> None:
        """SIGTERM to all, as when a node is drained."""
        for stage in self.stages:
            stage.stop(signal.SIGTERM)

    def wait(self, code: int, phase: str) -> int:
        """Until all have ended with this code; the most bytes that one of them used in the phase."""
        codes = [stage.wait(_SECONDS) for stage in self.stages]
        assert codes == [code] * len(codes), "\n".join([str(codes), *(each.output[-2000:] for each in self.stages)])
        return self._note(phase)

    def wait_for_kill(self) -> None:
        """Until the kernel has killed a process for its memory."""
        limit = time.monotonic() + _SECONDS
        while not any(group.was_killed for group in self.groups):
            assert time.monotonic() < limit, "no process was killed"
            assert any(stage.process.poll() is None for stage in self.stages), self.stages[0].output
            time.sleep(0.1)

    def _note(self, phase: str) -> int:
        most, now = max(group.start_over() for group in self.groups), time.monotonic()
        limit = "none" if self.limit is None else round(self.limit / 1e6)
        self.table.rows.append((phase, len(self.stages), limit, round(most / 1e6), round(now - self.began)))
        self.began = now
        return most


@contextmanager
def limited_ranks(
    folder: Path, stage: str, count: int, limit: int | None, table: PhaseTable, *, of_a_copy: int = 0
) -> Iterator[LimitedRanks]:
    """A stage of the run in `folder` in so many pods of one process. Raises NoMemoryGroups.

    Args:
        limit: bytes of each process; None for none.
        of_a_copy: processes that hold a model of an evaluation together; 0: the trainer chooses.
    """
    program = [sys.executable, str(_PROGRAM), str(of_a_copy)]
    port = free_port()
    with memory_groups(count, limit) as groups, ExitStack() as stack:
        stages = [
            stack.enter_context(
                started(
                    [stage, "--config", str(folder / "run.yaml")],
                    environment(folder / f"pod-{rank}", **pod_environment(rank, count, port)),
                    folder / f"result-{stage}-{rank}",
                    group.command(program),
                )
            )
            for rank, group in enumerate(groups)
        ]
        yield LimitedRanks(stages, groups, limit, table)
