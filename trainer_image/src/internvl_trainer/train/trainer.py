"""The training loop: from the newest checkpoint to the last step, then the export."""

from __future__ import annotations

import logging
import math
import tempfile
import time
from collections import deque
from dataclasses import InitVar, asdict, dataclass, field, replace
from pathlib import Path
from statistics import mean
from typing import Any

from internvl_api.constants import ANSWERING_SAMPLES, EXPORTING, RESTORING, TAKING_STEPS, VALIDATING
from internvl_api.status import Bandwidth, StageResult

from internvl_trainer.artifacts.manifest import ManifestFile
from internvl_trainer.artifacts.storage import persistently
from internvl_trainer.data.loader import Window
from internvl_trainer.errors import UserError
from internvl_trainer.metrics import Reporter
from internvl_trainer.run_context import GroupContext
from internvl_trainer.signals import StopFlag
from internvl_trainer.train.bandwidth_check import check_bandwidth
from internvl_trainer.train.base_model import use_base_weights
from internvl_trainer.train.checkpoint import Checkpoints
from internvl_trainer.train.engine import apply_step, run_backward
from internvl_trainer.train.held_out import Exported, HeldOut, choose_best
from internvl_trainer.train.loss_watch import LossWatch
from internvl_trainer.train.metrics_log import VALIDATION_SCALAR, MetricsLog, StepRecord, open_metrics_log
from internvl_trainer.train.saver import Saver
from internvl_trainer.train.schedule import learning_rate, warmup_steps
from internvl_trainer.train.setup import TrainingSetup, prepare
from internvl_trainer.train.step_losses import StepLosses
from internvl_trainer.train.step_report import device_name, report_step, straggler
from internvl_trainer.train.store_export import store_export

logger = logging.getLogger(__name__)

_STEPS_AVERAGED = 20  # for the time left


def train(context: GroupContext, stop: StopFlag) -> StageResult:
    """Train from the newest checkpoint to the last step, then export. All ranks call it."""
    config, group, reporter = context.config, context.group, context.reporter
    bandwidth = check_bandwidth(context)
    setup = prepare(context)
    fingerprint = context.stages.fingerprint("train")
    checkpoints = Checkpoints(
        context.storage,
        group,
        fingerprint=fingerprint,
        keep=config.checkpoint.keep,
        keep_best=config.checkpoint.keep_best,
        base=setup.base_identity,
        epoch=group.first(context.epoch),
        processes=config.processes_per_worker,
    )
    with tempfile.TemporaryDirectory(prefix="train-") as scratch:
        reporter.doing(RESTORING)
        first = checkpoints.restore(setup.engine, Path(scratch), total_steps=setup.total_steps)
        if first == 0 and setup.base.resumes:
            use_base_weights(setup.engine, setup.base, group)
        trainer = Trainer(context, setup, checkpoints, open_metrics_log(Path(scratch), group), stop, first, bandwidth)
        with stop.deferred():
            trainer.validate_late()
            if first == 0:
                trainer.answer_samples(0)
            loader = setup.loader(first)
            for step in range(first, setup.total_steps):
                if trainer.held_out.ended:
                    break
                reporter.enter("data")
                window = loader.window()
                reporter.enter("meeting")
                patient = step in (first, trainer.saver.step)  # data workers start; ranks stored files of their own
                sums = group.meet([stop.requested, checkpoints.ready(), *window.weights], patient=patient)
                stopping, ready, *weights = sums
                trainer.saver.advance(ready)
                if stopping or not trainer.take_step(step, window, weights):
                    return trainer.stopped(step)
                if trainer.needs_checkpoint(step + 1):
                    trainer.saver.save(step + 1)
        return trainer.finish(Path(scratch) / "export")


def is_due(step: int, total_steps: int, every: int) -> bool:
    """Whether something done every `every` steps is due after `step` steps; always after the last step."""
    return step % every == 0 or step == total_steps


