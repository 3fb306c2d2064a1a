"""End training that makes no progress, and name the process that lags.

Without progressDeadlineSeconds the deadline follows from what the trainer says it is doing. For steps it counts in the
run's own steps. For moving the model or a checkpoint it counts their bytes. There is none for work whose time depends
on the data and that reports nothing meanwhile, such as validation, nor for waits with limits of their own.

The deadline counts from an attempt's first progress report: an operator that cannot reach the pods gets none and never
reports a hang. All processes are probed before an attempt ends, so that a restarted operator decides on fresh answers
and can name the lagging process.
"""

from collections.abc import Sequence
from typing import NamedTuple

from internvl_api.constants import DOWNLOADING, MOVING_WEIGHTS, SETUP_ORDER, TAKING_STEPS
from internvl_api.memory.moving_time import moving_limit
from internvl_api.run_config import RunConfig
from internvl_api.status import Progress, StepPhase

from internvl_operator.core.context import ReconcileContext
from internvl_operator.core.observe import ProcessState, RankAnswers
from internvl_operator.core.policies.outcome import Decision, Outcome
from internvl_operator.core.stages import Stage
from internvl_operator.core.telemetry import clean_text
from internvl_operator.core.timestamps import from_text, to_text

_STEPS = 20  # mean steps without progress, after which training counts as hung
_SHORTEST_SECONDS = 1800.0  # steps differ, and a stalled storage may come back
_LONGEST_STEP_SECONDS = 86_400.0  # whatever a pod reports
_FIRST_STEP_SECONDS = 7200.0  # kernels are compiled and caches are cold
_FIELD = "spec.runPolicy.progressDeadlineSeconds"
_SHOWN = 120  # characters of what training says it does
_PROBE_AGAIN = 30.0  # seconds until the next probe when no answer came back
_ORDER: dict[StepPhase, int] = {"data": 0, "meeting": 1, "computing": 2}
_WORDS: dict[StepPhase, str] = {
    "data": "has waited for its data",
    "meeting": "has waited for the others",
    "computing": "has computed or waited in a collective",
}


class Limit(NamedTuple):
    """Seconds without progress after which training ends, and the origin of this figure, for messages."""

    seconds: float
    origin: str


def limit_of(given: int | None, progress: Progress | None, config: RunConfig | None = None) -> Limit | None:
    """The deadline of a run: what the spec says, else what its steps, or the bytes that it moves, allow.

    None when the spec gives none and training does something whose time is unknown, or has not reported yet.

    Args:
        config: says how many bytes there are to move; None when unknown.
    """
    if given is not None:
        return Limit(given, f"{_FIELD}: {given}")
    found = _default_of(progress, config) if progress is not None else None
    return found and Limit(found.seconds, f"{found.origin}; {_FIELD} sets another limit")


def _default_of(progress: Progress, config: RunConfig | None) -> Limit | None:
    """The limit for what training says it is doing; None for work whose time is unknown."""
    detail = progress.detail or ""
    if detail == TAKING_STEPS:
        return _of_steps(progress)
    if config is None or not detail.startswith(MOVING_WEIGHTS):
        return None
    found = moving_limit(config, progress.bandwidth)
    return found and Limit(found[0], f"default while it moves weights: {found[1]}")


def _of_steps(progress: Progress) -> Limit:
    left = (progress.total_steps or 0) - (progress.step or 0)
    if progress.eta_seconds is None or left < 1:
        return Limit(_FIRST_STEP_SECONDS, f"default for the first step of an attempt: {_FIRST_STEP_SECONDS:.0f} s")
    step = min(_LONGEST_STEP_SECONDS, max(0.0, progress.eta_seconds / left))
    seconds = max(_SHORTEST_SECONDS, _STEPS * step)
    return Limit(seconds, f"default: {_STEPS} steps of {step:.1f} s, at least {_SHORTEST_SECONDS:.0f} s")


