"""The frames of a row's video: a video file, a folder of pictures, or a list of pictures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from internvl_trainer.artifacts.media_listing import MOST_IN_FOLDER

from .diagnostics import Finding, RowError
from .media import OpenMedia, fetch_file_or_folder, open_picture_with_notes
from .media_names import is_picture_name, natural_order
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
    return read_video_with_notes(media, settings, root, open_media, rng)[0]


def read_video_with_notes(
    media: RowMedia,
    settings: SampleSettings,
    root: str,
    open_media: OpenMedia,
    rng: np.random.Generator | None = None,
) -> tuple[list[Image.Image], list[Finding]]:
    """The same with warnings about how frames that are pictures are decoded, each kind once."""
    if media.video is None:
        return _open_frames(media.frames, media, settings, root, open_media, rng)
    found = fetch_file_or_folder(media.video, root, open_media)
    if not isinstance(found, bytes):
        frames = frames_of_folder(media.video, found)
        return _open_frames(frames, media, settings, root, open_media, rng)
    try:
        frames_of_file = read_frames(
            found,
            min_frames=settings.min_frames,
            max_frames=settings.max_frames,
            sampling=settings.frame_sampling,
            clip=media.clip,
            rng=rng,
        )
        return frames_of_file, []
    except VideoProblem as error:
        raise RowError.single("VideoUndecodable", f"{media.video.path}: {error}", media.video.field) from error


def frames_of_folder(video: MediaFile, files: Sequence[str]) -> list[MediaFile]:
    """The pictures of a folder in the order of the numbers in their names; hidden files are left out.

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
    """Which of so many frames are taken: all when they are no more than asked for, as upstream; else as of a video."""
    count = settings.max_frames if rng is None else int(rng.integers(settings.min_frames, settings.max_frames + 1))
    if total <= count:
        return list(range(total))
    return frame_indices(count, total, sampling=settings.frame_sampling, rng=rng)


def _open_frames(
    frames: Sequence[MediaFile],
    media: RowMedia,
    settings: SampleSettings,
    root: str,
    open_media: OpenMedia,
    rng: np.random.Generator | None,
) -> tuple[list[Image.Image], list[Finding]]:
    if media.clip is not None:
        message = "frames that are pictures have no time to cut a clip by; remove clip, or list the frames of the clip"
        raise RowError.single("ClipInvalid", message, "clip")
    opened: list[Image.Image] = []
    warnings: dict[str, Finding] = {}  # by reason
    taken = 0
    for position in choose_frames(len(frames), settings, rng):
        picture, notes = open_picture_with_notes(frames[position], root, open_media, settings.decoding)
        taken += picture.width * picture.height * 3
        if taken > MOST_VIDEO_BYTES:
            message = f"the frames take more than {MOST_VIDEO_BYTES >> 30} GiB; take fewer, or scale them down"
            raise RowError.single("VideoUndecodable", message, frames[position].field)
        opened.append(picture)
        for note in notes:
            warnings.setdefault(note.reason, note)
    return opened, list(warnings.values())
