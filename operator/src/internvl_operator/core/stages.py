"""The pipeline of a run: its stages, their size, and which one is next."""

from collections.abc import Sequence
from dataclasses import dataclass

from internvl_api.pipeline import PARALLEL_STAGES, stage_names
from internvl_api.spec import InternVLFineTuneSpec
from internvl_api.status import StageName, StageStatus

DONE = ("Succeeded", "Skipped")


@dataclass(frozen=True)
class Stage:
    """One group of pods running `internvl-trainer <name>`. A CPU stage never asks for a GPU."""

    name: StageName

    @property
    def parallel(self) -> bool:
        """Whether the stage runs on all workers, each with its GPUs."""
        return self.name in PARALLEL_STAGES

    @property
    def title(self) -> str:
        """The name in reasons of conditions: `Preflight`."""
        return "".join(part.capitalize() for part in self.name.split("-"))

    def size(self, spec: InternVLFineTuneSpec) -> int:
        """Number of pods in the group."""
        if self.name == "preflight":
            return spec.data.preflight.workers
        return spec.workers if self.parallel else 1

    def waits_for(self, rank: int) -> bool:
        """Whether the stage cannot end without this pod. Of preflight's, the first one does what the others leave."""
        return self.parallel or rank == 0

    def processes(self, spec: InternVLFineTuneSpec) -> int:
        """Number of processes in one pod."""
        return spec.processes_per_worker if self.parallel else 1

    def gpus(self, spec: InternVLFineTuneSpec) -> int:
        """GPUs of one pod."""
        return spec.gpus_per_worker if self.parallel else 0


def pipeline(spec: InternVLFineTuneSpec) -> tuple[Stage, ...]:
    """The stages that a spec asks for, in order."""
    return tuple(Stage(name) for name in stage_names(spec))


def fresh(spec: InternVLFineTuneSpec) -> list[StageStatus]:
    """The pipeline before anything ran."""
    return [StageStatus(name=stage.name) for stage in pipeline(spec)]


def in_order(spec: InternVLFineTuneSpec, known: Sequence[StageStatus]) -> list[StageStatus]:
    """One entry for each stage of the pipeline: the known one, else a fresh one; other known entries are dropped."""
    by_name = {entry.name: entry for entry in known}
    return [by_name.get(entry.name) or entry for entry in fresh(spec)]


def current(entries: Sequence[StageStatus]) -> Stage | None:
    """The stage that has begun and is not done, else the first that is not done; None when all are done.

    After an upgrade, a new stage may stand before the one that has begun; the begun one is finished first.
    """
    left = [entry for entry in entries if entry.state not in DONE]
    begun = [entry for entry in left if entry.attempt > 0]
    return next((Stage(entry.name) for entry in begun or left), None)


def ending(entry: StageStatus) -> str:
    """Why the last attempt ended: reason (as in docs/runbook.md), then message."""
    return ": ".join(part for part in (entry.reason, entry.message) if part)


def done_names(entries: Sequence[StageStatus]) -> frozenset[str]:
    """Names of the stages that are done."""
    return frozenset(entry.name for entry in entries if entry.state in DONE)
