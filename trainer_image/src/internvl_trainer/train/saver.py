"""When training saves a checkpoint, what it reports of a complete one, and whether a stop has time for another."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import mean

from internvl_api.constants import CHECKPOINTING, FINISHING_CHECKPOINT, TAKING_STEPS
from internvl_api.memory.stop_time import STORAGE_RATE

from internvl_trainer.artifacts.storage import persistently
from internvl_trainer.run_context import GroupContext
from internvl_trainer.signals import StopFlag
from internvl_trainer.train.bandwidth_check import bandwidth, report
from internvl_trainer.train.checkpoint import Checkpoints
from internvl_trainer.train.held_out import HeldOut
from internvl_trainer.train.in_flight import Saved
from internvl_trainer.train.metrics_log import MetricsLog
from internvl_trainer.train.optimizer_shards import KINDS, WEIGHT
from internvl_trainer.train.setup import TrainingSetup
from internvl_trainer.train.stop_deadline import has_time_to_save, too_slow_to_stop

logger = logging.getLogger(__name__)


@dataclass
class Saver:
    """Saves the checkpoints of one attempt at training, and reports them. All ranks call every method together.

    Attributes:
        log: of rank 0; None on the other ranks.
        durations: seconds of the last steps.
        step: the step of the newest checkpoint, which may be in flight; 0 when there is none.
        held_out: the losses on data.validation so far.
    """

    context: GroupContext
    setup: TrainingSetup
    checkpoints: Checkpoints
    log: MetricsLog | None
    stop: StopFlag
    durations: Sequence[float]
    step: int
    held_out: HeldOut = field(default_factory=HeldOut)

    def save(self, step: int) -> None:
        """Begin to store a checkpoint after `step` steps; training goes on when its snapshot is taken.

        The one after the last step has no optimizer state, unless checkpoint.lastStep asks for it.
        """
        reporter, began = self.context.reporter, time.monotonic()
        self.finish()
        reporter.doing(f"{CHECKPOINTING} {step}")
        if self.context.group.leads and self.checkpoints.newest is None:
            persistently(self.context.stages.claim_output)()
        is_last = step == self.setup.total_steps or self.held_out.ended is not None
        weights_only = is_last and self.context.config.checkpoint.last_step == "weights"
        self.checkpoints.save(
            self.setup.engine,
            step,
            self.log.files() if self.log else {},
            kinds=(WEIGHT,) if weights_only else KINDS,
            best=self.held_out.lowest.step if self.held_out.lowest else None,
            is_last=is_last,
        )
        self.step = step
        seconds = time.monotonic() - began
        reporter.checkpoint_stall_seconds.set(seconds)
        logger.info("checkpoint at step %d: training stood still for %.1f s", step, seconds)
        reporter.update(detail=TAKING_STEPS)

    def advance(self, ready: float) -> None:
        """Go to the next phase of the checkpoint in flight if all ranks are ready, and report it when it is complete.

        `ready`: the sum of `Checkpoints.ready` over all ranks.
        """
        self._report(self.checkpoints.advance(ready))

    def finish(self) -> None:
        """Wait until the checkpoint in flight, if there is one, is complete."""
        if flight := self.checkpoints.in_flight:
            self.context.reporter.doing(
                f"{FINISHING_CHECKPOINT} {flight.step}: {flight.sent / 1e6:.0f} of {flight.size / 1e6:.0f} MB "
                "of rank 0 are stored"
            )
            self._report(self.checkpoints.finish())

    def save_before_stop(self, step: int) -> str:
        """Save the steps since the last checkpoint, if the grace period has time; return why not, if not."""
        kept = ""
        if step > self.step:
            if self._has_time():
                self.save(step)
            else:
                kept = f" with the checkpoint of step {self.step}: the grace period has no time for another"
        self.finish()
        return kept

    def _has_time(self) -> bool:
        """Whether another checkpoint fits into the grace period, as rank 0 finds; True when none is in flight."""
        elapsed = max(self.context.group.gather(self.stop.seconds))
        flight, saved = self.checkpoints.in_flight, self.checkpoints.saved
        if flight is None:
            return True
        known = self.context.reporter.progress.bandwidth
        rate = (known.storage_write if known else None) or STORAGE_RATE
        estimated = flight.size * self.context.config.processes_per_worker / rate
        answer = has_time_to_save(
            self.context.config.grace_seconds,
            elapsed=elapsed,
            store_seconds=saved.store_seconds if saved else estimated,
            in_flight_seconds=time.monotonic() - flight.began,
        )
        return bool(self.context.group.first(answer))

    def _report(self, saved: Saved | None) -> None:
        """Report a checkpoint that is complete now; nothing when there is none."""
        if saved is None:
            return
        config, reporter = self.context.config, self.context.reporter
        reporter.checkpoint = self.checkpoints.newest
        reporter.checkpoint_seconds.set(saved.seconds)
        reporter.checkpoint_upload_seconds.set(saved.store_seconds)
        reporter.checkpoint_bytes.set(saved.size)
        reporter.checkpoint_step.set(saved.step)
        if saved.size and saved.store_seconds > 0:  # rank 0, which knows the size of all nodes' files
            report(self.context, bandwidth(storage_write=saved.size / config.workers / saved.store_seconds))
        logger.info(
            "checkpoint at step %d is complete: %.1f s after the step, %.1f s of them to store the files of this rank",
            saved.step, saved.seconds, saved.store_seconds,
        )  # fmt: skip
        pass_seconds = mean(self.durations) / config.gradient_accumulation if self.durations else 0.0
        if slow := too_slow_to_stop(config.grace_seconds, pass_seconds, saved.store_seconds):
            logger.warning("%s", slow)
