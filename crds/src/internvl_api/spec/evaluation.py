"""The section `evaluation` of a spec, and the defaults of each kind of task."""

from typing import Literal

from pydantic import Field

from internvl_api.publish_condition import (
    ANSWER_METRICS,
    CAPTION_METRICS,
    GROUNDING_METRICS,
    RETRIEVAL_METRICS,
    VQA_METRICS,
)
from internvl_api.types import ApiModel, Source

TaskKind = Literal[
    "caption-coco", "caption-flickr30k", "caption-nocaps", "caption", "vqa", "grounding",
    "retrieval-flickr30k", "retrieval-flickr30k-cn", "retrieval-coco", "retrieval",
]  # fmt: skip
PairFormat = Literal["flickr", "coco"]
TASK_NAME_PATTERN = r"^[A-Za-z][A-Za-z0-9_]{0,39}$"


class TaskDefaults(ApiModel):
    """Metrics, prompt and answer lengths of a kind of task, where the user sets none."""

    metrics: tuple[str, ...]
    prompt: str | None = None
    min_new_tokens: int
    max_new_tokens: int
    format: PairFormat | None = None


# Prompt and lengths of upstream's evaluation scripts (OpenGVLab/InternVL, internvl_chat/eval).
_CAPTION = TaskDefaults(
    metrics=CAPTION_METRICS,
    prompt="Provide a one-sentence caption for the provided image.",
    min_new_tokens=8,
    max_new_tokens=30,
)


def _retrieval(form: PairFormat | None) -> TaskDefaults:
    return TaskDefaults(metrics=RETRIEVAL_METRICS, min_new_tokens=0, max_new_tokens=1, format=form)


TASK_DEFAULTS: dict[TaskKind, TaskDefaults] = {
    "caption-coco": _CAPTION,
    "caption-flickr30k": _CAPTION,
    "caption-nocaps": _CAPTION,
    "caption": _CAPTION,
    "vqa": TaskDefaults(metrics=VQA_METRICS, min_new_tokens=1, max_new_tokens=10),
    "grounding": TaskDefaults(metrics=GROUNDING_METRICS, min_new_tokens=1, max_new_tokens=100),
    "retrieval-flickr30k": _retrieval("flickr"),
    "retrieval-flickr30k-cn": _retrieval("flickr"),
    "retrieval-coco": _retrieval("coco"),
    "retrieval": _retrieval(None),
}


def is_caption(kind: TaskKind) -> bool:
    """Whether the answers are captions, which Java takes minutes to score."""
    return kind.startswith("caption")


def makes_text(kind: TaskKind) -> bool:
    """Whether the model writes the answers, so that they can be empty, cut or all the same."""
    return not kind.startswith("retrieval")


class EvaluationTask(ApiModel):
    """One test set: its rows, the prompt, and the length of an answer. Decoding is greedy."""

    task: TaskKind = Field(description="Kind of task; sets metrics, prompt, answer lengths and annotation format")
    annotation: Source = Field(
        description="JSONL of conversations, or JSON in COCO's format (images, annotations); of a retrieval task, a "
        "file in the given `format`"
    )
    root: Source | None = Field(None, description="Folder or archive of the images; default: the annotation's folder")
    prompt: str | None = Field(
        None,
        min_length=1,
        max_length=4000,
        description="Prompt of every row ({} stands for the row's question); default: the row's own, else the task's",
    )
    min_new_tokens: int | None = Field(
        None, ge=0, le=4096, description="Minimum tokens of an answer; default: the task's (captions 8, others 1)"
    )
    max_new_tokens: int | None = Field(
        None,
        ge=1,
        le=4096,
        description="Maximum tokens of an answer; default: the task's (captions 30, vqa 10, grounding 100)",
    )
    beams: int | None = Field(
        None, ge=1, le=32, description="Beams for captions of a retrieval model, default 5; chat models decode greedily"
    )
    format: PairFormat | None = Field(
        None,
        description="Format of a retrieval task's annotation: flickr (lines of image,caption) or coco; default: the "
        "task's",
    )
    max_dynamic_patch: int | None = Field(
        None, ge=1, le=64, description="Maximum number of tiles of an image; overrides image.maxDynamicPatch"
    )
    limit: int | None = Field(None, ge=1, description="Evaluate only this many rows, from the start; default: all")


class Evaluation(ApiModel):
    """Evaluation of the trained model and, with `baseline`, of the base model. Without tasks no stage evaluates."""

    tasks: dict[str, EvaluationTask] = Field(default_factory=dict, max_length=50, description="Test sets by name")
    baseline: bool = Field(False, description="Also evaluate the base model, before training")
    publish_if: str | None = Field(
        None,
        max_length=500,
        description="Condition on the metrics; publish only if it holds: 'CIDEr >= 1.2', "
        "'coco.CIDEr > baseline.coco.CIDEr'",
    )
    batch_size: int = Field(8, ge=1, le=1024, description="Number of rows that a rank answers at a time")
    every_steps: int | None = Field(
        None,
        ge=1,
        description="Number of steps between two losses on data.validation; default: checkpoint.everySteps",
    )

    def metrics(self) -> dict[str, tuple[str, ...]]:
        """Task name -> names of its metrics."""
        return {
            name: (*TASK_DEFAULTS[task.task].metrics, *(ANSWER_METRICS if makes_text(task.task) else ()))
            for name, task in self.tasks.items()
        }
