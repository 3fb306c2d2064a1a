"""GPU-hours of a run, and what they cost at the administrator's prices."""

from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Annotated

from internvl_api.constants import GPU_RESOURCE_PATTERN
from internvl_api.spec import InternVLFineTuneSpec
from internvl_api.status import StageStatus, Usage
from internvl_api.types import ApiModel
from pydantic import ConfigDict, Field

from internvl_operator.core.attempt_history import gpu_seconds

_NEVER = datetime.min.replace(tzinfo=UTC)  # an end that cannot be read counts nothing

Resource = Annotated[str, Field(pattern=GPU_RESOURCE_PATTERN, max_length=317)]
Price = Annotated[float, Field(ge=0, le=1e6, allow_inf_nan=False)]


class Prices(ApiModel):
    """What a GPU costs for an hour."""

    model_config = ConfigDict(frozen=True)

    currency: str = Field("", max_length=8, pattern=r"^[A-Za-z€$£¥]*$", description="Such as EUR; shown beside a cost")
    per_gpu_hour: dict[Resource, Price] = Field(
        default_factory=dict, max_length=100, description="Price by resource, such as {nvidia.com/gpu: 2.5}"
    )

    def of(self, spec: InternVLFineTuneSpec | None, gpu_resource: str) -> float | None:
        """The price of the run's GPUs; None where there is none. `gpu_resource`: the operator's default."""
        chosen = spec.pod_template.gpu_resource if spec else None
        if spec and spec.pod_template.gpu_claim_template:  # only the template says which GPUs
            return None
        return self.per_gpu_hour.get(chosen or gpu_resource)


def used(entries: Iterable[StageStatus], price: float | None, currency: str, now: datetime | None) -> Usage | None:
    """GPU-hours of the attempts that have ended and, with `now`, of those that last; None without any.

    The hours change only when an attempt ends, so that they cause no write of status by themselves.
    """
    seconds = 0.0
    for entry in entries:
        seconds += entry.earlier_gpu_seconds or 0
        for attempt in entry.attempts or ():
            if attempt.finished_at is not None or now is not None:
                seconds += gpu_seconds(attempt, now or _NEVER)
    if not seconds:
        return None
    hours = round(seconds / 3600, 3)
    cost = None if price is None else round(hours * price, 2)
    return Usage(gpu_hours=hours, cost=cost, currency=currency or None if cost is not None else None)
