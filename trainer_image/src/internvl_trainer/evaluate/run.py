"""The evaluation stages: all ranks answer rows, rank 0 scores all answers but captions."""

from __future__ import annotations

import logging
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from internvl_api.pipeline import AnsweringStage, figures_stage
from internvl_api.run_config import RunConfig
from internvl_api.spec.evaluation import is_caption
from internvl_api.status import StageName, StageResult

from internvl_trainer.data.open_datasets import picture_decoding, sample_settings
from internvl_trainer.evaluate.chunks import Answer, Chunk, ChunkStore, chunks_of
from internvl_trainer.evaluate.generate import Answerer, one_ahead
from internvl_trainer.evaluate.results import (
    Figures,
    score_rows,
    status_of,
    summary,
    write_figures,
    write_rows,
)
from internvl_trainer.evaluate.retrieval_answers import RetrievalAnswerer
from internvl_trainer.evaluate.tasks import OpenTask, open_tasks
from internvl_trainer.evaluate.weights import Evaluated, find_trained, load_evaluated
from internvl_trainer.metrics import Reporter
from internvl_trainer.model.language_shard import LanguageShard
from internvl_trainer.model.tokenizer import read_tokenizer
from internvl_trainer.retrieval.load import LoadedRetrievalModel
from internvl_trainer.run_context import GroupContext, RunContext

logger = logging.getLogger(__name__)


def evaluate(context: GroupContext) -> StageResult:
    """Answer every row that has no answer yet, then score all but captions.

    All ranks call it; rank 0 writes the result.

    Raises:
        UserError: a task or the model cannot be used.
    """
    stage, config, group, reporter = context.stage, context.config, context.group, context.reporter
    reporter.doing("reading the tasks")
    tasks = open_tasks(config)
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
        answer_chunks(context, make_answerer(config, evaluated), pending, store, shard=evaluated.shard)
    group.barrier()
    figures: Figures | None = None
    if group.leads:
        reporter.doing("storing the answers")
        figures = write_result(context, tasks, store)
    figures = group.first(figures)
    return StageResult(
        stage=stage,
        outcome="succeeded",
        reason="Evaluated",
        message=summary(figures) or f"answered {sum(len(task.questions) for task in tasks)} rows",
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


def answer_chunks(
    context: GroupContext,
    answerer: AnyAnswerer,
    pending: Sequence[Chunk],
    store: ChunkStore,
    shard: LanguageShard | None = None,
) -> None:
    """Answer this model's share of the chunks, each stored when it is done. The ranks of a model answer the same."""
    group, reporter = context.group, context.reporter
    ranks = shard.size if shard else 1
    models = group.world_size // ranks
    own = pending[group.rank // ranks :: models]
    pace = Pace(reporter, rows=sum(len(chunk.questions) for chunk in pending), models=models)
    logger.info("%d chunks to answer, %d of them here", len(pending), len(own))
    pool = ThreadPoolExecutor(torch.get_num_threads())
    try:
        for chunk, prompts in one_ahead(own, lambda chunk: answerer.prompts(chunk, pool)):
            reporter.update(detail=f"answering {chunk.task.name}")
            answers = answerer.answers(chunk.task, [prompt.result() for prompt in prompts])
            if shard is None or shard.stores:
                store.write(chunk, answers)
            pace.answered(len(prompts))
    finally:
        pool.shutdown(cancel_futures=True)  # stop reading pictures when told to stop


@dataclass
class Pace:
    """Progress of all ranks, assuming that the other models are as fast as this rank's."""

    reporter: Reporter
    rows: int
    models: int
    done: int = 0
    began: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        self.reporter.update(step=0, total_steps=self.rows)

    def answered(self, rows: int) -> None:
        """Count this many more rows."""
        self.done = min(self.rows, self.done + rows * self.models)
        rate = self.done / (time.monotonic() - self.began)
        self.reporter.update(
            step=self.done, samples_per_second=round(rate, 3), eta_seconds=round((self.rows - self.done) / rate, 1)
        )
        logger.info("answered %d of %d rows, %.2f a second", self.done, self.rows, rate)


def _answering(stage: StageName) -> AnsweringStage:
    if stage not in ("baseline-evaluate", "evaluate"):
        raise ValueError(f"{stage} answers nothing")
    return stage


def write_result(context: RunContext, tasks: Sequence[OpenTask], store: ChunkStore) -> Figures:
    """Store predictions and figures; then the manifest; then delete the chunks. Captions have no scores yet."""
    stage, stages, figures = _answering(context.stage), context.stages, Figures()
    for each in (figures_stage(stage, context.config.evaluation), stage):
        stages.withdraw(each)
    with tempfile.TemporaryDirectory(prefix="evaluate-") as scratch:
        files: dict[str, Path] = {}
        for task in tasks:
            rows = store.read(task)
            if not is_caption(task.kind):
                figures[task.name], rows = score_rows(task.name, task.kind, rows)
            files |= write_rows(Path(scratch), task.name, rows)
        files |= write_figures(Path(scratch), figures)
        described = stages.upload(stage, files)
    stages.commit(stage, described, evaluation=status_of(stage, figures).to_dict())
    store.clear()
    return figures
