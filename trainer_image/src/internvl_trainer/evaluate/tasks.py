"""The tasks of a run: their questions read, their prompts decided, and each made ready for the model."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from internvl_api.run_config import RunConfig
from internvl_api.spec.evaluation import TASK_DEFAULTS, EvaluationTask, TaskKind, is_caption

from internvl_trainer.artifacts.sources import fetch_file, parent_uri
from internvl_trainer.data.boxes import find_box
from internvl_trainer.data.dataset_meta import DatasetDescription
from internvl_trainer.data.diagnostics import errors_of
from internvl_trainer.data.row_schema import IMAGE_MARK, MediaFile, RowMedia, Turn, place_marks
from internvl_trainer.errors import UserError
from internvl_trainer.evaluate.annotations import Question, read_questions
from internvl_trainer.retrieval.caption_files import PairRow, read_captions
from internvl_trainer.retrieval.caption_text import CAPTION_PROMPT

CAPTION_BEAMS = 5
"""Defaults for captions of a retrieval model, from upstream's evaluate_caption.py."""


@dataclass(frozen=True)
class OpenTask:
    """One task with its questions at hand; every question has its text.

    Attributes:
        dataset: where its media are and how many tiles a picture may have; `name` is the task's.
    """

    kind: TaskKind
    dataset: DatasetDescription
    questions: list[Question]
    min_new_tokens: int
    max_new_tokens: int
    beams: int = 1

    @property
    def retrieves(self) -> bool:
        """Whether pictures and captions are compared, and nothing is asked: a question is a picture."""
        return self.kind.startswith("retrieval")

    @property
    def name(self) -> str:
        """What spec.evaluation.tasks calls it."""
        return self.dataset.name


def open_tasks(config: RunConfig) -> list[OpenTask]:
    """Fetch and read every annotation file. Raises UserError naming the task's field, or the file and line."""
    return [
        open_task(name, _prompted(task) if config.model.kind == "retrieval" else task)
        for name, task in config.evaluation.tasks.items()
    ]


def open_task(name: str, task: EvaluationTask) -> OpenTask:
    """One task; see open_tasks."""
    defaults = TASK_DEFAULTS[task.task]
    path = fetch_file(task.annotation, field=f"spec.evaluation.tasks.{name}.annotation")
    if task.task.startswith("retrieval"):
        questions = read_pictures(path, task)
    else:
        read = read_questions(path, task.annotation)
        questions = [replace(each, text=decide_text(each, task.prompt, defaults.prompt)) for each in read]
    if task.task.startswith("caption"):
        questions = group_captions(questions)
    if task.task == "grounding":
        check_boxes(questions)
    return OpenTask(
        kind=task.task,
        dataset=DatasetDescription(
            name, task.root or parent_uri(task.annotation), task.annotation, max_tiles=task.max_dynamic_patch
        ),
        questions=questions[: task.limit],
        min_new_tokens=defaults.min_new_tokens if task.min_new_tokens is None else task.min_new_tokens,
        max_new_tokens=defaults.max_new_tokens if task.max_new_tokens is None else task.max_new_tokens,
        beams=task.beams or 1,
    )


def _prompted(task: EvaluationTask) -> EvaluationTask:
    """What a retrieval model, which follows no instructions, continues with a caption, and how it searches for it."""
    return task.model_copy(
        update={"prompt": task.prompt or CAPTION_PROMPT, "beams": CAPTION_BEAMS if task.beams is None else task.beams}
    )


def read_pictures(path: Path, task: EvaluationTask) -> list[Question]:
    """A question for each picture of a caption file, its captions the references. Raises UserError naming the line."""
    found = read_captions(path, task.format or TASK_DEFAULTS[task.task].format or "", name=task.annotation)
    errors = errors_of(found.findings)
    if errors:
        more = f" (and {len(errors) - 1} more findings)" if len(errors) > 1 else ""
        raise UserError(errors[0].reason, f"{errors[0]}{more}")
    captions: dict[str, list[PairRow]] = {}
    for row in found.rows:
        captions.setdefault(row.image, []).append(row)
    return [
        Question(
            id=image,
            media=RowMedia((MediaFile(image, "image"),)),
            references=tuple(row.caption for row in own),
            place=f"{task.annotation}:{own[0].line}",
        )
        for image, own in captions.items()
    ]


def needs_tools(tasks: Sequence[OpenTask]) -> bool:
    """Whether a task is scored by programs outside of this one."""
    return any(is_caption(task.kind) for task in tasks)


def decide_text(question: Question, prompt: str | None, default: str | None) -> str:
    """The question: the task's prompt (`{}` in it stands for the row's question), the row's own, or the default.

    Raises:
        UserError: there is none, or the row has nothing for `{}`.
    """
    if prompt is None:
        text = question.text or default
    elif "{}" in prompt:
        text = prompt.replace("{}", question.plain) if question.plain else None
    else:
        text = prompt
    if text is None:
        wanted = "{} of the task's prompt" if prompt else "the task; give the task a prompt"
        raise UserError("QuestionMissing", f"the row has no question for {wanted}", question.place)
    return text


def group_captions(questions: Iterable[Question]) -> list[Question]:
    """Questions that show and ask the same become one with the references of all, in the file's order."""
    grouped: dict[tuple[RowMedia, str | None, str | None], Question] = {}
    for question in questions:
        key = question.media, question.text, question.system
        first = grouped.get(key)
        references = (*first.references, *question.references) if first else question.references
        grouped[key] = replace(first or question, references=references)
    return list(grouped.values())


def check_boxes(questions: Iterable[Question]) -> None:
    """Raises UserError for the first reference without a box."""
    for question in questions:
        for reference in question.references:
            if find_box(reference) is None:
                message = f"expected <box>[[x1, y1, x2, y2]]</box> in the reference, found {reference!r}"
                raise UserError("BoxMissing", message, question.place)


def with_marks(question: Question, pictures: int) -> str:
    """The question's text with an `<image>` mark for each picture (or frame); first, as upstream does, if it has none.

    Raises:
        UserError: it has marks, but not as many.
    """
    text, media = question.text or "", question.media
    if media.has_image_list and IMAGE_MARK not in text:
        text = f"{IMAGE_MARK}\n" * len(media.images) + text
    placed = place_marks([Turn("human", text)], media, frames=pictures)[0].text
    if (marks := placed.count(IMAGE_MARK)) != pictures:
        message = f"the question has {marks} {IMAGE_MARK} marks for {pictures} pictures: {question.text!r}"
        raise UserError("ImageMarkMismatch", message, question.place)
    return placed