@dataclass
class Trainer:
    """One attempt at training: a step, a validation, and the end.

    Attributes:
        log: of rank 0; None on the other ranks.
        first: the step of the restored checkpoint; 0 when there is none.
        held_out: the losses on data.validation so far, the same on all ranks.
        bandwidth: what this attempt measured at its start; None once the metrics log has it.
    """

    context: GroupContext
    setup: TrainingSetup
    checkpoints: Checkpoints
    log: MetricsLog | None
    stop: StopFlag
    first: InitVar[int]
    bandwidth: Bandwidth | None = None
    loss: float = math.nan
    watch: LossWatch = field(init=False)
    saver: Saver = field(init=False)
    held_out: HeldOut = field(init=False)
    durations: deque[float] = field(default_factory=lambda: deque(maxlen=_STEPS_AVERAGED))

    @property
    def reporter(self) -> Reporter:
        """The reporter of this process."""
        return self.context.reporter

    def __post_init__(self, first: int) -> None:
        stopping = self.context.config.training.early_stopping
        known = self.context.group.first(self.log.validations() if self.log else None)
        self.held_out = HeldOut(stopping, known, total_steps=self.setup.total_steps)
        self.saver = Saver(
            self.context, self.setup, self.checkpoints, self.log, self.stop, self.durations, first, self.held_out
        )
        self.reporter.checkpoint = self.checkpoints.newest
        self.reporter.total_steps.set(self.setup.total_steps)
        self.reporter.update(step=first, total_steps=self.setup.total_steps)
        self.reporter.doing(TAKING_STEPS)
        self.watch = LossWatch(self.setup.total_steps)
        for row in self.log.rows() if self.log else ():
            self.watch.add(row)
        self.reporter.update(warning=self.warning)
        self._report_held_out()

    @property
    def warning(self) -> str | None:
        """The warning about the loss so far, on rank 0; None without one."""
        return str(self.watch.found) if self.watch.found else None

    def take_step(self, step: int, window: Window, weights: list[float]) -> bool:
        """Take one optimizer step; False when it was abandoned because a rank is told to stop.

        Raises UserError for a loss that is not finite, before it reaches the weights.

        `weights`: sums of loss weights of each micro-batch, over all ranks.
        """
        began = time.monotonic()
        self.reporter.enter("computing")
        losses = StepLosses(self.setup.components.datasets)
        if not run_backward(
            self.setup.engine,
            window,
            weights,
            self.context.config,
            self.context.group,
            step,
            losses,
            self._is_any_stopping,
        ):
            return False
        local, parts = losses.read()
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
                dataset_losses=losses.means(parts),
                validation_losses=None if held_out is None else self._validation_losses(),
                ended_early=self.held_out.ended,
                bandwidth=self._take_bandwidth(),
            )
        )
        self.answer_samples(step + 1)
        return True

    def answer_samples(self, step: int) -> None:
        """Answer the sample rows with the weights after `step` steps, when it is due."""
        samples, total = self.setup.components.samples, self.setup.total_steps
        if samples is None or not (is_due(step, total, samples.every) or self.held_out.ended):
            return
        began = time.monotonic()
        self.reporter.doing(f"{ANSWERING_SAMPLES} {len(samples.chosen)} sample rows after step {step}")
        answers = samples.answers(self.setup.engine, lambda: self.stop.requested)
        self.reporter.update(detail=TAKING_STEPS)
        if answers is not None and self.log is not None:
            self.log.add_samples(step, answers, {} if self.log.has_samples else samples.pictures())
            logger.info("answered %d sample rows in %.1f s", len(answers), time.monotonic() - began)

    def needs_checkpoint(self, step: int) -> bool:
        """Whether to store the state after `step` steps: it is due, the best so far with keepBest, or the last one."""
        settings, lowest = self.context.config.checkpoint, self.held_out.lowest
        is_best = settings.keep_best and lowest is not None and lowest.step == step
        return is_best or bool(self.held_out.ended) or is_due(step, self.setup.total_steps, settings.every_steps)

    def _take_bandwidth(self) -> dict[str, float] | None:
        """What was measured at the start, for the attempt's first step; None after it."""
        found, self.bandwidth = self.bandwidth, None
        return found.model_dump(exclude_none=True) if found else None

    def _is_any_stopping(self) -> bool:
        return self.context.group.any(self.stop.requested)

    def validate_late(self) -> None:
        """Take the validation loss that the previous attempt owed when it was stopped."""
        step = self.saver.step
        if step and self.context.group.first(self.log is not None and not self.log.is_validated):
            loss = self._validate(step)
            if loss is not None and self.log is not None:
                self.log.add_validation(loss, self._validation_losses(), self.held_out.ended)
                self.context.tracker.metrics(step, {VALIDATION_SCALAR: loss})

    def stopped(self, step: int) -> StageResult:
        """The result when stopped before `step`, with a checkpoint of the steps so far where there is time for it."""
        kept = self.saver.save_before_stop(step)
        return self._result(
            "resume", "Stopped", f"stopped after step {step} of {self.setup.total_steps}{kept}; start me again"
        )

    def finish(self, directory: Path) -> StageResult:
        """Export the weights with the metrics log; the stage's manifest comes last."""
        group, stages = self.context.group, self.context.stages
        kind = "adapter" if self.context.config.method == "lora" else "model"
        if group.leads:
            persistently(stages.discard)("train")  # left by a killed attempt
        artifacts = {kind: stages.uri("train", kind)}
        self.saver.finish()
        self.reporter.doing(EXPORTING)
        steps, exported = self.saver.step, self._load_exported()
        self.checkpoints.release()  # host memory holds a shard of each rank instead
        stored = store_export(self.context, self.setup, directory, kind, self.checkpoints.epoch)
        shares = group.gather([asdict(file) for file in stored])
        if self.log is not None:
            files = [ManifestFile(**file) for share in shares for file in share]
            files += persistently(stages.upload)("train", self.log.files())
            about = {
                "kind": kind,
                "steps": steps,
                "exported": exported.about,
                "endedEarly": self.held_out.ended,
                "base": self.setup.base_identity,
                "device": device_name(group.device),
                "artifacts": artifacts,
                "progress": self.reporter.progress.model_dump(mode="json", by_alias=True, exclude_none=True),
            }
            persistently(stages.commit)("train", files, **about)
            self.log.close()
        group.barrier()
        loss = "" if math.isnan(self.loss) else f", loss {self.loss:.4f}"
        notes = (self.held_out.ended, exported.note, self.warning)
        message = "; ".join([f"{steps} steps{loss}", *filter(None, notes)])
        return self._result("succeeded", "EarlyStopped" if self.held_out.ended else "Trained", message, artifacts)

    def _load_exported(self) -> Exported:
        """Put the weights to export into the engine, and report their step: the best with keepBest, else the last."""
        last = self.saver.step
        exported = Exported(last, self.held_out.loss(last))
        if self.context.config.checkpoint.keep_best:
            exported = choose_best(
                self.held_out, last, lambda step: self.checkpoints.use_weights(self.setup.engine, step)
            )
        self.reporter.update(exported_step=exported.step)
        if self.context.group.leads and exported.note:
            logger.info("%s", exported.note)
        return exported

    def _validate(self, step: int) -> float | None:
        """The loss on data.validation after `step` steps; None when it is not due or a stop was requested meanwhile."""
        every = self.context.config.validation_every
        validation = self.setup.components.validation
        if validation is None or not is_due(step, self.setup.total_steps, every):
            return None
        self.reporter.doing(f"{VALIDATING} {step}")
        is_last = step == self.setup.total_steps  # no later attempt would take it
        loss = validation.loss(self.setup.engine, lambda: self.stop.requested and not is_last)
        self.reporter.update(detail=TAKING_STEPS)
        if loss is None:
            return None
        if not math.isfinite(loss):
            self.saver.finish()
            raise UserError(
                "LossNotFinite",
                f"the loss on data.validation is {loss} after step {step}; the last checkpoint is whole. Lower "
                "learningRate, raise warmupRatio or look at the rows of data.validation",
                "spec.training",
            )
        self.reporter.validation_loss.set(loss)
        self.reporter.update(validation_loss=loss)
        self.held_out.add(step, loss)
        self._report_held_out()
        if self.context.group.leads:
            logger.info("step %d validation loss %.4f%s", step, loss, self.held_out.note_of(step))
        return loss

    def _report_held_out(self) -> None:
        if lowest := self.held_out.lowest:
            self.reporter.update(
                best_step=lowest.step, best_validation_loss=lowest.loss, ended_early=self.held_out.ended
            )

    def _validation_losses(self) -> dict[str, float] | None:
        validation = self.setup.components.validation
        return validation.by_dataset if validation is not None else None

    def _refuse_nan(self, step: int) -> None:
        if not math.isfinite(self.loss):
            raise self._not_finite(step, f"the loss is {self.loss}")

    def _not_finite(self, step: int, what: str) -> UserError:
        """The error for all ranks, with the earlier warning about the loss, which is the likely cause."""
        self.saver.finish()
        good = f"the checkpoint of step {self.saver.step} is whole" if self.saver.step else "there is no checkpoint yet"
        before = self.context.group.first(self.warning)
        return UserError(
            "LossNotFinite",
            f"{what} at step {step + 1}; the weights were not touched and {good}. Lower learningRate, raise "
            f"warmupRatio or look at the rows of this step{f'. Before, {before}' if before else ''}",
            "spec.training",
        )

    def _record(self, record: StepRecord) -> None:
        reporter = self.reporter
        self.durations.append(record.step_seconds)
        left = (self.setup.total_steps - record.step) * mean(self.durations)
        report_step(reporter, record, left, self.context.group.device)
        if self.log is not None:
            if self.watch.add(asdict(record)):
                logger.warning("%s", self.warning)
                reporter.update(warning=self.warning)
                record = replace(record, warning=self.warning)
            self.log.record(record)
            self.context.tracker.metrics(
                record.step,
                {
                    **record.scalars(),
                    "train/epoch": record.epoch,
                    "train/samples_per_second": record.samples_per_second,
                },
            )
            logger.info(
                "step %d/%d loss %.4f lr %.3g norm %.3f %.1f tokens/s waited %.2f s",
                record.step, self.setup.total_steps, record.loss, record.learning_rate, record.gradient_norm,
                record.tokens_per_second, record.data_wait_seconds,
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
