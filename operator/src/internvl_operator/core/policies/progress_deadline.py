"""Training that runs and gets no further: noticed by its heartbeats, and blamed on the process that lags.

Time is counted from the first sign of life of an attempt: where the operator cannot reach the pods, it sees none, and
nothing is taken for a hang. Before an attempt is ended all its processes are asked, so that a restarted operator does
not judge by what it knew before, and the lagging one can be named.
"""

from collections.abc import Sequence
from datetime import timedelta

from internvl_api.status import Progress, StepPhase

from internvl_operator.core.context import Draft
from internvl_operator.core.observe import ProcessState, RollCall
from internvl_operator.core.policies.failure_policy import Outcome
from internvl_operator.core.stages import Stage
from internvl_operator.core.timestamps import from_text, to_text

_ASK_AGAIN = 30.0  # seconds, where no answer came back at all: the operator was busy, or has just started
_ORDER: dict[StepPhase, int] = {"data": 0, "meeting": 1, "computing": 2}
_WORDS: dict[StepPhase, str] = {
    "data": "still waits for its data",
    "meeting": "waits for the others",
    "computing": "computes, or waits in a collective",
}


def overdue(draft: Draft, stage: Stage) -> Outcome | None:
    """The end of an attempt that has got no further for progressDeadlineSeconds; None while it may."""
    limit, since = draft.run.spec.run_policy.progress_deadline_seconds, from_text(draft.status.progress_at)
    if limit is None or since is None or stage.name != "train" or draft.entry(stage).state != "Running":
        return None
    left = limit - (draft.now - since).total_seconds()
    if left > 0:
        draft.wait(left)
        return None
    call = draft.observed.roll_call
    running = tuple(pod for pod in draft.members if pod.running)
    asked = call is not None and call.pod_uids == {pod.uid for pod in running}
    if call is None or not asked or call.asked_at < since + timedelta(seconds=limit):
        draft.roll_call = running
        draft.wait(_ASK_AGAIN)
        return None
    if _got_further(call, draft.status.progress or Progress()):
        draft.status.progress_at = to_text(call.asked_at)
        draft.wait(limit)
        return None
    text = f"no progress since {draft.status.progress_at} (spec.runPolicy.progressDeadlineSeconds: {limit}): "
    return Outcome("retry", "ProgressStalled", text + slowest(call.states), "infrastructure")


def slowest(states: Sequence[ProcessState]) -> str:
    """Who holds up the others, in words: those that do not answer, else who is furthest behind in the step.

    >>> slowest([ProcessState(0, 0, Progress(step=41)), ProcessState(1, 0)])
    'worker 1 does not answer; the others answer, at step 41'
    """
    several = any(state.local_rank for state in states)
    silent = [_name(state, several) for state in states if state.progress is None]
    answers = [state for state in states if state.progress is not None]
    if not answers:
        return "no worker answers"
    if silent:
        more = f" and {len(silent) - 3} more" if len(silent) > 3 else ""
        verb = "does" if len(silent) == 1 else "do"
        return f"{', '.join(silent[:3])}{more} {verb} not answer; the others answer, at step {_step(answers[0])}"
    last = min(answers, key=_position)
    if _position(last) == _position(max(answers, key=_position)):
        return f"all workers answer, at step {_step(last)}: {_doing(last)}"
    return f"{_name(last, several)} lags, at step {_step(last)}: {_doing(last)}; the others wait for it"


def _got_further(call: RollCall, known: Progress) -> bool:
    said = call.states[0].progress if call.states else None
    return said is not None and (said.step, said.detail) != (known.step, known.detail)


def _position(state: ProcessState) -> tuple[int, int]:
    return _step(state), _ORDER[state.heartbeat.phase] if state.heartbeat else -1


def _step(state: ProcessState) -> int:
    return (state.progress.step or 0) if state.progress else 0


def _doing(state: ProcessState) -> str:
    if state.heartbeat:
        return f"it {_WORDS[state.heartbeat.phase]} since {state.heartbeat.idle_seconds:.0f} s"
    return (state.progress.detail if state.progress else None) or "it has not begun"


def _name(state: ProcessState, several: bool) -> str:
    return f"process {state.local_rank} of worker {state.worker}" if several else f"worker {state.worker}"
