"""A row's media: files fetched from the dataset's root, images and video frames cut into tiles."""

from __future__ import annotations

import base64
from collections.abc import Callable
from typing import TYPE_CHECKING
from urllib.parse import unquote_to_bytes

import numpy as np
from PIL import Image

from ..errors import BadFile
from .diagnostics import RowError
from .pictures import Decoding, ImageProblem, decode_image
from .row_schema import MediaFile, RowMedia, is_inline, media_path, shown_path
from .tiling import JPEG_QUALITIES, as_image, cut_tiles, degrade_jpeg, fit_tile, stack_tiles
from .video import VideoProblem, read_frames

if TYPE_CHECKING:
    from .sample import SampleSettings

OpenMedia = Callable[[str, str], bytes]
"""(root, relative path) -> the file's bytes. Raises FileNotFoundError or BadFile."""


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
    if media.video is not None:
        frames = read_video(media.video, media.clip, settings, root, open_media, rng)
        return [stack_tiles([_fit(frame, settings, quality)]) for frame in frames]
    limit = tiles_per_image(settings, len(media.images))
    return [
        _tiles(_read_image(image, root, open_media, settings.decoding), settings, limit, quality)
        for image in media.images
    ]


def tiles_per_image(settings: SampleSettings, images: int) -> int:
    """The most tiles of one image, for a row of so many images: they share the tiles of a single one."""
    return max(1, settings.max_tiles // max(1, images))


def fetch_media(media: MediaFile, root: str, open_media: OpenMedia) -> bytes:
    """The bytes of one file. Raises RowError with the reason PathLeavesRoot, …Missing or …Unreadable."""
    if (inline := read_inline(media)) is not None:
        return inline
    try:
        path = media_path(media.path)
    except ValueError as error:
        raise RowError.single("PathLeavesRoot", str(error), media.field) from error
    try:
        return open_media(root, path)
    except FileNotFoundError as error:
        raise RowError.single(f"{media.kind}Missing", f"{media.path} is not below {root}", media.field) from error
    except IsADirectoryError as error:
        message = f"{media.path} is a folder; expected a file"
        raise RowError.single(f"{media.kind}Unreadable", message, media.field) from error
    except BadFile as error:
        raise RowError.single(f"{media.kind}Unreadable", error.message, media.field) from error


def read_inline(media: MediaFile) -> bytes | None:
    """The bytes of a `data:` URL; None for a path."""
    if not is_inline(media.path):
        return None
    header, _, content = media.path.partition(",")
    try:
        return base64.b64decode(content, validate=True) if header.endswith(";base64") else unquote_to_bytes(content)
    except ValueError as error:
        message = f"{shown_path(media.path)} is no valid data: URL ({error}); expected data:image/png;base64,..."
        raise RowError.single(f"{media.kind}Unreadable", message, media.field) from error


def read_video(
    video: MediaFile,
    clip: tuple[float, float] | None,
    settings: SampleSettings,
    root: str,
    open_media: OpenMedia,
    rng: np.random.Generator | None = None,
) -> list[Image.Image]:
    """RGB frames of a video, or of its clip (start, end) in seconds. Raises RowError."""
    data = fetch_media(video, root, open_media)
    try:
        return read_frames(
            data,
            min_frames=settings.min_frames,
            max_frames=settings.max_frames,
            sampling=settings.frame_sampling,
            clip=clip,
            rng=rng,
        )
    except VideoProblem as error:
        raise RowError.single("VideoUndecodable", f"{video.path}: {error}", video.field) from error


def _read_image(image: MediaFile, root: str, open_media: OpenMedia, decoding: Decoding) -> Image.Image:
    try:
        return decode_image(fetch_media(image, root, open_media), decoding)
    except ImageProblem as error:
        raise RowError.single("ImageUndecodable", f"{shown_path(image.path)}: {error}", image.field) from error


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
