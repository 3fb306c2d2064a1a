"""Rows of one question and its answer, with or without earlier rounds: `query`/`response`, `question`/`answer`."""

from __future__ import annotations

from typing import Any

from ..diagnostics import RowError
from .grounding import write_boxes
from .media_fields import media_of
from .source import Record
from .turns import finish_row

PAIRS = (("query", "response"), ("question", "answer"), ("prompt", "completion"))


def from_query_response(record: Record) -> Record:
    """The row of a record; `history` holds earlier [question, answer] rounds."""
    names = next((pair for pair in PAIRS if pair[0] in record and pair[1] in record), None)
    if names is None:
        raise RowError.single("ConversationsMissing", "expected query and response, found neither", "query")
    history = record.get("history") or []
    rounds = [*_rounds(history), tuple((record[name], name) for name in names)]
    turns = [
        {"from": role, "value": _text(*cell)}
        for each in rounds
        for role, cell in zip(("human", "gpt"), each, strict=True)
    ]
    return finish_row(record, write_boxes(record, turns), media_of(record), read=(*names, "history"))


def _rounds(history: Any) -> list[tuple[tuple[Any, str], ...]]:
    if not isinstance(history, list) or not all(isinstance(each, list) and len(each) == 2 for each in history):
        raise RowError.single("ConversationsMissing", "expected a list of [question, answer]", "history")
    return [
        tuple((value, f"history[{position}][{side}]") for side, value in enumerate(each))
        for position, each in enumerate(history)
    ]


def _text(value: Any, field: str) -> str:
    if not isinstance(value, str):
        raise RowError.single("ValueNotText", "expected text", field)
    return value
