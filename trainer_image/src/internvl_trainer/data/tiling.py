"""One image becomes square tiles, equal to upstream's in every decision and pixel."""

from __future__ import annotations

import io
from functools import lru_cache

import numpy as np
from PIL import Image

BLANK = (255, 255, 255)
"""RGB colour of the blank tile of a text-only row."""

MOST_TILES = 64
"""Maximum of a setting that counts tiles; the shapes that are tried grow with its square."""
JPEG_QUALITIES = range(75, 101)
"""JPEG qualities that upstream's data_augment draws from."""


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
