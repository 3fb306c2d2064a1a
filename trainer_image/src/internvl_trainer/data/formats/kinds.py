"""The kinds of rows, and how a record's kind is recognised."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

from . import captions, query_response, turns, vqa
from .media_fields import MEDIA_NAMES
from .source import Convert, Record

Kind = Literal["chat", "sharegpt", "messages", "query-response", "coco", "flickr", "vqav2"]

CONVERT: dict[Kind, Convert | None] = {
    "chat": None,
    "sharegpt": turns.from_sharegpt,
    "messages": turns.from_messages,
    "query-response": query_response.from_query_response,
    "coco": captions.from_caption,
    "flickr": captions.from_caption,
    "vqav2": vqa.from_answer,
}
_UPSTREAM_ROLES = ("human", "gpt", "system")
_UPSTREAM_MEDIA = ("image", "video")


def recognise(records: Iterable[Record]) -> Kind:
    """The kind of a file's first records; chat for an unknown kind, as its checks name the missing fields."""
    kinds = map(_recognise_one, records)
    return next((kind for kind in kinds if kind != "chat"), "chat")


def _recognise_one(record: Record) -> Kind:
    if isinstance(record.get("messages"), list):
        return "messages"
    if "conversations" in record:
        return "chat" if _is_upstreams(record) else "sharegpt"
    if any(question in record and answer in record for question, answer in query_response.PAIRS):
        return "query-response"
    has_media = any(record.get(name) for name in MEDIA_NAMES)
    if has_media and any(name in record for name in captions.CAPTION_NAMES):
        return "coco"
    return "chat"


def _is_upstreams(record: Record) -> bool:
    """Whether a record with `conversations` is a row of upstream's, whatever is wrong with it."""
    others = [name for name in MEDIA_NAMES if name not in _UPSTREAM_MEDIA and record.get(name)]
    system = isinstance(record.get("system"), str) and record["system"]
    return not others and not system and not _has_foreign_turns(record["conversations"])


def _has_foreign_turns(found: Any) -> bool:
    turns_found = [turn for turn in found if isinstance(turn, dict)] if isinstance(found, list) else []
    return any(
        ("role" in turn and "from" not in turn)
        or ("content" in turn and "value" not in turn)
        or turn.get("from") in ("user", "assistant", "model", "chatgpt", "bot", "bing")
        for turn in turns_found
    )
