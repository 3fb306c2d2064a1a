"""Boxes of answers and references on pictures."""

import pytest
from internvl_trainer.report.drawn_boxes import COLOURS, boxes_of, draw_boxes
from PIL import Image, ImageColor

TAGGED = "<ref>a cat</ref><box>[[100, 200, 500, 600]]</box>"


def test_boxes_of_a_row_with_a_mark_need_no_mark_of_their_own() -> None:
    texts = {"reference": [TAGGED], "before": ["I do not know"], "after": ["[[1, 2, 3, 4], [5, 6, 7, 8]]"]}
    assert boxes_of(texts) == {"reference": [(100, 200, 500, 600)], "after": [(1, 2, 3, 4), (5, 6, 7, 8)]}


def test_lists_of_numbers_in_other_rows_are_no_boxes() -> None:
    assert boxes_of({"reference": ["[1, 2, 3, 4]"], "after": ["[1, 2, 3, 4]"]}) == {}


def test_the_number_of_boxes_is_bounded() -> None:
    assert len(boxes_of({"after": [TAGGED * 50]})["after"]) == 20


def pixel(picture: Image.Image, x: int, y: int) -> object:
    return picture.getpixel((x, y))


def test_a_box_is_drawn_in_its_colour_at_thousandths_of_the_picture() -> None:
    picture = Image.new("RGB", (201, 101), "white")
    draw_boxes(picture, {"after": [(100, 200, 500, 600)]})
    colour = ImageColor.getrgb(COLOURS["after"])
    for x, y in ((20, 40), (100, 40), (20, 60), (100, 60), (60, 20), (60, 60)):
        assert pixel(picture, x, y) == colour
    assert pixel(picture, 60, 40) == (255, 255, 255)
    assert pixel(picture, 10, 10) == (255, 255, 255)


@pytest.mark.parametrize(
    "box",
    [
        pytest.param((-500.0, -1.0, 5000.0, 1e9), id="outside"),
        pytest.param((1000.0, 1000.0, 0.0, 0.0), id="the corners swapped"),
        pytest.param((float("-inf"), 0.0, float("inf"), 1000.0), id="without bounds"),
    ],
)
def test_a_box_is_kept_inside_the_picture(box: tuple[float, float, float, float]) -> None:
    picture = Image.new("RGB", (100, 50), "white")
    draw_boxes(picture, {"before": [box]})
    colour = ImageColor.getrgb(COLOURS["before"])
    assert pixel(picture, 0, 0) == pixel(picture, 99, 49) == colour
    assert pixel(picture, 50, 25) == (255, 255, 255)


def test_a_strip_of_one_pixel_can_have_boxes() -> None:
    picture = Image.new("RGB", (360, 1), "white")
    draw_boxes(picture, {"reference": [(0.0, 0.0, 1000.0, 1000.0)]})
    assert pixel(picture, 0, 0) == ImageColor.getrgb(COLOURS["reference"])


def test_the_legend_has_the_same_colours() -> None:
    from internvl_trainer.report.page import page_environment

    style = page_environment().get_template("style.html.j2").render()
    for kind, colour in COLOURS.items():
        assert f".boxes .{kind} {{ border-color: {colour}; }}" in style
