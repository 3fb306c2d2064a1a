"""End training that makes no progress, and name the process that lags.

Time is counted from the first sign of life of an attempt: where the operator cannot reach the pods, it sees none, and
nothing is taken for a hang. Before an attempt is ended all its processes are asked, so that a restarted operator does
not judge by what it knew before, and the lagging one can be named.
"""

from collections.abc import Sequence
from datetime import timedelta

from internvl_api.status import Progress, StepPhase

from internvl_operator.core.context import ReconcileContext
from internvl_operator.core.observe import ProcessState, RankAnswers
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


def exceeded(context: ReconcileContext, stage: Stage) -> Outcome | None:
    """The outcome of an attempt without progress for progressDeadlineSeconds; None while there is time."""
    limit, since = context.run.spec.run_policy.progress_deadline_seconds, from_text(context.status.progress_at)
    if limit is None or since is None or stage.name != "train" or context.entry(stage).state != "Running":
        return None
    left = limit - (context.now - since).total_seconds()
    if left > 0:
        context.wait(left)
        return None
    call = context.observed.rank_answers
    running = tuple(pod for pod in context.workers if pod.running)
    asked = call is not None and call.pod_uids == {pod.uid for pod in running}
    if call is None or not asked or call.asked_at < since + timedelta(seconds=limit):
        context.probe = running
        context.wait(_ASK_AGAIN)
        return None
    if _got_further(call, context.status.progress or Progress()):
        context.status.progress_at = to_text(call.asked_at)
        context.wait(limit)
        return None
    text = f"no progress since {context.status.progress_at} (spec.runPolicy.progressDeadlineSeconds: {limit}): "
    return Outcome("retry", "ProgressStalled", text + slowest(call.states), "infrastructure")


def slowest(states: Sequence[ProcessState]) -> str:
    """Which workers hold up the others: those that do not answer, else the one furthest behind in the step.

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


def _got_further(call: RankAnswers, known: Progress) -> bool:
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
