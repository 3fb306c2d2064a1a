"""The pipeline: which stages a run has, how many pods each takes, and which is next."""

from collections.abc import Sequence
from dataclasses import dataclass

from internvl_api.spec import InternVLFineTuneSpec
from internvl_api.status import StageName, StageStatus

DONE = ("Succeeded", "Skipped")


@dataclass(frozen=True)
class Stage:
    """One group of pods running `internvl-trainer <name>`. A CPU stage never asks for a GPU."""

    name: StageName
    trains: bool = False

    @property
    def title(self) -> str:
        """For reasons of conditions: `Preflight`."""
        return "".join(part.capitalize() for part in self.name.split("-"))

    def size(self, spec: InternVLFineTuneSpec) -> int:
        """Pods of the group."""
        return spec.workers if self.trains else 1

    def processes(self, spec: InternVLFineTuneSpec) -> int:
        """Processes in one pod."""
        return spec.processes_per_worker if self.trains else 1

    def gpus(self, spec: InternVLFineTuneSpec) -> int:
        """nvidia.com/gpu of one pod."""
        return spec.gpus_per_worker if self.trains else 0


PIPELINE: tuple[Stage, ...] = (Stage("preflight"), Stage("train", trains=True), Stage("publish"))


def fresh() -> list[StageStatus]:
    """The pipeline before anything ran."""
    return [StageStatus(name=stage.name) for stage in PIPELINE]


def in_order(known: Sequence[StageStatus]) -> list[StageStatus]:
    """The pipeline's entries, those already known kept; entries of another operator version's stages are dropped."""
    by_name = {entry.name: entry for entry in known}
    return [by_name.get(stage.name) or StageStatus(name=stage.name) for stage in PIPELINE]


def current(entries: Sequence[StageStatus]) -> Stage | None:
    """The first stage that is not done; None when all are."""
    for stage, entry in zip(PIPELINE, entries, strict=True):
        if entry.state not in DONE:
            return stage
    return None


def done_names(entries: Sequence[StageStatus]) -> frozenset[str]:
    """Names of the stages that are done."""
    return frozenset(entry.name for entry in entries if entry.state in DONE)
