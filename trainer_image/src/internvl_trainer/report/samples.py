"""Which test rows the report shows, with small copies of their pictures."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from internvl_api.publish_condition import METRICS
from internvl_api.run_config import RunConfig
from PIL import ImageOps

from internvl_trainer.artifacts.sources import open_media, parent_uri
from internvl_trainer.data.diagnostics import RowError
from internvl_trainer.data.media import OpenMedia, open_picture
from internvl_trainer.data.media_names import shown_path
from internvl_trainer.data.open_datasets import picture_decoding
from internvl_trainer.data.pictures import Decoding
from internvl_trainer.data.row_schema import IMAGE_MARK, MediaFile, RowMedia
from internvl_trainer.errors import UserError
from internvl_trainer.report.record import Record, Row

_SHOWN, _SHOWN_LEAST = 36, 3  # over all tasks, and of each
_THUMBNAIL = 360  # pixels, of the longest side
_VISIBLE = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"}  # to U+2400 Control Pictures
_SPREAD = "from across the set"
_GAINS, _SCORES = ("largest gain", "smallest gain"), ("highest score", "lowest score")


@dataclass(frozen=True)
class Sample:
    """One test row. `metric` names the figure of `before_score` and `after_score`, where rows have one."""

    why: str
    question: str
    references: list[str]
    before: str | None
    after: str | None
    metric: str | None = None
    before_score: float | None = None
    after_score: float | None = None
    picture: str | None = None
    picture_problem: str | None = None


def choose_samples(record: Record, read_media: OpenMedia = open_media) -> dict[str, list[Sample]]:
    """Task to the rows to show: a third gained most, a third least, a third is spread over the file."""
    tasks = {task: pairs for task in record.predictions if (pairs := _pairs(*record.predictions[task]))}
    each = max(_SHOWN_LEAST, _SHOWN // 3 // max(1, len(tasks)) // 3 * 3)
    return {
        task: [
            _sample(*pairs[place], why, record.config, task, read_media)
            for place, why in choose_rows(
                [_gain(*pair) for pair in pairs], each, _SCORES if None in record.predictions[task] else _GAINS
            )
        ]
        for task, pairs in tasks.items()
    }


def choose_rows(gains: Sequence[float | None], count: int, reasons: tuple[str, str] = _GAINS) -> list[tuple[int, str]]:
    """(position, why) of up to `count` rows; without gains all are evenly spread.

    Args:
        reasons: to show the rows of the largest and of the smallest figures.
    """
    known = sorted((place for place, gain in enumerate(gains) if gain is not None), key=lambda p: (-(gains[p] or 0), p))
    third = min(count // 3, len(known) // 2)
    chosen = dict.fromkeys(known[:third], reasons[0])
    chosen |= dict.fromkeys(reversed(known[len(known) - third :]), reasons[1])
    rest = [place for place in range(len(gains)) if place not in chosen]
    wanted = min(count - len(chosen), len(rest))
    return [*chosen.items(), *((rest[index * len(rest) // wanted], _SPREAD) for index in range(wanted))]


def thumbnail(image: MediaFile, root: str, read_media: OpenMedia, decoding: Decoding) -> str:
    """A small JPEG of a picture as a data URI. Raises RowError, or what `read_media` does."""
    picture = open_picture(image, root, read_media, decoding)
    small = ImageOps.contain(picture, (_THUMBNAIL, _THUMBNAIL))
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=80)
    return data_uri(buffer.getvalue(), "image/jpeg")


def data_uri(data: bytes, kind: str) -> str:
    """The data as a data: URI."""
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def _pairs(before: list[Row] | None, after: list[Row] | None) -> list[tuple[Row | None, Row | None]]:
    """The rows of both files that answer the same question, in the order of the newer file."""
    if after is None:
        return [(row, None) for row in before or ()]
    found = {_key(row): row for row in before or ()}
    return [(found.get(_key(row)), row) for row in after]


def _key(row: Row) -> str:
    return json.dumps([row.get("id"), row.get("image"), row.get("question")], sort_keys=True)


def _metric(row: Row | None) -> str | None:
    """The figure by which a row is judged: CIDEr where there is one, else the first known, else the first."""
    scores = (row or {}).get("scores") or {}
    ranked = ("CIDEr", *METRICS, *scores)
    return next((name for name in ranked if isinstance(scores.get(name), int | float)), None)


def _score(row: Row | None, metric: str | None) -> float | None:
    value = ((row or {}).get("scores") or {}).get(metric)
    return float(value) if isinstance(value, int | float) else None


def _gain(before: Row | None, after: Row | None) -> float | None:
    """From before to after; without a before, the score itself, so that the best and the worst are shown."""
    metric = _metric(after or before)
    new, old = _score(after, metric), _score(before, metric)
    if new is None:
        return old
    return new if old is None else new - old


def _sample(
    before: Row | None, after: Row | None, why: str, config: RunConfig, name: str, read_media: OpenMedia
) -> Sample:
    row: dict[str, Any] = after or before or {}
    metric = _metric(row)
    task = config.evaluation.tasks[name]
    root = task.root or parent_uri(task.annotation)
    picture, problem = _picture(row, root, read_media, picture_decoding(config))
    return Sample(
        why=why,
        question=str(row.get("question") or "").removeprefix(IMAGE_MARK).strip(),  # its picture is beside it
        references=[_text(reference) for reference in row.get("references") or ()],
        before=None if before is None else _text(before.get("prediction")),
        after=None if after is None else _text(after.get("prediction")),
        metric=metric,
        before_score=_score(before, metric),
        after_score=_score(after, metric),
        picture=picture,
        picture_problem=problem,
    )


def _picture(row: Row, root: str, read_media: OpenMedia, decoding: Decoding) -> tuple[str | None, str | None]:
    """The first picture of a row, or why it cannot be shown: a report is worth having without it."""
    images = RowMedia.from_fields(row).images
    if not images:
        return None, None
    try:
        return thumbnail(images[0], root, read_media, decoding), None
    except (RowError, UserError, OSError, ValueError) as error:
        message = error.findings[0].message if isinstance(error, RowError) else error
        return None, f"{shown_path(images[0].path)} cannot be shown: {message}"


def _text(value: Any) -> str:
    """A model's answer with control characters made visible."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text.translate(_VISIBLE)
