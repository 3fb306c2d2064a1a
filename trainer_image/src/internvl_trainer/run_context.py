"""What every stage of a run works with: its configuration, its storage, its reporter, and its group of ranks."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from internvl_api.constants import WAITING_FOR_OTHERS
from internvl_api.run_config import RunConfig
from internvl_api.status import StageName, StageResult

from internvl_trainer.artifacts.cache import ENV_NAMESPACE
from internvl_trainer.artifacts.checked_connection import permit_private_addresses
from internvl_trainer.artifacts.storage import Storage, open_storage
from internvl_trainer.data.checkpoint_tiling import follow_checkpoint
from internvl_trainer.distributed import Group, Rendezvous, join_group
from internvl_trainer.errors import AccessDenied, Unavailable, UserError
from internvl_trainer.metrics import Reporter
from internvl_trainer.stage_store import StageStore
from internvl_trainer.tracking.tracker import Tracker

_READING_ROWS = ("preflight", "baseline-evaluate", "train")
_ERRORS: dict[str, type[UserError]] = {each.__name__: each for each in (UserError, AccessDenied, Unavailable)}


@dataclass(frozen=True)
class RunContext:
    """One stage of a run in this process.

    Attributes:
        storage: rooted at spec.output. Where this process holds the output's lease, it writes only while it does.
        epoch: of that lease; None in a process without it.
        tracker: takes reports for spec.tracking.
    """

    stage: StageName
    config: RunConfig
    storage: Storage
    reporter: Reporter
    epoch: int | None = field(default=None, kw_only=True)
    tracker: Tracker = field(default_factory=Tracker, kw_only=True)

    @cached_property
    def stages(self) -> StageStore:
        """What the run's stages keep in storage."""
        return StageStore(self.config, self.storage)

    def begin(self) -> StageResult | None:
        """The earlier result if the stage is done, else None. Raises UserError when it must not run in this output."""
        self.stages.check_output(reads_rows=self.stage in _READING_ROWS)
        result = self.stages.result(self.stage)
        if result is None and self.stage == "train":
            self.stages.check_preflight_inputs()
        return result

    def join_group(self) -> GroupContext:
        """The same stage together with the other ranks. Raises Unavailable when they do not come in time.

        Rank 0 looks up the versions of the annotation files for all.
        """
        rendezvous = Rendezvous.from_environment(os.environ)
        self.reporter.doing(WAITING_FOR_OTHERS if rendezvous.world_size > 1 else "preparing the processor or GPU")
        group = join_group(rendezvous, self.config.device)
        self.stages.use_inputs(group.first(self.stages.inputs if group.leads else None))
        return GroupContext(
            self.stage,
            self.config,
            self.storage,
            self.reporter,
            group,
            self.stages,
            epoch=self.epoch,
            tracker=self.tracker,
        )


@dataclass(frozen=True)
class GroupContext(RunContext):
    """A stage that all ranks of `group` work on together.

    Attributes:
        joined: what the stages keep in storage, with the inputs that rank 0 found.
    """

    group: Group
    joined: StageStore | None = None

    @cached_property
    def stages(self) -> StageStore:
        """What the run's stages keep in storage."""
        return self.joined or StageStore(self.config, self.storage)

    def begin(self) -> StageResult | None:
        """The result or the error of `RunContext.begin` on rank 0, on every rank."""
        found = self.group.first(self._try_to_begin() if self.group.leads else None)
        if found["error"] is not None:
            kind, reason, message, where = found["error"]
            raise _ERRORS.get(kind, UserError)(reason, message, where)
        return None if found["result"] is None else StageResult.model_validate(found["result"])

    def _try_to_begin(self) -> dict[str, Any]:
        """The earlier result and the error, as JSON."""
        try:
            result = super().begin()
        except UserError as error:
            return {"result": None, "error": [type(error).__name__, error.reason, error.message, error.where]}
        return {"result": result.to_dict() if result else None, "error": None}


def open_context(stage: StageName, config: RunConfig, reporter: Reporter) -> RunContext:
    """The context of a stage. Raises UserError when spec.output or the model's config.json cannot be read."""
    os.environ[ENV_NAMESPACE] = config.job.rpartition("/")[0]
    if config.allow_private_addresses is not None:
        permit_private_addresses(config.allow_private_addresses)
    storage = open_storage(config.output, field="spec.output")
    return RunContext(stage, follow_checkpoint(config, storage), storage, reporter)
