"""The preview of a dataset as one self-contained HTML page: its figures, and rows as the model sees them."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version

import numpy as np
from PIL import Image

from internvl_trainer.data.statistics import DatasetStatistics, histogram
from internvl_trainer.report.page import page_environment
from internvl_trainer.report.samples import data_uri

_SHOWN_TILES, _TILE_PIXELS = 16, 168  # of a row; pixels of a tile's side on the page, at twice its size


@dataclass(frozen=True)
class PreviewRow:
    """A row of the page.

    Attributes:
        pieces: (supervised, plain or context; text).
        tiles: data URIs.
    """

    headline: str
    pieces: Sequence[tuple[str, str]]
    tiles: Sequence[str]
    tiles_left_out: int


def tile_uris(tiles: np.ndarray) -> tuple[list[str], int]:
    """Small JPEGs of the first tiles (n, 3, S, S) as data URIs, and how many are left out."""
    shown = [_uri(tile) for tile in tiles[:_SHOWN_TILES]]
    return shown, len(tiles) - len(shown)


def render_data_page(name: str, stats: DatasetStatistics, rows: Sequence[PreviewRow]) -> str:
    """The page of a dataset."""
    histograms = [("Tokens of a row", histogram(stats.lengths)), ("Tiles of a row", histogram(stats.tiles))]
    return page_environment().get_template("data.html.j2").render(
        name=name, stats=stats, rows=rows, histograms=histograms, version=version("internvl-trainer")
    )  # fmt: skip


def _uri(tile: np.ndarray) -> str:
    image = Image.fromarray(np.ascontiguousarray(tile.transpose(1, 2, 0)))
    image.thumbnail((_TILE_PIXELS, _TILE_PIXELS))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=80)
    return data_uri(buffer.getvalue(), "image/jpeg")
