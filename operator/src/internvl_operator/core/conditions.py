"""Conditions: six that summarise the phase, as kstatus (and with it Argo CD and Flux) reads them, and three estimates.

Ready=True: the result is published. Reconciling=True: work continues without the user. Stalled=True: the run waits for
the user or has failed. Reconciling and Stalled are never True together. MemoryEstimate exists only when GPU memory is
known, ResourceEstimate only when a request, a limit, shmSize, the cache or the grace period cannot work,
NetworkEstimate only when the measured network decides how long a step takes, or when training cannot use the devices of
its network profile; False is a warning and stops nothing.
"""

from collections.abc import Mapping, Sequence
from datetime import datetime
from types import MappingProxyType

from internvl_api.memory.advice import advice
from internvl_api.memory.answering import evaluation_note
from internvl_api.memory.estimate import Verdict, estimate
from internvl_api.memory.pod_settings import PodSettings
from internvl_api.memory.shortfall import shortfalls
from internvl_api.memory.step_time import network_warning
from internvl_api.status import Condition, ConditionType, InternVLFineTuneStatus, Phase

from internvl_operator.core.measured_storage import storage_rate
from internvl_operator.core.network_profiles import NetworkProfile
from internvl_operator.core.network_use import unused_devices
from internvl_operator.core.policies.oom_policy import attempt_config
from internvl_operator.core.run import Run
from internvl_operator.core.telemetry import printable
from internvl_operator.core.timestamps import to_text

# Which conditions a phase makes True; the others are False.
_TRUE: dict[Phase, tuple[ConditionType, ...]] = {
    "Pending": ("Reconciling",),
    "Running": ("Reconciling",),
    "Suspended": ("Suspended",),
    "Stalled": ("Stalled",),
    "Succeeded": ("Ready", "Complete"),
    "Failed": ("Stalled", "Failed"),
}
# Reason and message of a False condition; Ready=False instead repeats the reason of the phase.
_FALSE: dict[ConditionType, tuple[str, str]] = {
    "Reconciling": ("Idle", "no work is in progress"),
    "Stalled": ("NotStalled", "nothing waits for the user"),
    "Suspended": ("NotSuspended", "spec.runPolicy.suspend is false"),
    "Complete": ("NotComplete", "nothing is published yet"),
    "Failed": ("NotFailed", "the run may still succeed"),
}
_ORDER: tuple[ConditionType, ...] = ("Ready", *_FALSE)
ESTIMATES: tuple[ConditionType, ...] = ("MemoryEstimate", "ResourceEstimate", "NetworkEstimate")
_SHOWN: tuple[ConditionType, ...] = (*_ORDER, *ESTIMATES)
_CHANGED = "; the spec changed after publishing"
_NO_EFFECT = (
    f"{_CHANGED} and has no effect, because the run is complete: to train again, create a new InternVLFineTune with "
    "another name and another spec.output"
)
_MESSAGE_LIMIT = 4096  # characters; the API allows 32768, but people read a status
_MEMORY_REASONS: dict[Verdict, str] = {"fits": "Fits", "tight": "Tight", "does not fit": "DoesNotFit"}


def summarise(
    previous: Sequence[Condition], phase: Phase, reason: str, message: str, generation: int, now: datetime
) -> list[Condition]:
    """All six conditions of a phase, each with the time of its last transition; other conditions are kept."""
    out = list(previous)
    for kind in _ORDER:
        true = kind in _TRUE[phase]
        words = _FALSE[kind] if kind in _FALSE and not true else (reason, printable(message[:_MESSAGE_LIMIT]))
        out = set_condition(
            out,
            Condition(
                type=kind,
                status="True" if true else "False",
                reason=words[0],
                message=words[1],
                last_transition_time=to_text(now),
                observed_generation=generation,
            ),
        )
    return sorted(out, key=lambda condition: _SHOWN.index(condition.type))


def with_note_of_change(conditions: Sequence[Condition], *, changed: bool) -> list[Condition]:
    """The conditions of a complete run; Ready's message ends with a note while the spec differs from the published one.

    Replaces the note of an earlier operator, which begins with the same words.
    """
    out = [condition.model_copy() for condition in conditions]
    for ready in out:
        if ready.type == "Ready":
            ready.message = ready.message.partition(_CHANGED)[0] + (_NO_EFFECT if changed else "")
    return out


