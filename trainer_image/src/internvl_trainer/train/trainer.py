"""The training loop: from the newest checkpoint to the last step, then the export."""

from __future__ import annotations

import logging
import math
import tempfile
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import mean, median_low
from typing import Any

from internvl_api.status import StageResult

from internvl_trainer.artifacts.manifest import ManifestFile
from internvl_trainer.artifacts.output_layout import JOURNAL
from internvl_trainer.artifacts.storage import persistently
from internvl_trainer.data.loader import Window
from internvl_trainer.distributed import Group
from internvl_trainer.errors import UserError
from internvl_trainer.metrics import Reporter
from internvl_trainer.run_context import GroupContext
from internvl_trainer.signals import StopFlag
from internvl_trainer.train.checkpoint import Checkpoints
from internvl_trainer.train.dataset_losses import DatasetLosses
from internvl_trainer.train.engine import apply_step, run_backward
from internvl_trainer.train.loss_watch import LossWatch
from internvl_trainer.train.metrics_log import MetricsLog, StepRecord, restore_metrics_log
from internvl_trainer.train.schedule import learning_rate, warmup_steps
from internvl_trainer.train.setup import TrainingSetup, prepare

logger = logging.getLogger(__name__)

_STEPS_AVERAGED = 20  # for the time left


def train(context: GroupContext, stop: StopFlag) -> StageResult:
    """Train from the newest checkpoint to the last step, then export. All ranks call it."""
    config, group, reporter = context.config, context.group, context.reporter
    setup = prepare(context)
    fingerprint = context.stages.fingerprint("train")
    checkpoints = Checkpoints(
        context.storage,
        group,
        fingerprint=fingerprint,
        keep=config.checkpoint.keep,
        base=setup.base_identity,
        epoch=group.first(context.epoch),
    )
    with tempfile.TemporaryDirectory(prefix="train-") as scratch:
        reporter.doing("looking for a checkpoint")
        first = checkpoints.restore(setup.engine, Path(scratch))
        trainer = Trainer(context, setup, checkpoints, open_metrics_log(Path(scratch), group), stop, first)
        with stop.deferred():
            trainer.validate_late()
            loader = setup.loader(first)
            for step in range(first, setup.total_steps):
                reporter.enter("data")
                window = loader.window()
                reporter.enter("meeting")
                stopping, *weights = group.sum([stop.requested, *window.weights])
                if stopping:
                    return trainer.stopped(step)
                trainer.take_step(step, window, weights)
                if is_due(step + 1, setup.total_steps, config.checkpoint.every_steps):
                    trainer.save(step + 1)
        return trainer.finish(Path(scratch) / "export")


def is_due(step: int, total_steps: int, every: int) -> bool:
    """Whether something done every `every` steps is due after `step` steps; always after the last step."""
    return step % every == 0 or step == total_steps


def straggler(waits: Sequence[float], step_seconds: float) -> int | None:
    """The rank that the others waited for, or None: its data came later than the median by over a tenth of the step.

    `waits`: seconds that each rank waited for its data.
    """
    slowest = max(range(len(waits)), key=waits.__getitem__)
    return slowest if waits[slowest] - median_low(waits) > step_seconds / 10 else None


def open_metrics_log(scratch: Path, group: Group) -> MetricsLog | None:
    """Rank 0's metrics log, continuing that of the restored checkpoint; None on the other ranks."""
    if not group.leads:
        return None
    restore_metrics_log(scratch / "record", scratch / JOURNAL)
    return MetricsLog(scratch / "record")


