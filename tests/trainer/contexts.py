"""Contexts of a stage over a run's own output, and a group of one process."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import torch
from internvl_api.run_config import RunConfig
from internvl_api.status import StageName
from internvl_trainer.artifacts.storage import open_storage
from internvl_trainer.distributed import Group
from internvl_trainer.metrics import Reporter
from internvl_trainer.run_context import GroupContext, RunContext, open_context
from internvl_trainer.stage_store import StageStore


class Alone(Group):
    """All ranks of a run of one process, without a connection."""

    def __init__(self) -> None:
        super().__init__(0, 1, 0, torch.device("cpu"), None)

    def sum(self, values: Sequence[float]) -> list[float]:
        return list(values)

    def gather(self, value: Any) -> list[Any]:
        return [json.loads(json.dumps(value))]


def context_of(config: RunConfig, stage: StageName, reporter: Reporter | None = None) -> RunContext:
    """The stage's context over spec.output."""
    return open_context(stage, config, reporter or Reporter(config.job, stage))


def group_context(config: RunConfig, stage: StageName, group: Group, reporter: Reporter | None = None) -> GroupContext:
    """The same with the other ranks."""
    context = context_of(config, stage, reporter)
    return GroupContext(stage, config, context.storage, context.reporter, group)


def store_of(config: RunConfig) -> StageStore:
    """What the run's stages keep under spec.output."""
    return StageStore(config, open_storage(config.output, field="spec.output"))