def note_of_change(conditions: Sequence[Condition]) -> str:
    """Ready's message when it has the note about a changed spec; else empty."""
    ready = next((condition.message for condition in conditions if condition.type == "Ready"), "")
    return ready if _CHANGED in ready else ""


def set_condition(conditions: Sequence[Condition], new: Condition) -> list[Condition]:
    """`conditions` with `new` replacing its type; lastTransitionTime is kept unless the status changes."""
    out = []
    for old in conditions:
        if old.type != new.type:
            out.append(old)
        elif old.status == new.status:
            new = new.model_copy(update={"last_transition_time": old.last_transition_time})
    return [*out, new]


def for_generation(conditions: Sequence[Condition], generation: int) -> list[Condition]:
    """The conditions with `observedGeneration` set to the generation of the spec they describe."""
    return [condition.model_copy(update={"observed_generation": generation}) for condition in conditions]


def is_true(conditions: Sequence[Condition], kind: ConditionType) -> bool:
    """Whether the condition is present and True."""
    return any(condition.type == kind and condition.status == "True" for condition in conditions)


def with_estimates(
    conditions: Sequence[Condition],
    run: Run,
    gpu_memory: int | None,
    now: datetime,
    status: InternVLFineTuneStatus | None = None,
    profiles: Mapping[str, NetworkProfile] = MappingProxyType({}),
    settings: PodSettings = PodSettings(),  # noqa: B008 - immutable
) -> Sequence[Condition]:
    """`conditions` with fresh estimates, and without one where there is nothing to say.

    They warn before the first pod starts and never stop a run, as estimates may be wrong.
    GPUs of unknown memory and invalid specs have no estimates; runs on CPUs and models outside the catalogue have only
    those that need no figures of a model, such as shmSize beside a limit of memory.

    Args:
        gpu_memory: bytes of one GPU; None when unknown.
        status: has the measured bandwidths; None for a run without one.
        profiles: the administrator's network profiles.
        settings: what pods get where the spec says nothing.
    """
    kept = [condition for condition in conditions if condition.type not in ESTIMATES]
    known = [condition for condition in conditions if condition.type in ESTIMATES]
    found = (
        _memory_estimate(run, gpu_memory, now),
        _resource_estimate(run, status, settings, now),
        _network_use(run, profiles, now) or _network_estimate(run, status, now),
    )
    return kept + [set_condition(known, new)[-1] for new in found if new is not None]


def _resource_estimate(
    run: Run, status: InternVLFineTuneStatus | None, settings: PodSettings, now: datetime
) -> Condition | None:
    spec, run_config = run.resolved.spec, run.resolved.run_config
    if spec is None or run_config is None:
        return None
    found = shortfalls(spec, run_config, storage_rate(status), settings)
    return _estimate("ResourceEstimate", "ResourcesDoNotFit", "; ".join(found), run, now) if found else None


def _network_use(run: Run, profiles: Mapping[str, NetworkProfile], now: datetime) -> Condition | None:
    spec = run.resolved.spec
    message = unused_devices(spec, run.wanted_workers or spec.workers, profiles) if spec is not None else None
    return _estimate("NetworkEstimate", "NetworkUnused", message, run, now) if message else None


def _network_estimate(run: Run, status: InternVLFineTuneStatus | None, now: datetime) -> Condition | None:
    run_config = run.resolved.run_config
    found = status.progress.bandwidth if status and status.progress else None
    if run_config is None or status is None or found is None or found.all_reduce is None:
        return None
    message = network_warning(attempt_config(run_config, status), found.all_reduce)
    return _estimate("NetworkEstimate", "NetworkBound", message, run, now) if message else None


def _estimate(
    kind: ConditionType, reason: str, message: str, run: Run, now: datetime, *, fits: bool = False
) -> Condition:
    return Condition(
        type=kind,
        status="True" if fits else "False",
        reason=reason,
        message=message,
        last_transition_time=to_text(now),
        observed_generation=run.generation,
    )


def _memory_estimate(run: Run, gpu_memory: int | None, now: datetime) -> Condition | None:
    run_config = run.resolved.run_config
    if gpu_memory is None or run_config is None or run_config.device != "cuda":
        return None
    found = estimate(run_config, gpu_memory)
    if found is None:
        return None
    message = " ".join(filter(None, (advice(found), evaluation_note(run_config, gpu_memory))))
    fits = found.verdict != "does not fit"
    return _estimate("MemoryEstimate", _MEMORY_REASONS[found.verdict], message, run, now, fits=fits)