@dataclass
class Trainer:
    """One attempt at training: a step, a checkpoint, a validation, and the end.

    Attributes:
        log: of rank 0; None on the other ranks.
        saved_step: the step of the newest checkpoint; 0 when there is none.
    """

    context: GroupContext
    setup: TrainingSetup
    checkpoints: Checkpoints
    log: MetricsLog | None
    stop: StopFlag
    saved_step: int
    loss: float = math.nan
    watch: LossWatch = field(init=False)
    durations: deque[float] = field(default_factory=lambda: deque(maxlen=_STEPS_AVERAGED))

    @property
    def reporter(self) -> Reporter:
        """The reporter of this process."""
        return self.context.reporter

    def __post_init__(self) -> None:
        self.reporter.checkpoint = self.checkpoints.newest
        self.reporter.total_steps.set(self.setup.total_steps)
        self.reporter.update(step=self.saved_step, total_steps=self.setup.total_steps)
        self.reporter.doing("training")
        self.watch = LossWatch(self.setup.total_steps)
        for row in self.log.rows() if self.log else ():
            self.watch.add(row)
        self.reporter.update(warning=self.warning)

    @property
    def warning(self) -> str | None:
        """The warning about the loss so far, on rank 0; None without one."""
        return str(self.watch.found) if self.watch.found else None

    def take_step(self, step: int, window: Window, weights: list[float]) -> None:
        """Take one optimizer step. Raises UserError for a loss that is not finite, before it reaches the weights.

        `weights`: sums of loss weights of each micro-batch, over all ranks.
        """
        began = time.monotonic()
        self.reporter.enter("computing")
        by_dataset = DatasetLosses(self.setup.components.datasets)
        local = run_backward(
            self.setup.engine, window, weights, self.context.config, self.context.group, step, by_dataset
        )
        parts = by_dataset.values()
        mine = [0.0] * self.context.group.world_size
        mine[self.context.group.rank] = window.waited
        total, supervised, rows, tokens, places, *others = self.context.group.sum(
            [local, window.supervised_tokens, window.rows, window.tokens, window.places, *mine, *parts]
        )
        waits, parts = others[: len(mine)], others[len(mine) :]
        self.loss = total / (sum(weights) or 1.0)
        self._refuse_nan(step)
        training = self.context.config.training
        rate = learning_rate(
            step,
            self.setup.total_steps,
            training.learning_rate,
            warmup_steps(training, self.setup.total_steps),
            training.lr_schedule,
        )
        norm = apply_step(self.setup.engine, rate)
        if not self.setup.engine.was_step_applied():
            raise self._not_finite(step, "the gradients are not finite")
        seconds = time.monotonic() - began + window.waited
        self.reporter.update(slowest_rank=straggler(waits, seconds))
        held_out = self._validate(step + 1)  # before the log, so that a checkpoint never lacks a due loss
        self._record(
            StepRecord(
                step=step + 1,
                epoch=round(self.setup.components.order.epochs_done(step + 1), 6),
                loss=self.loss,
                learning_rate=rate,
                gradient_norm=norm,
                supervised_tokens=int(supervised),
                tokens=int(tokens),
                places=int(places),
                samples=int(rows),
                step_seconds=seconds,
                data_wait_seconds=mean(waits),
                world_size=self.context.group.world_size,
                validation_loss=held_out,
                dataset_losses=by_dataset.means(parts),
                validation_losses=None if held_out is None else self._validation_losses(),
            )
        )

    def validate_late(self) -> None:
        """Take the validation loss that the previous attempt owed when it was stopped."""
        step = self.saved_step
        if step and self.context.group.first(self.log is not None and not self.log.is_validated):
            loss = self._validate(step)
            if loss is not None and self.log is not None:
                self.log.add_validation(loss, self._validation_losses())

    def save(self, step: int) -> None:
        """Store a checkpoint after `step` steps."""
        began = time.monotonic()
        self.reporter.doing(f"checkpoint at step {step}")
        if self.context.group.leads and self.checkpoints.newest is None:
            persistently(self.context.stages.claim_output)()
        self.checkpoints.save(self.setup.engine, step, self.log.files() if self.log else {})
        self.saved_step = step
        seconds = time.monotonic() - began
        self.reporter.checkpoint = self.checkpoints.newest
        self.reporter.checkpoint_seconds.set(seconds)
        self.reporter.checkpoint_bytes.set(self.checkpoints.newest_bytes)
        self.reporter.checkpoint_step.set(step)
        logger.info("checkpoint at step %d took %.1f s", step, seconds)
        self.reporter.update(detail="training")

    def stopped(self, step: int) -> StageResult:
        """The result when stopped before `step`, with a checkpoint of the steps so far."""
        if step > self.saved_step:
            self.save(step)
        return self._result(
            "resume", "Stopped", f"stopped after step {step} of {self.setup.total_steps}; start me again"
        )

    def finish(self, directory: Path) -> StageResult:
        """Export the weights with the metrics log; the stage's manifest comes last."""
        group, stages = self.context.group, self.context.stages
        self.reporter.doing("exporting")
        kind = "adapter" if self.context.config.method == "lora" else "model"
        if group.leads:
            persistently(stages.discard)("train")  # left by a killed attempt
        artifacts = {kind: stages.uri("train", kind)}
        files = self._export(directory, kind)
        if self.log is not None:
            files += persistently(stages.upload)("train", self.log.files())
            about = {
                "kind": kind,
                "steps": self.setup.total_steps,
                "base": self.setup.base_identity,
                "artifacts": artifacts,
                "progress": self.reporter.progress.model_dump(mode="json", by_alias=True, exclude_none=True),
            }
            persistently(stages.commit)("train", files, **about)
            self.log.close()
        group.barrier()
        loss = "" if math.isnan(self.loss) else f", loss {self.loss:.4f}"
        warned = f"; {self.warning}" if self.warning else ""
        return self._result("succeeded", "Trained", f"{self.setup.total_steps} steps{loss}{warned}", artifacts)

    def _export(self, directory: Path, kind: str) -> list[ManifestFile]:
        """Store the exported files one at a time, so that the scratch disk need not hold a whole model."""
        stored: list[ManifestFile] = []
        for path in self.setup.components.export(self.setup.engine, directory):
            name = f"{kind}/{path.relative_to(directory).as_posix()}"
            stored += persistently(self.context.stages.upload)("train", {name: path})
            path.unlink()
        return stored

    def _validate(self, step: int) -> float | None:
        """The loss on data.validation after `step` steps; None when it is not due or a stop was requested meanwhile."""
        every = self.context.config.evaluation.every_steps or self.context.config.checkpoint.every_steps
        validation = self.setup.components.validation
        if validation is None or not is_due(step, self.setup.total_steps, every):
            return None
        self.reporter.doing(f"validating after step {step}")
        is_last = step == self.setup.total_steps  # no later attempt would take it
        loss = validation.loss(self.setup.engine, lambda: self.stop.requested and not is_last)
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
        if self.context.group.leads:
            logger.info("step %d validation loss %.4f", step, loss)
        return loss

    def _validation_losses(self) -> dict[str, float] | None:
        validation = self.setup.components.validation
        return validation.by_dataset if validation is not None else None

    def _refuse_nan(self, step: int) -> None:
        if not math.isfinite(self.loss):
            raise self._not_finite(step, f"the loss is {self.loss}")

    def _not_finite(self, step: int, what: str) -> UserError:
        """The error for all ranks, with the earlier warning about the loss, which is the likely cause."""
        good = f"the checkpoint of step {self.saved_step} is whole" if self.saved_step else "there is no checkpoint yet"
        before = self.context.group.first(self.warning)
        return UserError(
            "LossNotFinite",
            f"{what} at step {step + 1}; the weights were not touched and {good}. Lower learningRate, raise "
            f"warmupRatio or look at the rows of this step{f'. Before, {before}' if before else ''}",
            "spec.training",
        )

    def _record(self, record: StepRecord) -> None:
        reporter = self.reporter
        reporter.loss.set(record.loss)
        reporter.dataset_losses.set(record.dataset_losses or {})
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
            eta_seconds=round((self.setup.total_steps - record.step) * mean(self.durations), 1),
        )
        if self.log is not None:
            if self.watch.add(asdict(record)):
                logger.warning("%s", self.warning)
                reporter.update(warning=self.warning)
                record = replace(record, warning=self.warning)
            self.log.record(record)
            logger.info(
                "step %d/%d loss %.4f lr %.3g norm %.3f %.1f tokens/s waited %.2f s",
                record.step, self.setup.total_steps, record.loss, record.learning_rate, record.gradient_norm, tokens,
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
