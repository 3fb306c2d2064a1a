"""The answers of the policies, as data: `Outcome` ends an attempt, `Decision` may also wait, probe and record."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from internvl_operator.core.observe import Pod

# "change" is a retry with a smaller micro batch, where the policy allows it (else it becomes a failure).
Kind = Literal["succeeded", "resume", "retry", "change", "stall", "fail"]
Budget = Literal["user", "infrastructure", "none"]
RESUME = "Resume"  # reason of a worker that saved its state and left, for no stated reason


@dataclass(frozen=True)
class Outcome:
    """How a group ended; `budget`: which restart budget it counts against.

    `secondary`: probably a secondary failure; wait for the root cause. `at_once`: the next attempt starts without a
    pause, however many have failed.
    """

    kind: Kind
    reason: str
    message: str
    budget: Budget = "none"
    secondary: bool = False
    at_once: bool = False

    @property
    def may_have_another_cause(self) -> bool:
        """Whether peers that have not ended yet may still show a better cause."""
        return self.secondary or self.reason == RESUME or (self.kind, self.budget) == ("retry", "user")


@dataclass(frozen=True)
class Decision:
    """What to do with the current attempt. Policies only return it; `reconcile` applies it.

    `outcome`: end the attempt. `wait`: look again after so many seconds. `probe`: ask every process of these pods for
    its progress. `record`: fields of status and their new values.
    """

    outcome: Outcome | None = None
    wait: float | None = None
    probe: tuple[Pod, ...] = ()
    record: Mapping[str, object] = field(default_factory=dict)

    def __or__(self, other: "Decision") -> "Decision":
        """Both decisions as one; an outcome of the first wins, and the sooner wait."""
        waits = [wait for wait in (self.wait, other.wait) if wait is not None]
        return Decision(
            outcome=self.outcome or other.outcome,
            wait=min(waits, default=None),
            probe=self.probe or other.probe,
            record={**self.record, **other.record},
        )
