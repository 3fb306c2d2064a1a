"""ms-swift's `objects` (`ref`, `bbox`) in place of `<ref-object>` and `<bbox>`, in InternVL's notation."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from ..diagnostics import RowError
from .source import Record

_REFERENCE, _BOX = "<ref-object>", "<bbox>"
_SCALE = 1000  # InternVL's boxes count in thousandths of the picture's width and height
_MARGIN = 10  # thousandths outside of the picture that count as rounding of the annotation; moved onto the edge


def write_boxes(record: Record, turns: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The turns with names and boxes in place of their marks.

    `bbox_type`: real (pixels; the default, which needs `width` and `height`) or norm1 (0 to 1).

    Raises:
        RowError: marks and objects do not match, or a box cannot be scaled.
    """
    objects = record.get("objects")
    if not objects:
        return turns
    if not isinstance(objects, dict):
        raise RowError.single("ObjectsInvalid", "expected an object with ref and bbox", "objects")
    names, boxes = objects.get("ref") or [], objects.get("bbox") or []
    for mark, values, field in ((_REFERENCE, names, "objects.ref"), (_BOX, boxes, "objects.bbox")):
        marks = sum(turn["value"].count(mark) for turn in turns)
        if not isinstance(values, list) or marks != len(values):
            count = len(values) if isinstance(values, list) else 0
            raise RowError.single("ObjectsInvalid", f"{marks} {mark} marks for {count} entries", field)
    texts = {_REFERENCE: iter([f"<ref>{name}</ref>" for name in names]), _BOX: _boxes(record, objects, boxes)}
    pattern = re.compile(f"{_REFERENCE}|{_BOX}")
    return [{**turn, "value": pattern.sub(lambda mark: next(texts[mark[0]]), turn["value"])} for turn in turns]


def _boxes(record: Record, objects: dict[str, Any], boxes: list[Any]) -> Iterator[str]:
    kind = objects.get("bbox_type", "real")
    sizes = [objects.get(key) or record.get(key) for key in ("width", "height")]
    sizes = [size[0] if isinstance(size, list) and len(size) == 1 else size for size in sizes]
    for position, box in enumerate(boxes):
        field = f"objects.bbox[{position}]"
        if not isinstance(box, list) or len(box) != 4 or not all(type(value) in (int, float) for value in box):
            raise RowError.single("ObjectsInvalid", "expected [x1, y1, x2, y2]", field)
        if kind == "real" and not all(isinstance(size, int) and size > 0 for size in sizes):
            message = "boxes in pixels need the picture's size; add `width` and `height`, or use bbox_type norm1"
            raise RowError.single("ObjectsInvalid", message, field)
        if kind not in ("real", "norm1"):
            raise RowError.single("ObjectsInvalid", f"found {kind!r}; expected real or norm1", "objects.bbox_type")
        whole = (*sizes, *sizes) if kind == "real" else (1, 1, 1, 1)
        yield f"<box>[{_scaled(box, whole, field)}]</box>"


def _scaled(box: list[float], whole: tuple[Any, ...], field: str) -> list[int]:
    try:
        scaled = [round(value / size * _SCALE) for value, size in zip(box, whole, strict=True)]
    except (ValueError, OverflowError):  # NaN, or a number of hundreds of digits
        scaled = [-_SCALE]
    if not all(-_MARGIN <= value <= _SCALE + _MARGIN for value in scaled):
        size = f"{whole[0]} x {whole[1]}"
        message = f"found {str(box)[:100]}, outside of the picture ({size}); correct the box, the size or bbox_type"
        raise RowError.single("ObjectsInvalid", message, field)
    return [min(max(value, 0), _SCALE) for value in scaled]
