import io

import numpy as np
import pytest
from internvl_trainer.data.pictures import ImageProblem, decode_image
from internvl_trainer.data.tiling import choose_grid, count_tiles, cut_tiles, degrade_jpeg, stack_tiles
from PIL import Image


def picture(width: int, height: int, mode: str = "RGB") -> Image.Image:
    values = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values).convert(mode)


def encoded(image: Image.Image, kind: str) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("width", "height", "max_tiles", "grid"),
    [
        pytest.param(300, 200, 6, (3, 2), id="3:2 photo, the guide's example"),
        pytest.param(640, 480, 6, (3, 2), id="4:3 is nearer 3:2 than 1:1"),
        pytest.param(480, 640, 12, (3, 4), id="3:4 exactly, with room for it"),
        pytest.param(448, 448, 6, (1, 1), id="square that fills one tile"),
        pytest.param(2000, 2000, 6, (2, 2), id="large square takes the larger equal ratio"),
        pytest.param(3000, 100, 6, (6, 1), id="banner"),
        pytest.param(1, 5000, 6, (1, 6), id="one pixel wide"),
        pytest.param(500, 500, 1, (1, 1), id="tiling off by number"),
    ],
)
def test_grid(width: int, height: int, max_tiles: int, grid: tuple[int, int]) -> None:
    assert choose_grid(width, height, 448, 1, max_tiles) == grid


@pytest.mark.parametrize("thumbnail", [True, False])
@pytest.mark.parametrize(("width", "height"), [(300, 200), (100, 100), (40, 400)])
def test_counting_agrees_with_cutting(width: int, height: int, thumbnail: bool) -> None:
    tiles = cut_tiles(picture(width, height), 56, 1, 6, thumbnail=thumbnail)
    assert len(tiles) == count_tiles(width, height, 56, 1, 6, thumbnail=thumbnail)
    assert tiles.shape == (len(tiles), 3, 56, 56)


@pytest.mark.parametrize(("width", "height"), [(300, 200), (100, 100), (40, 400)])
def test_tiles_are_the_resized_picture_to_the_last_pixel(width: int, height: int) -> None:
    image = picture(width, height)
    columns, rows = choose_grid(width, height, 56, 1, 6)
    resized = image.resize((56 * columns, 56 * rows))
    boxes = [(56 * x, 56 * y, 56 * x + 56, 56 * y + 56) for y in range(rows) for x in range(columns)]
    whole = [image.resize((56, 56))] if len(boxes) > 1 else []
    expected = stack_tiles([*(resized.crop(box) for box in boxes), *whole])
    np.testing.assert_array_equal(cut_tiles(image, 56, 1, 6, thumbnail=True), expected)


def test_tiles_come_row_by_row_with_the_whole_image_last() -> None:
    image = Image.new("RGB", (112, 112))
    colours = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0)]
    for position, colour in enumerate(colours):
        image.paste(
            colour, (56 * (position % 2), 56 * (position // 2), 56 * (position % 2) + 56, 56 * (position // 2) + 56)
        )
    tiles = cut_tiles(image, 56, 4, 4, thumbnail=True)
    assert [tuple(tile[:, 28, 28]) for tile in tiles[:4]] == colours
    assert len(tiles) == 5
    assert tuple(tiles[4][:, 5, 5]) == colours[0]


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "1"])
def test_other_colour_modes_become_rgb(mode: str) -> None:
    kind = "TIFF" if mode == "CMYK" else "PNG"
    assert decode_image(encoded(picture(20, 10, mode), kind)).mode == "RGB"


JPEG, PNG = encoded(picture(200, 100), "JPEG"), encoded(picture(200, 100), "PNG")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        pytest.param(b"", "the file is empty", id="empty"),
        pytest.param(
            b"<html>not found</html>", "cannot be decoded (cannot identify image file), 22 bytes", id="html page"
        ),
        pytest.param(JPEG[: len(JPEG) // 2], "cannot be decoded (image file is truncated", id="half a jpeg"),
        pytest.param(PNG[: len(PNG) // 2], "cannot be decoded (", id="half a png"),
        pytest.param(PNG[:40], "cannot be decoded (", id="png header only"),
        pytest.param(bytes(1000), "cannot be decoded (cannot identify image file", id="zeros"),
    ],
)
def test_broken_images_are_refused(data: bytes, message: str) -> None:
    with pytest.raises(ImageProblem) as caught:
        decode_image(data)
    assert str(caught.value).startswith(message)


def test_augmentation_changes_pixels_but_not_size() -> None:
    image = picture(56, 56)
    degraded = degrade_jpeg(image, 75)
    assert degraded.size == image.size
    difference = np.abs(np.asarray(degraded).astype(int) - np.asarray(image))
    assert 0 < difference.mean() < 64
