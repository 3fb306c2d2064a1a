"""Boxes of answers and references, drawn on the pictures of the report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Literal

from PIL import Image, ImageDraw

from internvl_trainer.data.boxes import Box, find_boxes

Kind = Literal["reference", "before", "after"]
Boxes = Mapping[Kind, Sequence[Box]]

COLOURS: dict[Kind, str] = {"reference": "#2fbf71", "before": "#f2a03d", "after": "#3d9df2"}
"""In the order in which they are drawn; style.html.j2 has the same."""

_MARK = "<box>"
_MOST = 20  # of each kind
_SCALE = 1000  # coordinates are thousandths of the picture's width and height
_LINE, _EDGE = 4, 1  # pixels: the coloured line, and the dark edge on both its sides


def boxes_of(texts: Mapping[Kind, Sequence[str]]) -> Boxes:
    """The boxes of each kind of text; none of rows in which no text has a <box>.

    Decoding may leave out the mark, so in a row that has one somewhere every `[x1, y1, x2, y2]` is a box.
    """
    if not any(_MARK in text for each in texts.values() for text in each):
        return {}
    found = {
        kind: list(islice((box for text in each for box in find_boxes(text)), _MOST)) for kind, each in texts.items()
    }
    return {kind: boxes for kind, boxes in found.items() if boxes}


def draw_boxes(picture: Image.Image, boxes: Boxes) -> None:
    """Draw into the picture, coordinates outside of it on its edge."""
    draw = ImageDraw.Draw(picture)
    for kind, colour in COLOURS.items():
        for box in boxes.get(kind, ()):
            left, top, right, bottom = _pixels(box, picture.size)
            edge = (left - _EDGE, top - _EDGE, right + _EDGE, bottom + _EDGE)
            draw.rectangle(edge, outline="black", width=_LINE + 2 * _EDGE)
            draw.rectangle((left, top, right, bottom), outline=colour, width=_LINE)


def _pixels(box: Box, size: tuple[int, int]) -> tuple[int, int, int, int]:
    width, height = size
    xs = sorted(round(_inside(value) * (width - 1)) for value in box[::2])
    ys = sorted(round(_inside(value) * (height - 1)) for value in box[1::2])
    return xs[0], ys[0], xs[1], ys[1]


def _inside(value: float) -> float:
    return min(max(value, 0.0), _SCALE) / _SCALE
