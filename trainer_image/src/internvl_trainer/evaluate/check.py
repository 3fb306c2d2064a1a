"""Preflight's look at the tasks: what an evaluation would stumble over, before a GPU is asked for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache

from internvl_api.run_config import RunConfig

from internvl_trainer.artifacts.sources import open_media
from internvl_trainer.data.diagnostics import Finding, RowError
from internvl_trainer.data.frames import read_video
from internvl_trainer.data.media import open_picture
from internvl_trainer.data.open_datasets import sample_settings
from internvl_trainer.data.row_schema import RowMedia
from internvl_trainer.data.sample import SampleSettings
from internvl_trainer.distributed import usable_cpus
from internvl_trainer.errors import UserError
from internvl_trainer.evaluate.annotations import Question
from internvl_trainer.evaluate.captions import check_tools
from internvl_trainer.evaluate.tasks import OpenTask, needs_tools, open_tasks, with_marks
from internvl_trainer.metrics import Reporter

_REMEMBERED = 1 << 16  # several questions are asked of one picture


def check_tasks(config: RunConfig, reporter: Reporter) -> list[OpenTask]:
    """Every annotation can be read and scored, and every picture decoded.

    Raises:
        UserError: naming the first thing that is wrong, and where.
    """
    tasks = open_tasks(config)
    if needs_tools(tasks):
        check_tools()
    for task in tasks:
        reporter.doing(f"checking the pictures of {task.name}: {len(task.questions)} questions")
        # Only how media are read matters here, not the model's template and sizes.
        settings = sample_settings(config, template="", image_size=1, context_tokens=1)
        _refuse(list(_check_media(task, settings)))
    return tasks


def _check_media(task: OpenTask, settings: SampleSettings) -> Iterator[tuple[Question, Finding]]:
    @lru_cache(maxsize=_REMEMBERED)
    def look(media: RowMedia) -> list[Finding]:
        return _problems(task.dataset.root, media, settings)

    def check(question: Question) -> list[Finding]:
        media = question.media
        if not media.has_video:
            with_marks(question, len(media.images))
        return look(media)

    with ThreadPoolExecutor(usable_cpus()) as pool:
        for question, findings in zip(task.questions, pool.map(check, task.questions), strict=True):
            for finding in findings:
                yield question, finding


def _problems(root: str, media: RowMedia, settings: SampleSettings) -> list[Finding]:
    """The first problem of a question's media."""
    try:
        for image in media.images:
            open_picture(image, root, open_media, settings.decoding)
        if media.has_video:
            read_video(media, settings, root, open_media)
    except RowError as error:
        return error.findings
    return []


def _refuse(found: Sequence[tuple[Question, Finding]]) -> None:
    if found:
        question, first = found[0]
        more = f" (and {len(found) - 1} more findings)" if len(found) > 1 else ""
        raise UserError(first.reason, f"{first}{more}", question.place)
