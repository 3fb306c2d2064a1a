"""What a pass decides, as data. The applier carries it out in this order: children, status, deletions; then events."""

from dataclasses import dataclass
from typing import Any, Literal

from internvl_api.status import InternVLFineTuneStatus

from internvl_operator.core.observe import Pod


@dataclass(frozen=True)
class Ref:
    """An object to delete while it still has this uid. `force`: without a grace period; `grace`: seconds."""

    kind: Literal["Pod", "InternVLFineTune"]
    name: str
    uid: str
    force: bool = False
    grace: int | None = None


@dataclass(frozen=True)
class Event:
    """A Kubernetes Event; sent only when a status changes."""

    kind: Literal["Normal", "Warning"]
    reason: str
    message: str


@dataclass(frozen=True)
class Plan:
    """What to write and when to look again. `status`: None when there is none to write; `requeue_after`: seconds.

    `delete_anyway`: delete even when the API server refuses the status, because the user asked to free the pods: by
    suspend, or by a deadline that has passed. The next pass comes to the same decision without the recorded status.
    `probe`: ask every process of these pods for its progress, and make another pass with the answers.
    `suspects`: watch these pods and their nodes, and make another pass when one has been silent for long.
    """

    apply: tuple[dict[str, Any], ...] = ()
    delete: tuple[Ref, ...] = ()
    delete_anyway: bool = False
    status: InternVLFineTuneStatus | None = None
    requeue_after: float | None = None
    events: tuple[Event, ...] = ()
    probe: tuple[Pod, ...] = ()
    suspects: tuple[Pod, ...] = ()