def decide(context: ReconcileContext, stage: Stage) -> Decision:
    """End training without progress for the deadline's seconds, after its processes were probed."""
    given, since = context.run.spec.run_policy.progress_deadline_seconds, from_text(context.status.progress_at)
    found = limit_of(given, context.status.progress, context.run.resolved.run_config)
    if found is None or since is None or stage.name != "train" or context.entry(stage).state != "Running":
        return Decision()
    limit, origin = found
    left = limit - (context.now - since).total_seconds()
    if left > 0:
        return Decision(wait=left)
    answers = context.observed.rank_answers
    running = tuple(pod for pod in context.workers if pod.running)
    current = answers is not None and answers.pod_uids == {pod.uid for pod in running}
    if answers is None or not current or (answers.asked_at - since).total_seconds() < limit:
        return Decision(probe=running, wait=_PROBE_AGAIN)
    if _has_advanced(answers, context.status.progress or Progress()) or (
        given is None and _waits_for_download(answers)
    ):
        return Decision(wait=limit, record={"progress_at": to_text(answers.asked_at)})
    during = _during(context.status.progress)
    text = f"no progress since {context.status.progress_at}{during} ({origin}): "
    return Decision(Outcome("retry", "ProgressStalled", text + slowest(answers.states), "infrastructure"))


def slowest(states: Sequence[ProcessState]) -> str:
    """Which workers hold up the others: the silent ones, else the one furthest behind in the step.

    >>> slowest([ProcessState(0, 0, Progress(step=41)), ProcessState(1, 0)])
    'worker 1 does not answer; the others answer at step 41'
    """
    several = any(state.local_rank for state in states)
    silent = [_name(state, several) for state in states if state.progress is None]
    answers = [state for state in states if state.progress is not None]
    if not answers:
        return "no worker answers"
    if silent:
        more = f" and {len(silent) - 3} more" if len(silent) > 3 else ""
        verb = "does" if len(silent) == 1 else "do"
        return f"{', '.join(silent[:3])}{more} {verb} not answer; the others answer at step {_step(answers[0])}"
    last = min(answers, key=_position)
    if _position(last) == _position(max(answers, key=_position)):
        return f"all workers answer at step {_step(last)}: {_doing(last)}"
    return f"{_name(last, several)} lags at step {_step(last)}: {_doing(last)}; the others wait for it"


def _has_advanced(answers: RankAnswers, known: Progress) -> bool:
    newest = answers.states[0].progress if answers.states else None
    return newest is not None and (newest.step, newest.detail) != (known.step, known.detail)


def _waits_for_download(answers: RankAnswers) -> bool:
    """Whether the first process waits for another one's download, which ends by itself when its source is silent."""
    answering = [state.progress for state in answers.states if state.progress is not None]
    downloads = [(progress.detail or "").startswith(DOWNLOADING) for progress in answering]
    return len(answering) == len(answers.states) and any(downloads) and not downloads[0]


def _during(progress: Progress | None) -> str:
    """What training was doing when it last reported, for messages; empty while it takes steps."""
    text = " ".join(clean_text(progress.detail if progress else None, _SHOWN).split())
    return f" in '{text}'" if text and text != TAKING_STEPS else ""


def _position(state: ProcessState) -> tuple[int, int]:
    """How far a process is: its step, then its place in the step, or in the setup before the first one."""
    if state.heartbeat:
        return _step(state), _ORDER[state.heartbeat.phase]
    detail = (state.progress.detail if state.progress else None) or ""
    places = [place for place, word in enumerate(SETUP_ORDER) if detail.startswith(word)]  # "starting" starts two
    return _step(state), max(places, default=len(SETUP_ORDER)) - len(SETUP_ORDER) - 1


def _step(state: ProcessState) -> int:
    return (state.progress.step or 0) if state.progress else 0


def _doing(state: ProcessState) -> str:
    if state.heartbeat:
        return f"it {_WORDS[state.heartbeat.phase]} for {state.heartbeat.idle_seconds:.0f} s"
    return (state.progress.detail if state.progress else None) or "it has not started"


def _name(state: ProcessState, several: bool) -> str:
    return f"process {state.local_rank} of worker {state.worker}" if several else f"worker {state.worker}"
