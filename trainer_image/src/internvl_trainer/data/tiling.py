"""One image becomes square tiles, equal to upstream's in every decision and pixel."""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from functools import lru_cache

import numpy as np
from PIL import Image, UnidentifiedImageError

BLANK = (255, 255, 255)
"""RGB colour of the blank tile of a text-only row."""

JPEG_QUALITIES = range(75, 101)
"""JPEG qualities that upstream's data_augment draws from."""


MOST_PIXELS = 89_000_000
"""Of one picture; it takes 4 bytes a pixel while it is decoded."""

warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # MOST_PIXELS is the smaller bound

# Formats of pictures alone: no PostScript, which starts another program, and no container of other files.
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF")
# What Pillow's plugins raise for bytes that are no picture; they let errors of parsing through.
_UNDECODABLE = (
    OSError, SyntaxError, ValueError, EOFError, TypeError, LookupError, ArithmeticError, AttributeError, MemoryError,
    NotImplementedError, RuntimeError, struct.error, zlib.error, Image.DecompressionBombError,
)  # fmt: skip


class ImageProblem(ValueError):
    """The bytes cannot be decoded to the end as an image."""


def decode_image(data: bytes) -> Image.Image:
    """The RGB image, fully decoded.

    Raises:
        ImageProblem: the bytes are empty, of unknown format or cut short; training never sees half an image.
    """
    if not data:
        raise ImageProblem("the file is empty")
    try:
        image = Image.open(io.BytesIO(data), formats=_FORMATS)
        check_pixels(*image.size)
        image.load()
        return image if image.mode == "RGB" else image.convert("RGB")  # convert would copy
    except ImageProblem:
        raise
    except _UNDECODABLE as error:
        unknown = isinstance(error, UnidentifiedImageError)  # its text holds a memory address, which changes each time
        said = "cannot identify image file" if unknown else error
        raise ImageProblem(f"cannot be decoded ({said}), {len(data)} bytes") from error


def check_pixels(width: int, height: int) -> None:
    """Raises ImageProblem for a picture that would take too much memory: about 4 bytes for each pixel."""
    if width * height > MOST_PIXELS:
        raise ImageProblem(
            f"it has {width} x {height} pixels, {width * height / 1e6:.0f} million; expected at most "
            f"{MOST_PIXELS // 1_000_000} million, so scale it down"
        )


@lru_cache(maxsize=32)
def grids(min_tiles: int, max_tiles: int) -> tuple[tuple[int, int], ...]:
    """(columns, rows) of every grid with a permitted number of tiles, fewest tiles first.

    The order among grids of one size decides ties between equal aspect ratios. Upstream sorts a set of pairs, so equal
    keys keep the order of the set's iteration; building the same set gives the same order.
    """
    found = {
        (columns, rows)
        for tiles in range(min_tiles, max_tiles + 1)
        for columns in range(1, tiles + 1)
        for rows in range(1, tiles + 1)
        if min_tiles <= columns * rows <= max_tiles
    }
    return tuple(sorted(found, key=lambda grid: grid[0] * grid[1]))


def choose_grid(width: int, height: int, image_size: int, min_tiles: int, max_tiles: int) -> tuple[int, int]:
    """(columns, rows) of the grid nearest in aspect ratio; a tie goes to the larger if the image fills half of it."""
    aspect = width / height
    best, best_distance = (1, 1), float("inf")
    for columns, rows in grids(min_tiles, max_tiles):
        distance = abs(aspect - columns / rows)
        fills = width * height > 0.5 * image_size * image_size * columns * rows
        if distance < best_distance or (distance == best_distance and fills):
            best, best_distance = (columns, rows), distance
    return best


def count_tiles(width: int, height: int, image_size: int, min_tiles: int, max_tiles: int, *, thumbnail: bool) -> int:
    """The number of tiles that `cut_tiles` gives for an image of this size."""
    columns, rows = choose_grid(width, height, image_size, min_tiles, max_tiles)
    return columns * rows + (1 if thumbnail and columns * rows > 1 else 0)


def cut_tiles(image: Image.Image, image_size: int, min_tiles: int, max_tiles: int, *, thumbnail: bool) -> np.ndarray:
    """(n, 3, S, S) uint8 tiles: the image resized to the chosen grid and cut row by row.

    With `thumbnail`, several tiles are followed by a small copy of the whole image.
    """
    columns, rows = choose_grid(*image.size, image_size, min_tiles, max_tiles)
    cut = columns * rows
    tiles = np.empty((cut + (thumbnail and cut > 1), 3, image_size, image_size), np.uint8)
    _fill(tiles[:cut], image.resize((image_size * columns, image_size * rows)), columns, rows)
    if cut < len(tiles):
        _fill(tiles[cut:], image.resize((image_size, image_size)), 1, 1)
    return tiles


def _fill(tiles: np.ndarray, image: Image.Image, columns: int, rows: int) -> None:
    """Copy the picture of a grid into its tiles, colour by colour, which moves whole rows of a tile at once."""
    size = tiles.shape[-1]
    grid = tiles.reshape(rows, columns, 3, size, size)
    for colour, plane in enumerate(image.split()):
        grid[:, :, colour] = np.asarray(plane).reshape(rows, size, columns, size).transpose(0, 2, 1, 3)


def fit_tile(image: Image.Image, image_size: int) -> Image.Image:
    """The whole image as one tile, resized with bicubic interpolation."""
    if image.size == (image_size, image_size):
        return image
    return image.resize((image_size, image_size), Image.Resampling.BICUBIC)


def blank_tile(image_size: int) -> Image.Image:
    """The white tile of a text-only row."""
    return Image.new("RGB", (image_size, image_size), BLANK)


def degrade_jpeg(image: Image.Image, quality: int) -> Image.Image:
    """The image after JPEG compression: upstream's data_augment."""
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=quality)
    return Image.open(buffer).convert("RGB")


def stack_tiles(tiles: list[Image.Image]) -> np.ndarray:
    """(n, 3, S, S) uint8 array of RGB images of one size."""
    return np.ascontiguousarray(np.stack([np.asarray(tile) for tile in tiles]).transpose(0, 3, 1, 2))


def as_image(tile: np.ndarray) -> Image.Image:
    """The RGB image of a (3, S, S) uint8 tile."""
    return Image.fromarray(np.ascontiguousarray(tile.transpose(1, 2, 0)))
