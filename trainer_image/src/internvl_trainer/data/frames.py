"""The frames of a row's video: a video file, a folder of pictures, or a list of pictures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from internvl_trainer.artifacts.media_listing import MOST_IN_FOLDER

from .diagnostics import Finding, RowError
from .media import OpenMedia, fetch_file_or_folder, open_picture, open_picture_with_notes
from .media_names import is_picture_name, natural_order, shown_path
from .row_schema import MediaFile, RowMedia
from .video import MOST_VIDEO_BYTES, VideoProblem, frame_indices, read_frames

if TYPE_CHECKING:
    from .sample import SampleSettings


def read_video(
    media: RowMedia,
    settings: SampleSettings,
    root: str,
    open_media: OpenMedia,
    rng: np.random.Generator | None = None,
) -> list[Image.Image]:
    """RGB frames of a row's video, or of its clip. Raises RowError."""
    found = _find(media, root, open_media)
    if isinstance(found, bytes):
        return _decode(found, media, settings, rng)
    opened: list[Image.Image] = []
    taken = 0
    for position in choose_frames(len(found), settings, rng):
        picture = open_picture(found[position], root, open_media, settings.decoding)
        taken += picture.width * picture.height * 3
        if taken > MOST_VIDEO_BYTES:
            message = f"the frames take more than {MOST_VIDEO_BYTES >> 30} GiB; take fewer, or scale them down"
            raise RowError.single("VideoUndecodable", message, found[position].field)
        opened.append(picture)
    return opened


def check_video(
    media: RowMedia, settings: SampleSettings, root: str, open_media: OpenMedia
) -> tuple[int, list[Finding]]:
    """Number of frames of a sample, and one warning of each kind about pictures among the frames.

    Decodes every picture, because training may draw any of them. Raises RowError.
    """
    found = _find(media, root, open_media)
    if isinstance(found, bytes):
        return len(_decode(found, media, settings, None)), []
    warnings: dict[str, Finding] = {}  # by reason
    for frame in found:
        for warning in open_picture_with_notes(frame, root, open_media, settings.decoding)[1]:
            warnings.setdefault(warning.reason, warning)
    return len(choose_frames(len(found), settings, None)), list(warnings.values())


def frames_of_folder(video: MediaFile, files: Sequence[str]) -> list[MediaFile]:
    """The pictures in a folder, without hidden files, in the order of the numbers in their names.

    Raises:
        RowError: there is no picture in it, or there are too many files.
    """
    if len(files) > MOST_IN_FOLDER:
        message = f"{video.path} is a folder of more than {MOST_IN_FOLDER} files; split it into several videos"
        raise RowError.single("VideoUnreadable", message, video.field)
    pictures = [path for path in files if is_picture_name(path) and not path.rpartition("/")[2].startswith(".")]
    if not pictures:
        message = f"{video.path} is a folder without pictures; expected a video file, or a folder of its frames"
        raise RowError.single("VideoUnreadable", message, video.field)
    return [MediaFile(path, video.field) for path in sorted(pictures, key=natural_order)]


def choose_frames(total: int, settings: SampleSettings, rng: np.random.Generator | None) -> list[int]:
    """Indices of the frames to take out of `total`: all if no more are asked for, as upstream does, else a sample."""
    count = settings.max_frames if rng is None else int(rng.integers(settings.min_frames, settings.max_frames + 1))
    if total <= count:
        return list(range(total))
    return frame_indices(count, total, sampling=settings.frame_sampling, rng=rng)


def _find(media: RowMedia, root: str, open_media: OpenMedia) -> bytes | Sequence[MediaFile]:
    """A video file's bytes, or the frames of a folder or list."""
    found: bytes | Sequence[MediaFile] = media.frames
    if media.video is not None:
        read = fetch_file_or_folder(media.video, root, open_media)
        found = read if isinstance(read, bytes) else frames_of_folder(media.video, read)
    if media.clip is not None and not isinstance(found, bytes):
        message = "frames that are pictures have no time to cut a clip by; remove clip, or list the frames of the clip"
        raise RowError.single("ClipInvalid", message, "clip")
    return found


def _decode(
    data: bytes, media: RowMedia, settings: SampleSettings, rng: np.random.Generator | None
) -> list[Image.Image]:
    try:
        return read_frames(
            data,
            min_frames=settings.min_frames,
            max_frames=settings.max_frames,
            sampling=settings.frame_sampling,
            clip=media.clip,
            rng=rng,
        )
    except VideoProblem as error:
        path = shown_path(media.video.path) if media.video else ""
        raise RowError.single("VideoUndecodable", f"{path}: {error}", "video") from error
