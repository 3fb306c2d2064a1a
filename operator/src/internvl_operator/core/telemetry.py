"""Read what pods report. Whatever a pod sends, the result fits into a status that the API server accepts.

Numbers are finite and at most 64 bits wide, strings are bounded and free of control characters, maps are bounded. A
part that breaks these rules is left out; the rest of the report still counts.
"""

import math
import re
import unicodedata
from typing import Any, NamedTuple, TypeVar

from internvl_api.address import redact
from internvl_api.constants import TERMINATION_MESSAGE_LIMIT
from internvl_api.status import Bandwidth, CheckpointStatus, Heartbeat, Progress, StageResult
from internvl_api.types import ApiModel
from pydantic import ValidationError
from pydantic.alias_generators import to_camel
from pydantic_core import from_json

TEXT_LIMIT = 1024  # characters of a message of the kubelet or the control plane
_REPORT_LIMIT = TERMINATION_MESSAGE_LIMIT  # characters of a string in a report
MAP_LIMIT = 64  # entries of a map in a report
_KEY_LIMIT = 253
_REASON_LIMIT = 128  # of a condition's reason
_INT64 = 2**63
_ESCAPES = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]|\x1b[\]PX^_][^\x07\x1b]*(?:\x07|\x1b\\)?|\x1b[ -/]*[0-~]")
_OPTIONAL_PARTS = ("progress", "checkpoint", "artifacts", "evaluation", "message")
M = TypeVar("M", bound=ApiModel)


class Answer(NamedTuple):
    """One training process's answer to GET /progress."""

    progress: Progress
    checkpoint: CheckpointStatus | None
    heartbeat: Heartbeat | None


def read_answer(body: bytes) -> Answer | None:
    """The body of /progress; None when it is not a JSON object or its figures have wrong types."""
    fields = _with_rates(_object(body))
    progress = _model(Progress, fields)
    if fields is None or progress is None:
        return None
    checkpoint, heartbeat = fields.get("checkpoint"), fields.get("heartbeat")
    return Answer(progress, _checkpoint(checkpoint), _model(Heartbeat, heartbeat))


def read_result(message: str) -> StageResult | None:
    """A container's termination message; None when it is not a StageResult."""
    if not message.lstrip().startswith("{"):
        return None
    fields = _object(message.encode(errors="replace"))
    if fields is None:
        return None
    _with_rates(fields.get("progress"))
    if isinstance(reason := fields.get("reason"), str):
        fields["reason"] = reason[:_REASON_LIMIT]
    if "checkpoint" in fields and _checkpoint(fields["checkpoint"]) is None:
        del fields["checkpoint"]
    return _model(StageResult, fields) or _model(
        StageResult, {key: value for key, value in fields.items() if key not in _OPTIONAL_PARTS}
    )


def clean_text(text: object, limit: int = TEXT_LIMIT) -> str:
    """The text without control and formatting characters, at most `limit` characters; empty unless a string is given.

    Lines stay. Escape sequences go, and the secret parts of addresses.

    >>> clean_text("loss \\x1b[31m2 https://me:pw@data.example/x?sig=1")
    'loss 2 https://data.example/x?…'
    """
    if not isinstance(text, str):
        return ""
    # Cut first: the work stays proportional to the limit.
    cut = text if len(text) <= 2 * limit else text[: 2 * limit]
    shown = printable(redact(cut)).strip()
    return shown if len(shown) <= limit and len(cut) == len(text) else shown[: limit - 1] + "…"


def printable(text: str) -> str:
    """The text without a terminal's escape sequences, control and formatting characters; lines and tabs stay.

    >>> printable("a\\x1b[31mred\\x1b[0m\\x1b]0;title\\x07!")
    'ared!'
    """
    return text if text.isprintable() else "".join(filter(_is_printable, _ESCAPES.sub("", text)))


def _is_printable(character: str) -> bool:
    return character in "\n\t" or unicodedata.category(character) not in ("Cc", "Cf", "Cs", "Zl", "Zp")


def _object(body: bytes) -> dict[str, Any] | None:
    try:
        raw = from_json(body)  # bounds the depth; json.loads recurses
    except ValueError:
        return None
    return _clean(raw) if isinstance(raw, dict) else None


def _model(model: type[M], fields: object) -> M | None:
    """The model of the fields; None when they do not fit."""
    if not isinstance(fields, dict):
        return None
    try:
        # Cleaned again: a text such as "NaN" has become a number.
        return model.model_validate(_clean(model.model_validate(fields).to_dict()))
    except ValidationError:
        return None


def _with_rates(progress: Any) -> Any:
    """`progress`, changed in place: without the bandwidths that are no number within the bounds of Rate."""
    if isinstance(progress, dict) and "bandwidth" in progress:
        told = progress.pop("bandwidth")
        rates = {name: told.get(to_camel(name)) for name in Bandwidth.model_fields} if isinstance(told, dict) else {}
        progress["bandwidth"] = {to_camel(name): rate for name, rate in rates.items() if _is_rate(name, rate)}
    return progress


def _is_rate(name: str, value: object) -> bool:
    return value is not None and _model(Bandwidth, {name: value}) is not None


def _checkpoint(fields: object) -> CheckpointStatus | None:
    found = _model(CheckpointStatus, fields)
    return found if found and found.step >= 0 else None


def _clean(value: Any) -> Any:
    """The value without parts that no status can hold; None for a number out of range."""
    if isinstance(value, str):
        return clean_text(value, _REPORT_LIMIT)
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, int) and not -_INT64 <= value < _INT64:
        return None
    if isinstance(value, dict):
        pairs = ((clean_text(key, _KEY_LIMIT), _clean(part)) for key, part in list(value.items())[:MAP_LIMIT])
        return {key: part for key, part in pairs if part is not None}
    if isinstance(value, list):
        return [_clean(part) for part in value[:MAP_LIMIT]]
    return value
