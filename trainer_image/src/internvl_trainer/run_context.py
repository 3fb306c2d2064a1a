"""What every stage of a run works with: its configuration, its storage, its reporter, and its group of ranks."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cached_property

from internvl_api.run_config import RunConfig
from internvl_api.status import StageName

from internvl_trainer.artifacts.cache import ENV_NAMESPACE
from internvl_trainer.artifacts.checked_connection import permit_private_addresses
from internvl_trainer.artifacts.storage import Storage, open_storage
from internvl_trainer.data.checkpoint_tiling import follow_checkpoint
from internvl_trainer.distributed import Group, Rendezvous, join_group
from internvl_trainer.metrics import Reporter
from internvl_trainer.stage_store import StageStore


@dataclass(frozen=True)
class RunContext:
    """One stage of a run in this process. `storage` is rooted at spec.output."""

    stage: StageName
    config: RunConfig
    storage: Storage
    reporter: Reporter

    @cached_property
    def stages(self) -> StageStore:
        """What the run's stages keep in storage."""
        return StageStore(self.config, self.storage)

    def join_group(self) -> GroupContext:
        """The same stage together with the other ranks. Raises Unavailable when they do not come in time."""
        self.reporter.doing("waiting for the others")
        group = join_group(Rendezvous.from_environment(os.environ), self.config.device)
        return GroupContext(self.stage, self.config, self.storage, self.reporter, group)


@dataclass(frozen=True)
class GroupContext(RunContext):
    """A stage that all ranks of `group` work on together."""

    group: Group


def open_context(stage: StageName, config: RunConfig, reporter: Reporter) -> RunContext:
    """The context of a stage. Raises UserError when spec.output or the model's config.json cannot be read."""
    os.environ[ENV_NAMESPACE] = config.job.rpartition("/")[0]
    if config.allow_private_addresses is not None:
        permit_private_addresses(config.allow_private_addresses)
    storage = open_storage(config.output, field="spec.output")
    return RunContext(stage, follow_checkpoint(config, storage), storage, reporter)
