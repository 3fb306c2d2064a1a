"""A pass in the making: the facts it starts from, and the status, children and deletions it has decided so far."""

from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from internvl_api.status import InternVLFineTuneStatus, Phase, StageName, StageStatus

from internvl_operator.core import conditions, stages
from internvl_operator.core.events import events
from internvl_operator.core.memory import with_estimate
from internvl_operator.core.observe import Observed, Pod, owner
from internvl_operator.core.operator_config import OperatorConfig
from internvl_operator.core.plan import Plan, Ref
from internvl_operator.core.policies.run_policy import force_left
from internvl_operator.core.run import Run
from internvl_operator.core.stages import Stage
from internvl_operator.core.timestamps import to_text


@dataclass
class Draft:
    """Lives for one pass; `status` starts as a copy of the run's last one."""

    run: Run
    observed: Observed
    now: datetime
    config: OperatorConfig
    status: InternVLFineTuneStatus
    apply: list[dict[str, Any]] = field(default_factory=list)
    delete: dict[str, Ref] = field(default_factory=dict)  # by uid: asking twice is asking once
    waits: list[float] = field(default_factory=list)
    roll_call: tuple[Pod, ...] = ()

    @classmethod
    def begin(cls, run: Run, observed: Observed, now: datetime, config: OperatorConfig) -> "Draft":
        """The attempt is the newest known: status may have been lost after its pods were made."""
        status = run.status.model_copy(deep=True)
        if run.resolved.spec is not None and not conditions.is_true(status.conditions, "Complete"):
            status.stages = stages.in_order(run.resolved.spec, status.stages)
        draft = cls(run, observed, now, config, status)
        done = stages.done_names(status.stages)
        seen = [pod.attempt for pod in draft.own_pods if pod.stage not in done]
        status.attempt = max([status.attempt, 1, *seen])
        return draft

    # --- what is there

    @property
    def stage(self) -> Stage | None:
        """The stage that is under way or next."""
        return stages.current(self.status.stages)

    @property
    def own_pods(self) -> list[Pod]:
        """Pods that this run (not an earlier one of its name) owns."""
        return [pod for pod in self.observed.pods if pod.owner_uid == self.run.uid]

    @property
    def members(self) -> list[Pod]:
        """The current attempt of the current stage."""
        stage = self.stage
        return [
            pod for pod in self.own_pods if stage and pod.stage == stage.name and pod.attempt == self.status.attempt
        ]

    @property
    def leftovers(self) -> list[Pod]:
        """Own pods of attempts that are over. Those of a stage that is done stay, so that their logs can be read."""
        keep = stages.done_names(self.status.stages)
        current = {pod.uid for pod in self.members}
        return [pod for pod in self.own_pods if pod.uid not in current and pod.stage not in keep]

    @property
    def strangers(self) -> list[str]:
        """Children of an earlier run of the same name: they hold the names ours need."""
        pods = [f"pod {pod.name}" for pod in self.observed.pods if pod.owner_uid != self.run.uid]
        seen = self.observed
        shared = [*seen.services.values(), *seen.config_maps.values(), *seen.pod_groups.values()]
        owners = ((raw["metadata"]["name"], owner(raw)) for raw in shared)
        return pods + [name for name, found in owners if found and found[1] != self.run.uid]

    def entry(self, stage: Stage) -> StageStatus:
        """The stage's line in status."""
        return next(entry for entry in self.status.stages if entry.name == stage.name)

    def created(self, stage: Stage) -> bool:
        """Whether all pods of the current attempt were made once: from then on, one that is missing was lost."""
        return self.entry(stage).attempt == self.status.attempt

    def _last_stage(self) -> StageName | None:
        """Of a run that is complete, what was said then: an API server may give the stages back in another order."""
        if conditions.is_true(self.run.status.conditions, "Complete"):
            return self.run.status.stage
        return self.status.stages[-1].name if self.status.stages else None

    # --- what follows

    def wait(self, seconds: float) -> None:
        """Look again after at most so long."""
        self.waits.append(seconds)

    def remove(self, pods: list[Pod]) -> None:
        """Ask pods to go, with their grace period; by force once that is long over."""
        for pod in pods:
            left = force_left(pod, self.now, self.config)
            if pod.deleted_at is None or left <= 0:
                self.delete[pod.uid] = Ref("Pod", pod.name, pod.uid, force=left <= 0)
            else:
                self.wait(left)

    def say(self, phase: Phase, reason: str, message: str) -> None:
        """The summary: phase and all conditions."""
        self.status.phase = phase
        self.status.conditions = conditions.summarise(
            with_estimate(self.status.conditions, self.run, self.config.gpu_memory, self.now),
            phase,
            reason,
            message,
            self.run.generation,
            self.now,
        )

    def timestamp(self) -> str:
        """`now`, as status has it."""
        return to_text(self.now)

    def plan(self) -> Plan:
        """The finished pass."""
        generation = self.run.generation
        self.status.observed_generation = generation
        # Also of what was said before and still holds: `kubectl wait` takes no word about an earlier generation.
        self.status.conditions = conditions.still_true(self.status.conditions, generation)
        self.status.stage = self.stage.name if self.stage else self._last_stage()
        return Plan(
            apply=tuple(self.apply),
            delete=tuple(self.delete.values()),
            status=self.status,
            requeue_after=min(self.waits, default=None),
            events=events(self.run.status, self.status),
            roll_call=self.roll_call,
        )
