"""Answers are stored in chunks of a few rows, so that an interrupted evaluation resumes where it was.

A chunk's rows do not depend on the world size, and one rank answers all of them: any world size gives the same answers
and can resume another's.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from internvl_trainer.artifacts.storage import Storage
from internvl_trainer.errors import UserError
from internvl_trainer.evaluate.annotations import Question
from internvl_trainer.evaluate.tasks import OpenTask

if TYPE_CHECKING:  # scoring reads chunks without PyTorch
    from internvl_trainer.model.greedy_answers import Generated

Row = dict[str, Any]
"""A line of a chunk, or of predictions."""
Answer: TypeAlias = "Generated | Row"
"""A text, or features (see retrieval_answers)."""

CHUNK_ROWS = 32
_LINE_ENDS = {ord(end): f"\\u{ord(end):04x}" for end in "\x85\u2028\u2029"}


@dataclass(frozen=True)
class Chunk:
    """Consecutive questions of a task."""

    task: OpenTask
    number: int

    @property
    def questions(self) -> list[Question]:
        """At most CHUNK_ROWS."""
        return self.task.questions[self.number * CHUNK_ROWS : (self.number + 1) * CHUNK_ROWS]


class ChunkStore:
    """The chunks under a stage's folder, for one state of tasks and weights (`version`)."""

    def __init__(self, storage: Storage, folder: str, version: str) -> None:
        self._storage, self._folder = storage, f"{folder}/chunks"
        self._current = f"{self._folder}/{hashlib.sha256(version.encode()).hexdigest()[:16]}"

    def stored(self) -> set[str]:
        """Keys of those that are done."""
        return {file.key for file in self._storage.list(f"{self._current}/")}

    def key(self, chunk: Chunk) -> str:
        """Where a chunk is stored."""
        return f"{self._current}/{chunk.task.name}/{chunk.number:06d}.jsonl"

    def write(self, chunk: Chunk, answers: Sequence[Answer]) -> None:
        """Store a chunk as a whole."""
        rows = [_row(question, answer) for question, answer in zip(chunk.questions, answers, strict=True)]
        self._storage.write(self.key(chunk), to_lines(rows))

    def read(self, task: OpenTask) -> list[Row]:
        """Every row of a task. Raises UserError naming a question that has no answer."""
        rows: list[Row] = []
        for chunk in chunks_of([task]):
            rows += [json.loads(line) for line in self._storage.read(self.key(chunk)).splitlines()]
        for position, question in enumerate(task.questions):
            if position >= len(rows) or rows[position]["id"] != question.id:
                message = (
                    f"{question.id!r} has no prediction in {self._storage.uri}/{self._current}; delete it to repeat"
                )
                raise UserError("PredictionMissing", message, question.place)
        return rows

    def clear(self) -> None:
        """Delete all chunks, including those of other versions."""
        self._storage.delete(f"{self._folder}/")


def chunks_of(tasks: Sequence[OpenTask]) -> Iterator[Chunk]:
    """All chunks, task by task."""
    for task in tasks:
        for number in range(-(-len(task.questions) // CHUNK_ROWS)):
            yield Chunk(task, number)


def to_lines(rows: Sequence[Row]) -> bytes:
    """JSONL with one row a line for every reader: escapes the Unicode line ends that JSON allows inside a text."""
    return "".join(json.dumps(row, ensure_ascii=False).translate(_LINE_ENDS) + "\n" for row in rows).encode()


def _row(question: Question, answer: Answer) -> Row:
    return {
        "id": question.id,
        "image": question.media.image_value(),
        **({"video": question.media.video_value()} if question.media.has_video else {}),
        "question": question.text,
        **_answer_fields(answer),
        "references": list(question.references),
    }


def _answer_fields(answer: Answer) -> Row:
    if isinstance(answer, dict):
        return {"features": answer}
    return {"prediction": answer.text, "at_limit": answer.at_limit}
