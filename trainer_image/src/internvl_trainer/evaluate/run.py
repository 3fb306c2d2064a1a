"""The evaluation stages: all ranks answer rows, rank 0 scores the answers."""

from __future__ import annotations

import json
import logging
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from internvl_api.run_config import RunConfig
from internvl_api.status import EvaluationStatus, StageName, StageResult

from internvl_trainer.artifacts.output_layout import PREDICTIONS, SCORES
from internvl_trainer.data.open_datasets import picture_decoding, sample_settings
from internvl_trainer.evaluate.captions import check_tools
from internvl_trainer.evaluate.chunks import Answer, Chunk, ChunkStore, Row, chunks_of, to_lines
from internvl_trainer.evaluate.generate import Answerer, one_ahead
from internvl_trainer.evaluate.retrieval_answers import RetrievalAnswerer, retrieval_figures
from internvl_trainer.evaluate.scores import score
from internvl_trainer.evaluate.tasks import OpenTask, needs_tools, open_tasks
from internvl_trainer.evaluate.weights import Evaluated, find_trained, load_evaluated
from internvl_trainer.metrics import Reporter
from internvl_trainer.model.tokenizer import read_tokenizer
from internvl_trainer.retrieval.load import LoadedRetrievalModel
from internvl_trainer.run_context import GroupContext, RunContext

logger = logging.getLogger(__name__)

Figures = dict[str, dict[str, float]]
"""Task to metric to value."""


def evaluate(context: GroupContext) -> StageResult:
    """Answer every row that has no answer yet, then score all. All ranks call it; rank 0 writes the result.

    Raises:
        UserError: a task, the model or a tool cannot be used.
    """
    stage, config, group, reporter = context.stage, context.config, context.group, context.reporter
    reporter.doing("reading the tasks")
    tasks = open_tasks(config)
    if needs_tools(tasks):
        check_tools()
    trained = find_trained(context)
    version = context.stages.task_version(stage) + (trained.sha256 if trained else "")
    store = ChunkStore(context.storage, context.stages.key(stage), version)
    done = set(group.first(sorted(store.stored())))
    pending = [chunk for chunk in chunks_of(tasks) if store.key(chunk) not in done]
    if pending:
        reporter.doing("loading the model")
        evaluated = load_evaluated(context, trained)
        if group.leads:
            context.stages.claim_output()
        answer_chunks(context, make_answerer(config, evaluated), pending, store)
    group.barrier()
    figures: Figures | None = None
    if group.leads:
        reporter.doing("scoring")
        figures = write_result(context, tasks, store)
    figures = group.first(figures)
    return StageResult(
        stage=stage,
        outcome="succeeded",
        reason="Evaluated",
        message=summary(figures),
        progress=reporter.progress,
        evaluation=status_of(stage, figures),
    )


class AnyAnswerer(Protocol):
    """A model of either kind: media are read ahead of it, and it answers a chunk at a time."""

    def prompts(self, chunk: Chunk, pool: Executor) -> Sequence[Future[Any]]: ...

    def answers(self, task: OpenTask, prompts: Sequence[Any]) -> Sequence[Answer]: ...


def make_answerer(config: RunConfig, evaluated: Evaluated) -> AnyAnswerer:
    """The model with the run's settings for pictures and prompts."""
    loaded, batch_size = evaluated.loaded, config.evaluation.batch_size
    if isinstance(loaded, LoadedRetrievalModel):
        return RetrievalAnswerer(
            loaded,
            read_tokenizer(evaluated.directory),
            batch_size,
            max_tokens=config.training.max_seq_length,
            normalises=config.data.compat != "upstream",
            decoding=picture_decoding(config),
        )
    settings = sample_settings(
        config, template=loaded.template, image_size=loaded.image_size, context_tokens=loaded.context_tokens
    )
    return Answerer(loaded, settings, batch_size)


def answer_chunks(context: GroupContext, answerer: AnyAnswerer, pending: Sequence[Chunk], store: ChunkStore) -> None:
    """Answer this rank's share of the chunks, each stored when it is done."""
    group, reporter = context.group, context.reporter
    own = pending[group.rank :: group.world_size]
    pace = Pace(reporter, rows=sum(len(chunk.questions) for chunk in pending), ranks=group.world_size)
    logger.info("%d chunks to answer, %d of them here", len(pending), len(own))
    pool = ThreadPoolExecutor(torch.get_num_threads())
    try:
        for chunk, prompts in one_ahead(own, lambda chunk: answerer.prompts(chunk, pool)):
            reporter.update(detail=f"answering {chunk.task.name}")
            store.write(chunk, answerer.answers(chunk.task, [prompt.result() for prompt in prompts]))
            pace.answered(len(prompts))
    finally:
        pool.shutdown(cancel_futures=True)  # stop reading pictures when told to stop


@dataclass
class Pace:
    """Progress of all ranks, assuming that the others are as fast as this one."""

    reporter: Reporter
    rows: int
    ranks: int
    done: int = 0
    began: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        self.reporter.update(step=0, total_steps=self.rows)

    def answered(self, rows: int) -> None:
        """Count this many more rows."""
        self.done = min(self.rows, self.done + rows * self.ranks)
        rate = self.done / (time.monotonic() - self.began)
        self.reporter.update(
            step=self.done, samples_per_second=round(rate, 3), eta_seconds=round((self.rows - self.done) / rate, 1)
        )
        logger.info("answered %d of %d rows, %.2f a second", self.done, self.rows, rate)


def write_result(context: RunContext, tasks: Sequence[OpenTask], store: ChunkStore) -> Figures:
    """Store predictions with scores, and scores.json; then the manifest; then delete the chunks."""
    stage, stages, figures = context.stage, context.stages, Figures()
    stages.withdraw(stage)
    with tempfile.TemporaryDirectory(prefix="evaluate-") as scratch:
        files: dict[str, Path] = {}
        for task in tasks:
            figures[task.name], rows = score_task(task, store.read(task))
            path = files[f"{PREDICTIONS}/{task.name}.jsonl"] = Path(scratch) / f"{task.name}.jsonl"
            path.write_bytes(to_lines(rows))
        path = files[SCORES] = Path(scratch) / SCORES
        path.write_text(json.dumps(figures, indent=1, sort_keys=True), encoding="utf-8")
        described = stages.upload(stage, files)
    stages.commit(stage, described, evaluation=status_of(stage, figures).to_dict())
    store.clear()
    return figures


def score_task(task: OpenTask, rows: Sequence[Row]) -> tuple[dict[str, float], list[Row]]:
    """A task's figures, and its rows with their own."""
    if task.retrieves:
        return retrieval_figures(rows)
    totals, each = score(task.name, task.kind, rows)
    return totals, [{**row, "scores": scores} for row, scores in zip(rows, each, strict=True)]


def status_of(stage: StageName, figures: Figures) -> EvaluationStatus:
    """The figures in the form of the status."""
    return EvaluationStatus(baseline=figures) if stage == "baseline-evaluate" else EvaluationStatus(final=figures)


def summary(figures: Figures) -> str:
    """One line: coco: BLEU_1 0.7123, …"""
    parts = []
    for name, metrics in figures.items():
        parts.append(f"{name}: " + ", ".join(f"{metric} {value:.4f}" for metric, value in metrics.items()))
    return "; ".join(parts)
