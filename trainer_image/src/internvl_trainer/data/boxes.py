"""Grounding: whether the answer's box covers the reference's."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

Box = tuple[float, float, float, float]
"""left, top, right, bottom, in thousandths of the picture's width and height."""

_ENOUGH = 0.5  # the overlap from which RefCOCO counts a box as found
_NUMBER = r"\s*(-?\d+(?:\.\d+)?)\s*"
_BOX = re.compile(rf"\[{','.join([_NUMBER] * 4)}\]")


def box_accuracy(prediction: str, references: Sequence[str]) -> float:
    """1.0 when the answer's first box overlaps a reference's by at least half (intersection over union), else 0.0."""
    found = find_box(prediction)
    wanted = [box for reference in references if (box := find_box(reference)) is not None]
    return float(found is not None and any(overlap(found, box) >= _ENOUGH for box in wanted))


def find_box(text: str) -> Box | None:
    """The first `[x1, y1, x2, y2]` of an answer such as `<ref>a cat</ref><box>[[10, 20, 300, 400]]</box>`."""
    return next(find_boxes(text), None)


def find_boxes(text: str) -> Iterator[Box]:
    """Every box of an answer, in its order."""
    for match in _BOX.finditer(text):
        left, top, right, bottom = (float(value) for value in match.groups())
        yield left, top, right, bottom


def overlap(one: Box, other: Box) -> float:
    """Intersection over union, 0 to 1."""
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    shared = max(0.0, width) * max(0.0, height)
    union = _area(one) + _area(other) - shared
    return shared / union if union > 0 else 0.0


def _area(box: Box) -> float:
    return max(0.0, box[2] - box[0]) * max(0.0, box[3] - box[1])
