"""Which test rows the report shows, with small copies of their pictures."""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from internvl_api.publish_condition import METRICS
from internvl_api.run_config import RunConfig

from internvl_trainer.artifacts.sources import open_media, parent_uri
from internvl_trainer.data.diagnostics import RowError
from internvl_trainer.data.media import OpenMedia, open_picture
from internvl_trainer.data.media_names import shown_path
from internvl_trainer.data.open_datasets import picture_decoding
from internvl_trainer.data.pictures import Decoding, as_jpeg, small_copy
from internvl_trainer.data.row_schema import IMAGE_MARK, MediaFile, RowMedia
from internvl_trainer.errors import UserError
from internvl_trainer.report.drawn_boxes import Boxes, boxes_of, draw_boxes
from internvl_trainer.report.record import Record, Row, pair_rows

_SHOWN, _SHOWN_LEAST = 36, 3  # over all tasks, and of each
_THUMBNAIL = 360  # pixels, of the longest side
_VISIBLE = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"}  # to U+2400 Control Pictures
_SPREAD = "from across the set"
_SCORES = ("highest score", "lowest score")


@dataclass(frozen=True)
class Sample:
    """One test row. `metric` names the figure of `before_score` and `after_score`, where rows have one.

    Attributes:
        boxes: whose boxes are drawn on the picture (drawn_boxes.COLOURS).
    """

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
    boxes: tuple[str, ...] = ()


def choose_samples(record: Record, read_media: OpenMedia = open_media) -> dict[str, list[Sample]]:
    """Task to the rows to show: a third gained most, a third least, a third is spread over the file."""
    tasks = {task: pairs for task in record.predictions if (pairs := pair_rows(*record.predictions[task]))}
    each = max(_SHOWN_LEAST, _SHOWN // 3 // max(1, len(tasks)) // 3 * 3)
    return {
        task: [
            _sample(*pairs[place], why, record.config, task, read_media)
            for place, why in choose_rows(
                [_gain(*pair) for pair in pairs], each, _SCORES if None in record.predictions[task] else None
            )
        ]
        for task, pairs in tasks.items()
    }


def choose_rows(
    gains: Sequence[float | None], count: int, reasons: tuple[str, str] | None = None
) -> list[tuple[int, str]]:
    """(position, why) of up to `count` rows; without gains all are evenly spread.

    Args:
        reasons: to show the rows of the largest and of the smallest figures; None where the figures are differences,
            whose sign decides: only a gain is one.
    """
    known = sorted((place for place, gain in enumerate(gains) if gain is not None), key=lambda p: (-(gains[p] or 0), p))
    third = min(count // 3, len(known) // 2)
    most, least = known[:third], list(reversed(known[len(known) - third :]))
    if reasons:
        chosen = dict.fromkeys(most, reasons[0]) | dict.fromkeys(least, reasons[1])
    else:
        chosen = {place: "largest gain" for place in most if (gains[place] or 0) > 0}
        chosen |= {place: _least(gains[place] or 0) for place in least}
    rest = [place for place in range(len(gains)) if place not in chosen]
    wanted = min(count - len(chosen), len(rest))
    return [*chosen.items(), *((rest[index * len(rest) // wanted], _SPREAD) for index in range(wanted))]


def _least(gain: float) -> str:
    return "largest loss" if gain < 0 else "smallest gain" if gain else "no gain"


def thumbnail(image: MediaFile, root: str, read_media: OpenMedia, decoding: Decoding, boxes: Boxes) -> str:
    """A small JPEG of a picture, with boxes on it, as a data URI. Raises RowError, or what `read_media` does."""
    picture = small_copy(open_picture(image, root, read_media, decoding), _THUMBNAIL)
    draw_boxes(picture, boxes)
    return data_uri(as_jpeg(picture), "image/jpeg")


def data_uri(data: bytes, kind: str) -> str:
    """The data as a data: URI."""
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


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
    boxes = _boxes(before, after, row)
    picture, problem = _picture(row, root, read_media, picture_decoding(config), boxes)
    return Sample(
        why=why,
        question=str(row.get("question") or "").removeprefix(IMAGE_MARK).strip(),  # its picture is beside it
        references=[visible(reference) for reference in row.get("references") or ()],
        before=None if before is None else visible(before.get("prediction")),
        after=None if after is None else visible(after.get("prediction")),
        metric=metric,
        before_score=_score(before, metric),
        after_score=_score(after, metric),
        picture=picture,
        picture_problem=problem,
        boxes=tuple(boxes) if picture else (),
    )


def _boxes(before: Row | None, after: Row | None, row: Row) -> Boxes:
    """The boxes of a row with exactly one picture; with several, a box does not say which picture it is in."""
    if len(RowMedia.from_fields(row).images) != 1:
        return {}
    references = [text for text in row.get("references") or () if isinstance(text, str)]
    answers = [[text] if isinstance(text := (each or {}).get("prediction"), str) else [] for each in (before, after)]
    return boxes_of({"reference": references, "before": answers[0], "after": answers[1]})


def _picture(
    row: Row, root: str, read_media: OpenMedia, decoding: Decoding, boxes: Boxes
) -> tuple[str | None, str | None]:
    """The first picture of a row, or why it cannot be shown: a report is worth having without it."""
    images = RowMedia.from_fields(row).images
    if not images:
        return None, None
    try:
        return thumbnail(images[0], root, read_media, decoding, boxes), None
    except (RowError, UserError, OSError, ValueError) as error:
        message = error.findings[0].message if isinstance(error, RowError) else error
        return None, f"{shown_path(images[0].path)} cannot be shown: {message}"


def visible(value: Any) -> str:
    """A model's answer with control characters made visible."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text.translate(_VISIBLE)
