"""The tiles of a row: its images and video frames, cut and scaled."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from .frames import read_video
from .media import OpenMedia, open_picture
from .row_schema import RowMedia
from .tiling import JPEG_QUALITIES, as_image, cut_tiles, degrade_jpeg, fit_tile, stack_tiles

if TYPE_CHECKING:
    from .sample import SampleSettings


def read_media(
    media: RowMedia,
    settings: SampleSettings,
    root: str,
    open_media: OpenMedia,
    *,
    rng: np.random.Generator | None = None,
    augment: bool = False,
) -> list[np.ndarray]:
    """(n, 3, S, S) uint8 tiles of each image or frame, in the order of the row.

    Args:
        rng: draws video frames and, with `augment`, JPEG qualities; None makes both deterministic.

    Raises:
        RowError: a file is absent or broken.
    """
    quality = rng if augment else None
    if media.has_video:
        frames = read_video(media, settings, root, open_media, rng)
        return [stack_tiles([_fit(frame, settings, quality)]) for frame in frames]
    limit = tiles_per_image(settings, len(media.images))
    return [
        _tiles(open_picture(image, root, open_media, settings.decoding), settings, limit, quality)
        for image in media.images
    ]


def tiles_per_image(settings: SampleSettings, images: int) -> int:
    """Maximum tiles per image of a row with so many images, which share the tiles of a single one."""
    return max(1, settings.max_tiles // max(1, images))


def _tiles(
    image: Image.Image, settings: SampleSettings, max_tiles: int, quality: np.random.Generator | None
) -> np.ndarray:
    if not settings.dynamic_tiles:
        return stack_tiles([_fit(image, settings, quality)])
    tiles = cut_tiles(image, settings.image_size, settings.min_tiles, max_tiles, thumbnail=settings.thumbnail)
    return tiles if quality is None else stack_tiles([_fit(as_image(tile), settings, quality) for tile in tiles])


def _fit(image: Image.Image, settings: SampleSettings, quality: np.random.Generator | None) -> Image.Image:
    if quality is not None:
        image = degrade_jpeg(image, int(quality.choice(JPEG_QUALITIES)))
    return fit_tile(image, settings.image_size)
