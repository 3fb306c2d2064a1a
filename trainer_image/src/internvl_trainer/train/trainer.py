"""The train stage: from a base model and rows to trained weights in storage."""

from __future__ import annotations

import logging
import math
import tempfile
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, median_low
from typing import Any

from internvl_api.run_config import RunConfig
from internvl_api.status import StageResult

from internvl_trainer.artifacts.fingerprint import claim_output, fingerprint, stage_folder
from internvl_trainer.artifacts.manifest import commit, discard, upload_files
from internvl_trainer.artifacts.storage import Storage, persistently
from internvl_trainer.data.loader import Window
from internvl_trainer.distributed import Group
from internvl_trainer.errors import UserError
from internvl_trainer.metrics import Reporter
from internvl_trainer.signals import StopFlag
from internvl_trainer.train.checkpoint import JOURNAL, Checkpoints
from internvl_trainer.train.engine import apply_step, run_backward
from internvl_trainer.train.metrics_log import Journal, StepRecord, restore_journal
from internvl_trainer.train.schedule import learning_rate, warmup_steps
from internvl_trainer.train.setup import Run, prepare

logger = logging.getLogger(__name__)

_STEPS_AVERAGED = 20  # for the time left


def train(config: RunConfig, group: Group, storage: Storage, reporter: Reporter, stop: StopFlag) -> StageResult:
    """Train from the newest checkpoint to the last step, then export. All ranks call it."""
    run = prepare(config, group, storage, reporter)
    checkpoints = Checkpoints(storage, group, fingerprint=fingerprint(config), keep=config.checkpoint.keep)
    with tempfile.TemporaryDirectory(prefix="train-") as scratch:
        reporter.doing("looking for a checkpoint")
        first = checkpoints.restore(run.engine, Path(scratch))
        journal = open_journal(Path(scratch), group)
        session = Session(run, config, group, storage, reporter, checkpoints, journal, stop, first)
        with stop.deferred():
            session.validate_late()
            loader = run.loader(first)
            for step in range(first, run.total_steps):
                reporter.enter("data")
                window = loader.window()
                reporter.enter("meeting")
                stopping, *weights = group.sum([stop.requested, *window.weights])
                if stopping:
                    return session.stopped(step)
                session.take_step(step, window, weights)
                if is_due(step + 1, run.total_steps, config.checkpoint.every_steps):
                    session.save(step + 1)
        return session.finish(Path(scratch) / "export")


def is_due(step: int, total_steps: int, every: int) -> bool:
    """Whether what comes every so many steps comes after `step` of them; always after the last."""
    return step % every == 0 or step == total_steps


def straggler(waits: Sequence[float], step_seconds: float) -> int | None:
    """The rank that the others waited for: it had its data later than most, by more than a tenth of the step.

    `waits`: seconds that each rank waited for its data.
    """
    slowest = max(range(len(waits)), key=waits.__getitem__)
    return slowest if waits[slowest] - median_low(waits) > step_seconds / 10 else None


def open_journal(scratch: Path, group: Group) -> Journal | None:
    """Rank 0's journal, going on from the restored checkpoint's."""
    if not group.leads:
        return None
    restore_journal(scratch / "record", scratch / JOURNAL)
    return Journal(scratch / "record")


