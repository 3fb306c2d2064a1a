"""Preflight's look at the tasks: what an evaluation would stumble over, before a GPU is asked for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache

from internvl_api.run_config import RunConfig

from internvl_trainer.artifacts.sources import open_media
from internvl_trainer.data.dataset_meta import DatasetDescription
from internvl_trainer.data.diagnostics import Finding, RowError
from internvl_trainer.data.media import fetch_media
from internvl_trainer.data.pictures import ImageProblem, decode_image
from internvl_trainer.data.row_schema import MediaFile
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
        _refuse(list(_check_media(task)))
    return tasks


def _check_media(task: OpenTask) -> Iterator[tuple[Question, Finding]]:
    @lru_cache(maxsize=_REMEMBERED)
    def look(media: MediaFile) -> Finding | None:
        return _problem(task.dataset, media)

    def check(question: Question) -> list[Finding]:
        media = question.media
        if media.video is None:
            with_marks(question, len(media.images))
        return [finding for file in media.files if (finding := look(file)) is not None]

    with ThreadPoolExecutor(usable_cpus()) as pool:
        for question, findings in zip(task.questions, pool.map(check, task.questions), strict=True):
            for finding in findings:
                yield question, finding


def _problem(dataset: DatasetDescription, media: MediaFile) -> Finding | None:
    try:
        data = fetch_media(media, dataset.root, open_media)
        if media.field != "video":
            decode_image(data)
    except RowError as error:
        return error.findings[0]
    except ImageProblem as error:
        return Finding("ImageUndecodable", f"{media.path}: {error}", media.field)
    return None


def _refuse(found: Sequence[tuple[Question, Finding]]) -> None:
    if found:
        question, first = found[0]
        more = f" (and {len(found) - 1} more findings)" if len(found) > 1 else ""
        raise UserError(first.reason, f"{first}{more}", question.place)
