"""VQAv2: an annotations file and its questions file, as one record for each question."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from internvl_trainer.errors import UserError

from ..diagnostics import RowError
from .json_records import JsonArray, index_arrays, map_file
from .query_response import from_query_response
from .source import Record, parse_record

VQA_QUESTION = "{} Answer the question using a single word or phrase."
"""How upstream's scripts ask for a short answer."""
_LONGEST_ID = 18  # digits that fit 64 bits
_SUBTYPE = re.compile(rb'"data_subtype"\s*:\s*"([\w-]+)"')


@dataclass(frozen=True)
class VqaAnswers:
    """Records {image, question, answer, id} of VQAv2's annotations, each with its question from the other file.

    Attributes:
        ids, places: (n,) int64 ids of all questions, sorted, and where each is in `questions`.
        subset: names the pictures: COCO_<subset>_<image id>.jpg.
    """

    answers: JsonArray
    questions: JsonArray
    ids: np.ndarray
    places: np.ndarray
    subset: str

    @property
    def path(self) -> Path:
        """The annotations file on this machine."""
        return self.answers.path

    def __len__(self) -> int:
        return len(self.answers)

    def __getitem__(self, row: int) -> bytes:
        """Raises RowError for an answer without a question."""
        answer = parse_record(self.answers[row]) or {}
        number = answer.get("question_id")
        place = int(np.searchsorted(self.ids, _id(number)))
        if place == len(self.ids) or self.ids[place] != _id(number) or _id(number) < 0:
            raise RowError.single("QuestionMissing", f"found {number!r}, which no question has", "question_id")
        question = parse_record(self.questions[int(self.places[place])]) or {}
        if not isinstance(question.get("question"), str):
            raise RowError.single("ValueNotText", f"the question {number} of the other file has no text", "question_id")
        image = question.get("image", answer.get("image_id"))
        name = f"COCO_{self.subset}_{image:012d}.jpg" if isinstance(image, int) else image
        return json.dumps(
            {
                "id": number,
                "image": name,
                "query": VQA_QUESTION.format(question.get("question")),
                "response": answer.get("multiple_choice_answer"),
            }
        ).encode()

    def line_number(self, row: int) -> int:
        """1-based line of the annotations file, or record."""
        return self.answers.line_number(row)


def from_answer(record: Record) -> Record:
    """The row of a record, with its picture before the question, as upstream writes it."""
    return from_query_response({**record, "query": f"<image>\n{record['query']}"})


def open_vqa(answers: JsonArray, questions: Path, field: str) -> VqaAnswers:
    """The records of an annotations file. Raises UserError when the other file has no questions."""
    found = index_arrays(questions).get("questions")
    if found is None or len(found) == 0:
        raise UserError("QuestionsMissing", "expected VQAv2's questions file, found no `questions` in it", field)
    numbers = np.array(
        [_id((parse_record(found[row]) or {}).get("question_id")) for row in range(len(found))], np.int64
    )
    order = np.argsort(numbers, kind="stable")
    named = _SUBTYPE.search(map_file(questions)) or _SUBTYPE.search(map_file(answers.path))
    return VqaAnswers(answers, found, numbers[order], order, named[1].decode() if named else "train2014")


def _id(number: object) -> int:
    """The id of a question, which a file may write as text; -1 for one that is none."""
    text = str(number)
    return int(text) if text.isdecimal() and len(text) <= _LONGEST_ID else -1
