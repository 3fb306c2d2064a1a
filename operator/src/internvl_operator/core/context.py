"""The state of one reconcile pass: its inputs, and the status, children and deletions decided so far."""

from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from internvl_api.status import InternVLFineTuneStatus, Phase, StageName, StageStatus, Usage

from internvl_operator.core import attempt_history, conditions, notices, stages, usage
from internvl_operator.core.events import events_between
from internvl_operator.core.group_size import sized
from internvl_operator.core.measured_storage import with_measured_grace
from internvl_operator.core.observe import Observed, Pod, owner
from internvl_operator.core.operator_config import OperatorConfig
from internvl_operator.core.plan import Plan, Ref
from internvl_operator.core.policies import bad_nodes, lost_nodes, sidecars
from internvl_operator.core.policies.run_policy import force_left, shortened
from internvl_operator.core.run import Run
from internvl_operator.core.stages import Stage
from internvl_operator.core.timestamps import to_text

_LEAP = 1_000_000  # attempts that a lost status may lack; a pod further ahead has a forged label


@dataclass
class ReconcileContext:
    """Lives for one pass. `status` starts as a copy of the run's recorded status."""

    run: Run
    observed: Observed
    now: datetime
    config: OperatorConfig
    status: InternVLFineTuneStatus
    apply: list[dict[str, Any]] = field(default_factory=list)
    delete: dict[str, Ref] = field(default_factory=dict)  # by uid, so that repeated requests are one
    waits: list[float] = field(default_factory=list)
    probe: tuple[Pod, ...] = ()
    lost: frozenset[str] = frozenset()  # uids of pods on nodes that are gone; they may be deleted by force
    delete_anyway: bool = False  # the pods must go even when the API server refuses the status

    @classmethod
    def begin(cls, run: Run, observed: Observed, now: datetime, config: OperatorConfig) -> "ReconcileContext":
        """Start a pass. The attempt is the newest one in status or on pods, as a status write may have been lost."""
        status = run.status.model_copy(deep=True)
        if run.resolved.spec is not None and not conditions.is_true(status.conditions, "Complete"):
            status.stages = stages.in_order(run.resolved.spec, status.stages)
        context = cls(with_measured_grace(sized(run)), observed, now, config, status)
        done = stages.done_names(status.stages)
        known = max(status.attempt, 1)
        seen = [pod.attempt for pod in context.own_pods if pod.stage not in done and pod.attempt <= known + _LEAP]
        status.attempt = max([known, *seen])
        context.lost = lost_nodes.lost(context.run, context.own_pods, observed.silences)
        return context

    # --- queries

    @property
    def stage(self) -> Stage | None:
        """The current or next stage; None when all are done."""
        return stages.current(self.status.stages)

    @property
    def own_pods(self) -> list[Pod]:
        """Pods owned by this run, not by an earlier run of the same name."""
        return [pod for pod in self.observed.pods if pod.owner_uid == self.run.uid]

    @property
    def workers(self) -> list[Pod]:
        """Pods of the current attempt of the current stage."""
        stage = self.stage
        return [
            pod for pod in self.own_pods if stage and pod.stage == stage.name and pod.attempt == self.status.attempt
        ]

    @property
    def old_pods(self) -> list[Pod]:
        """Own pods of ended attempts. Pods of completed stages are kept, so that their logs can be read."""
        keep = stages.done_names(self.status.stages)
        current = {pod.uid for pod in self.workers}
        return [pod for pod in self.own_pods if pod.uid not in current and pod.stage not in keep]

    @property
    def pods_of_done_stages(self) -> list[Pod]:
        """Pods of completed stages, kept for their logs."""
        done = stages.done_names(self.status.stages)
        return [pod for pod in self.own_pods if pod.stage in done]

    @property
    def children_of_earlier_run(self) -> list[str]:
        """Names of children of an earlier run of the same name: they occupy the names this run needs."""
        pods = [f"pod {pod.name}" for pod in self.observed.pods if pod.owner_uid != self.run.uid]
        seen = self.observed
        shared = [seen.services, seen.config_maps, seen.network_policies, seen.pod_groups]
        owners = ((raw["metadata"]["name"], owner(raw)) for by_name in shared for raw in by_name.values())
        return pods + [name for name, found in owners if found and found[1] != self.run.uid]

    @property
    def leaving_pods_of_earlier_run(self) -> list[Pod]:
        """Pods of an earlier run of the same name that Kubernetes deletes; on a dead node they never end."""
        pods = self.observed.pods
        return [pod for pod in pods if pod.owner_uid != self.run.uid and pod.deletion_timestamp is not None]

    def entry(self, stage: Stage) -> StageStatus:
        """The stage's entry in status."""
        return next(entry for entry in self.status.stages if entry.name == stage.name)

    def created(self, stage: Stage) -> bool:
        """Whether all pods of the current attempt were created; a pod missing after that was lost."""
        return self.entry(stage).attempt == self.status.attempt

    def _last_stage(self) -> StageName | None:
        """For completed runs keep the recorded stage; the server may reorder `stages`."""
        if conditions.is_true(self.run.status.conditions, "Complete"):
            return self.run.status.stage
        return self.status.stages[-1].name if self.status.stages else None

    # --- decisions

    def wait(self, seconds: float) -> None:
        """Request another pass after at most `seconds`."""
        self.waits.append(seconds)

    def remove(self, pods: list[Pod], *, soon: bool = False) -> None:
        """Delete pods with their grace period; by force long after it has ended, or when their node is gone.

        Args:
            soon: shorten the grace period, because the pods have nothing to save. The peers of a lost worker always get
                the short one: they cannot save a checkpoint without that worker.
        """
        for pod in pods:
            if pod.uid in self.delete:
                continue
            if pod.uid in self.lost:
                self._remove_lost(pod)
                continue
            if (soon or self.lost) and self._remove_soon(pod):
                continue
            left = force_left(pod, self.now, self.config)
            if pod.deletion_timestamp is None or left <= 0:
                self.delete[pod.uid] = Ref("Pod", pod.name, pod.uid, force=left <= 0)
            else:
                self.wait(left)

    def _remove_lost(self, pod: Pod) -> None:
        """Delete by force, and remember the node for the next attempt."""
        self.delete[pod.uid] = Ref("Pod", pod.name, pod.uid, force=True)
        node, status = pod.node or "", self.status
        if node not in status.lost_nodes:
            status.lost_nodes = [*status.lost_nodes, node]
            status.node_failures = bad_nodes.with_failure(status.node_failures, node)

    def _remove_soon(self, pod: Pod) -> bool:
        """Whether the pod's grace period is shortened by this pass."""
        spec = self.run.resolved.spec
        grace = shortened(spec.pod_template.termination_grace_period_seconds if spec else None)
        ends = pod.deletion_timestamp
        if ends is not None and (ends - self.now).total_seconds() <= grace + 1:
            return False
        self.delete[pod.uid] = Ref("Pod", pod.name, pod.uid, grace=grace)
        return True

    def release(self, pods: list[Pod]) -> None:
        """Delete pods whose trainer has exited and whose sidecars do not follow it."""
        for pod in pods:
            left = sidecars.seconds_left(pod, self.now)
            if left is None:
                continue
            if left > 0:
                self.wait(left)
            else:
                self.remove([pod])

    def set_phase(self, phase: Phase, reason: str, message: str) -> None:
        """Set the phase and the conditions that summarise it."""
        self.status.phase = phase
        config, known = self.config, self.status.conditions
        self.status.conditions = conditions.summarise(
            conditions.with_estimates(
                known,
                self.run,
                config.gpu_memory,
                self.now,
                self.status,
                config.network_profiles,
                config.pod_settings,
            ),
            phase,
            reason,
            message,
            self.run.generation,
            self.now,
        )

    def timestamp(self) -> str:
        """The time of this pass as status stores times (RFC 3339, UTC)."""
        return to_text(self.now)

    def plan(self) -> Plan:
        """The plan that this pass decided."""
        generation = self.run.generation
        self.status.observed_generation = generation
        # Unchanged conditions too: `kubectl wait` ignores conditions of an earlier generation.
        self.status.conditions = conditions.for_generation(self.status.conditions, generation)
        self.status.stage = self.stage.name if self.stage else self._last_stage()
        if not conditions.is_true(self.run.status.conditions, "Complete"):
            spec = self.run.resolved.spec
            attempt_history.record(self.run.status, self.status, self.own_pods, spec, self.now)
            self.status.usage = self.usage(self.status)
        if self.config.notices:
            self.status.notice = notices.next_notice(
                self.run.uid, generation, self.run.status, self.status, self.observed.delivered_notice, self.now
            )
        suspects = self._suspects()
        return Plan(
            apply=tuple(self.apply),
            delete=tuple(self.delete.values()),
            delete_anyway=self.delete_anyway,
            status=self.status,
            requeue_after=min(self.waits, default=None),
            events=events_between(self.run.status, self.status),
            probe=self.probe,
            suspects=suspects,
        )

    def usage(self, status: InternVLFineTuneStatus, now: datetime | None = None) -> Usage | None:
        """GPU-hours and cost of the attempts that have ended; with `now`, of those that last too."""
        prices = self.config.prices
        price = prices.of(self.run.resolved.spec, self.config.gpu_resource)
        return usage.used(status.stages, price, prices.currency, now)

    def _suspects(self) -> tuple[Pod, ...]:
        """Pods whose nodes the operator watches; empty unless it may read the Leases of nodes."""
        stage = self.stage
        if not self.config.node_leases or stage is None or not stage.parallel or self.status.phase == "Failed":
            return ()
        if (left := lost_nodes.seconds_to_suspect(self.status, self.now)) is not None:
            self.wait(left)
        return lost_nodes.suspects(self.workers, self.old_pods, self.status, self.now)
