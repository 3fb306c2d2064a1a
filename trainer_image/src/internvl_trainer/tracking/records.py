"""What a stage tells its reporting process: lines of JSON, and the settings that come first."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

from internvl_api.run_config import RunConfig
from internvl_api.spec import Tracking
from internvl_api.types import ApiModel

MOST_PARAMETERS = 200
_LONGEST_VALUE = 250  # characters; servers of MLflow 1 take no more
_NAME = re.compile(r"[^A-Za-z0-9_./ -]")
_SECTIONS = ("recipe", "method", "model", "image", "lora", "training", "retrieval", "workers", "processesPerWorker",
             "gradientAccumulation", "device", "data", "output")  # fmt: skip

Status = Literal["finished", "failed", "unfinished"]
"""How a stage leaves the tracked run: `unfinished` is continued by a later stage or attempt."""


class Metrics(NamedTuple):
    """Figures after a step; `at`: milliseconds since 1970."""

    step: int
    at: int
    values: dict[str, float]


class Settings(ApiModel):
    """What the reporting process needs to find or make the tracked run.

    `id` is the run's own, the same in all its stages and attempts; `folder` is where the client may write.
    """

    tracking: Tracking
    experiment: str
    run_name: str
    id: str
    folder: str

    @classmethod
    def of(cls, config: RunConfig, tracking: Tracking, tracked_id: str, folder: str) -> Settings:
        """The names default to those of the run: its namespace, and its own."""
        namespace, _, name = config.job.rpartition("/")
        return cls(
            tracking=tracking,
            experiment=tracking.experiment or namespace or "internvl",
            run_name=tracking.run_name or name,
            id=tracked_id,
            folder=folder,
        )


def finite(values: Mapping[str, float | None]) -> dict[str, float]:
    """The figures that trackers take, under names that they take."""
    pairs = ((_NAME.sub("_", name)[:200], value) for name, value in values.items())
    return {name: float(value) for name, value in pairs if value is not None and math.isfinite(value)}


def parameters(config: RunConfig) -> dict[str, str]:
    """Dotted name -> value of the settings that decide a result; addresses without their secret parts."""
    document = config.to_dict()
    if config.method != "lora":
        document.pop("lora", None)
    found: dict[str, str] = {}
    for section in _SECTIONS:
        if section in document:
            _flatten(section, document[section], found)
    return dict(list(found.items())[:MOST_PARAMETERS])


def _flatten(name: str, value: Any, found: dict[str, str]) -> None:
    if isinstance(value, dict):
        for key, part in value.items():
            _flatten(f"{name}.{key}", part, found)
    else:
        text = value if isinstance(value, str) else str(value).lower() if isinstance(value, bool) else str(value)
        found[_NAME.sub("_", name)[:200]] = text[:_LONGEST_VALUE]