@dataclass
class Session:
    """One attempt: what the loop does at each step, and at its end."""

    run: Run
    config: RunConfig
    group: Group
    storage: Storage
    reporter: Reporter
    checkpoints: Checkpoints
    journal: Journal | None
    stop: StopFlag
    saved_step: int
    loss: float = math.nan
    durations: deque[float] = field(default_factory=lambda: deque(maxlen=_STEPS_AVERAGED))

    def __post_init__(self) -> None:
        self.reporter.checkpoint = self.checkpoints.newest
        self.reporter.total_steps.set(self.run.total_steps)
        self.reporter.update(step=self.saved_step, total_steps=self.run.total_steps)
        self.reporter.doing("training")

    def take_step(self, step: int, window: Window, weights: list[float]) -> None:
        """One optimizer step. Raises UserError when the loss is no number, before it reaches the weights.

        `weights`: sums of loss weights of each micro-batch, over all ranks.
        """
        began = time.monotonic()
        self.reporter.enter("computing")
        local = run_backward(self.run.engine, window, weights, self.config, self.group, step)
        mine = [0.0] * self.group.world_size
        mine[self.group.rank] = window.waited
        total, supervised, rows, tokens, places, *waits = self.group.sum(
            [local, window.supervised_tokens, window.rows, window.tokens, window.places, *mine]
        )
        self.loss = total / (sum(weights) or 1.0)
        self._refuse_nan(step)
        training = self.config.training
        rate = learning_rate(
            step,
            self.run.total_steps,
            training.learning_rate,
            warmup_steps(training, self.run.total_steps),
            training.lr_schedule,
        )
        norm = apply_step(self.run.engine, rate)
        if not self.run.engine.was_step_applied():
            raise _not_finite(step, "the gradients are not finite", self.saved_step)
        seconds = time.monotonic() - began + window.waited
        self.reporter.update(slowest_rank=straggler(waits, seconds))
        held_out = self._validate(step + 1)  # before the record, so that a checkpoint never lacks a loss that was due
        self._record(
            StepRecord(
                step=step + 1,
                epoch=round(self.run.order.epochs_done(step + 1), 6),
                loss=self.loss,
                learning_rate=rate,
                gradient_norm=norm,
                supervised_tokens=int(supervised),
                tokens=int(tokens),
                places=int(places),
                samples=int(rows),
                step_seconds=seconds,
                data_wait_seconds=mean(waits),
                world_size=self.group.world_size,
                validation_loss=held_out,
            )
        )

    def validate_late(self) -> None:
        """Take the loss that was due after the last step, when the attempt before was asked to stop meanwhile."""
        step = self.saved_step
        if step and self.group.first(self.journal is not None and not self.journal.is_validated):
            loss = self._validate(step)
            if loss is not None and self.journal is not None:
                self.journal.add_validation(loss)

    def save(self, step: int) -> None:
        """Checkpoint after `step` steps."""
        began = time.monotonic()
        self.reporter.doing(f"checkpoint at step {step}")
        if self.group.leads and self.checkpoints.newest is None:
            persistently(claim_output)(self.storage, self.config)
        self.checkpoints.save(self.run.engine, step, self.journal.files() if self.journal else {})
        self.saved_step = step
        seconds = time.monotonic() - began
        self.reporter.checkpoint = self.checkpoints.newest
        self.reporter.checkpoint_seconds.set(seconds)
        self.reporter.checkpoint_bytes.set(self.checkpoints.newest_bytes)
        self.reporter.checkpoint_step.set(step)
        logger.info("checkpoint at step %d took %.1f s", step, seconds)
        self.reporter.update(detail="training")

    def stopped(self, step: int) -> StageResult:
        """Asked to stop before `step`: keep what was done and say how to go on."""
        if step > self.saved_step:
            self.save(step)
        return self._result("resume", "Stopped", f"stopped after step {step} of {self.run.total_steps}; start me again")

    def finish(self, directory: Path) -> StageResult:
        """Export the weights with the record of the run; the stage's manifest last."""
        self.reporter.doing("exporting")
        folder, kind = stage_folder("train"), "adapter" if self.config.method == "lora" else "model"
        if self.group.leads:
            persistently(discard)(self.storage, folder)  # what an attempt left that was killed here
        artifacts = {kind: f"{self.storage.uri}/{folder}/{kind}"}
        described = []
        for path in self.run.parts.export(
            self.run.engine, directory
        ):  # one at a time: the scratch disk need not hold a whole model
            name = f"{kind}/{path.relative_to(directory).as_posix()}"
            described += persistently(upload_files)(self.storage, folder, {name: path})
            path.unlink()
        if self.journal is not None:
            described += persistently(upload_files)(self.storage, folder, self.journal.files())
            about = {
                "kind": kind,
                "steps": self.run.total_steps,
                "base": self.run.base_identity,
                "artifacts": artifacts,
                "progress": self.reporter.progress.model_dump(mode="json", by_alias=True, exclude_none=True),
            }
            persistently(commit)(self.storage, folder, described, fingerprint(self.config), **about)
            self.journal.close()
        self.group.barrier()
        loss = "" if math.isnan(self.loss) else f", loss {self.loss:.4f}"
        return self._result("succeeded", "Trained", f"{self.run.total_steps} steps{loss}", artifacts)

    def _validate(self, step: int) -> float | None:
        """The loss on data.validation after `step` steps, when it is due; None also when asked to stop meanwhile."""
        every = self.config.evaluation.every_steps or self.config.checkpoint.every_steps
        validation = self.run.parts.validation
        if validation is None or not is_due(step, self.run.total_steps, every):
            return None
        self.reporter.doing(f"validating after step {step}")
        is_last = step == self.run.total_steps  # nobody would take it later
        loss = validation.loss(self.run.engine, lambda: self.stop.requested and not is_last)
        self.reporter.update(detail="training")
        if loss is None:
            return None
        if not math.isfinite(loss):
            raise UserError(
                "LossNotFinite",
                f"the loss on data.validation is {loss} after step {step}; the last checkpoint is whole. Lower "
                "learningRate, raise warmupRatio or look at the rows of data.validation",
                "spec.training",
            )
        self.reporter.validation_loss.set(loss)
        self.reporter.update(validation_loss=loss)
        if self.group.leads:
            logger.info("step %d validation loss %.4f", step, loss)
        return loss

    def _refuse_nan(self, step: int) -> None:
        if not math.isfinite(self.loss):
            raise _not_finite(step, f"the loss is {self.loss}", self.saved_step)

    def _record(self, record: StepRecord) -> None:
        reporter = self.reporter
        reporter.loss.set(record.loss)
        reporter.learning_rate.set(record.learning_rate)
        reporter.gradient_norm.set(record.gradient_norm)
        reporter.step.set(record.step)
        reporter.samples.inc(record.samples)
        reporter.packing_efficiency.set(record.tokens / record.places)
        reporter.data_wait.inc(record.data_wait_seconds)
        reporter.step_seconds.observe(record.step_seconds)
        self.durations.append(record.step_seconds)
        samples, tokens = record.samples / record.step_seconds, record.tokens / record.step_seconds
        reporter.samples_per_second.set(samples)
        reporter.tokens_per_second.set(tokens)
        reporter.update(
            step=record.step,
            epoch=record.epoch,
            loss=record.loss,
            learning_rate=record.learning_rate,
            samples_per_second=round(samples, 3),
            tokens_per_second=round(tokens, 3),
            eta_seconds=round((self.run.total_steps - record.step) * mean(self.durations), 1),
        )
        if self.journal is not None:
            self.journal.record(record)
            logger.info(
                "step %d/%d loss %.4f lr %.3g norm %.3f %.1f tokens/s waited %.2f s",
                record.step, self.run.total_steps, record.loss, record.learning_rate, record.gradient_norm, tokens,
                record.data_wait_seconds,
            )  # fmt: skip

    def _result(self, outcome: Any, reason: str, message: str, artifacts: dict[str, str] | None = None) -> StageResult:
        return StageResult(
            stage="train",
            outcome=outcome,
            reason=reason,
            message=message,
            progress=self.reporter.progress,
            checkpoint=self.checkpoints.newest,
            artifacts=artifacts or {},
        )


def _not_finite(step: int, what: str, saved_step: int) -> UserError:
    good = f"the checkpoint of step {saved_step} is whole" if saved_step else "there is no checkpoint yet"
    return UserError(
        "LossNotFinite",
        f"{what} at step {step + 1}; the weights were not touched and {good}. Lower learningRate, raise warmupRatio "
        "or look at the rows of this step",
        "spec.training",
    )
