"""Conditions: the six of a phase, as kstatus (and with it Argo CD and Flux) reads them, and one about memory.

Ready=True only when the result is published; Reconciling=True while work goes on by itself; Stalled=True when it does
not, whether the user may still mend it or the run has failed. Reconciling and Stalled are never True together.
MemoryEstimate is there only where GPU memory is known; False warns, and stops nothing.
"""

from collections.abc import Sequence
from datetime import datetime

from internvl_api.status import Condition, ConditionType, Phase

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
# What a False condition says, always the same, save Ready, which says what everyone waits for.
_FALSE: dict[ConditionType, tuple[str, str]] = {
    "Reconciling": ("Idle", "nothing is under way"),
    "Stalled": ("NotStalled", "nothing waits for the user"),
    "Suspended": ("NotSuspended", "spec.runPolicy.suspend is false"),
    "Complete": ("NotComplete", "nothing is published yet"),
    "Failed": ("NotFailed", "the run may still succeed"),
}
_ORDER: tuple[ConditionType, ...] = ("Ready", *_FALSE)
_SHOWN: tuple[ConditionType, ...] = (*_ORDER, "MemoryEstimate")
_MESSAGE_LIMIT = 4096  # the API would take 32768; a status is read by people


def summarise(
    previous: Sequence[Condition], phase: Phase, reason: str, message: str, generation: int, now: datetime
) -> list[Condition]:
    """All six conditions of a phase, each with the time it last changed its status; others stay as they were."""
    out = list(previous)
    for kind in _ORDER:
        true = kind in _TRUE[phase]
        words = _FALSE[kind] if kind in _FALSE and not true else (reason, message[:_MESSAGE_LIMIT])
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


def with_note_on_ready(conditions: Sequence[Condition], note: str, *, noted: bool) -> list[Condition]:
    """The conditions with `note` at the end of Ready's message, or without it."""
    out = [condition.model_copy() for condition in conditions]
    for ready in out:
        if ready.type == "Ready":
            ready.message = ready.message.removesuffix(note) + (note if noted else "")
    return out


def set_condition(conditions: Sequence[Condition], new: Condition) -> list[Condition]:
    """`conditions` with `new` in place of its type; lastTransitionTime stays unless the status changes."""
    out = []
    for old in conditions:
        if old.type != new.type:
            out.append(old)
        elif old.status == new.status:
            new = new.model_copy(update={"last_transition_time": old.last_transition_time})
    return [*out, new]


def for_generation(conditions: Sequence[Condition], generation: int) -> list[Condition]:
    """The conditions with `observedGeneration` set to the generation of the spec that they answer."""
    return [condition.model_copy(update={"observed_generation": generation}) for condition in conditions]


def is_true(conditions: Sequence[Condition], kind: ConditionType) -> bool:
    """Whether the condition is there and True."""
    return any(condition.type == kind and condition.status == "True" for condition in conditions)
