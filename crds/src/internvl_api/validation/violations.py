"""The one type of finding that refuses a spec, and the exception that carries such findings."""

from typing import NamedTuple


class Violation(NamedTuple):
    """One reason to refuse a spec.

    Attributes:
        field: path of the field to edit, such as `spec.training.maxSteps`.
        message: what is found, what is expected, and the next step.
        reason: the Stalled condition's reason.
    """

    field: str
    message: str
    reason: str = "InvalidSpec"


class SpecError(ValueError):
    """The spec cannot run. `field`, `message` and `reason` are those of the first violation."""

    def __init__(self, first: Violation, *others: Violation) -> None:
        more = f" (and {len(others)} more)" if others else ""
        self.violations = (first, *others)
        self.reason, self.field, self.message = first.reason, first.field, first.message + more
        super().__init__(f"{self.field}: {self.message}")
