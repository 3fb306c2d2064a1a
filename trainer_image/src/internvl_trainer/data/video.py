"""Frames of a video, sampled as in upstream and decoded with PyAV."""

from __future__ import annotations

import io
from collections.abc import Sequence

import av
import numpy as np
from PIL import Image

MOST_FRAME_PIXELS = 36_000_000
"""Maximum pixels of a frame: slightly more than 8K."""

MOST_VIDEO_BYTES = 2 << 30
"""Maximum bytes of all frames taken from a video, 3 for each pixel."""


class VideoProblem(ValueError):
    """The bytes are no video that can be decoded."""


def frame_indices(
    count: int, total: int, *, sampling: str, fps: float = 1.0, rng: np.random.Generator | None = None
) -> list[int]:
    """Indices of frames to take from `total`.

    Args:
        sampling: "middle" (of `count` equal intervals), "rand" (one from each interval, "middle" without an rng), or
            "fpsX" (X frames a second, at most `count`).

    Raises:
        ValueError: another sampling, or no frames at all.
    """
    if total < 1:
        raise ValueError("there are no frames to take")
    if sampling.startswith("fps"):
        return _frames_per_second(float(sampling.removeprefix("fps")), count, total, fps)
    if sampling not in ("middle", "rand"):
        raise ValueError(f"frame sampling is {sampling!r}; expected middle, rand or fps<number>")
    edges = np.linspace(0, total, min(count, total) + 1).astype(int)
    starts, lasts = edges[:-1], edges[1:] - 1
    if sampling == "rand" and rng is not None:
        chosen = [int(rng.integers(start, last + 1)) for start, last in zip(starts, lasts, strict=True)]
    else:
        chosen = [int(index) for index in (starts + lasts) // 2]
    return chosen + [chosen[-1]] * (count - len(chosen))  # a short video repeats its last frame


def _frames_per_second(rate: float, limit: int, total: int, fps: float) -> list[int]:
    step = 1 / rate
    seconds = np.arange(step / 2, total / fps + step / 2, step)
    indices = [int(index) for index in np.around(seconds * fps).astype(int) if index < total]
    return indices[:limit] or [0]


def read_frames(
    data: bytes,
    *,
    min_frames: int,
    max_frames: int,
    sampling: str,
    clip: Sequence[float] | None = None,
    rng: np.random.Generator | None = None,
) -> list[Image.Image]:
    """Between `min_frames` and `max_frames` RGB frames (the maximum, without an rng).

    Args:
        clip: (start, end) in seconds; the whole video when None.

    Raises:
        VideoProblem: no video stream, no frames, or a clip outside the video.
    """
    try:
        with av.open(io.BytesIO(data), mode="r") as container:
            if not container.streams.video:
                raise VideoProblem("there is no video stream in it")
            stream = container.streams.video[0]
            if stream.codec_context is None:  # a codec that FFmpeg does not know
                raise VideoProblem("its codec is not known")
            _check_frame(stream.codec_context.width, stream.codec_context.height)
            fps = float(stream.average_rate or 1)
            total = stream.frames or _count_frames(data)
            first, total = _clip_range(clip, total, fps)
            count = max_frames if rng is None else int(rng.integers(min_frames, max_frames + 1))
            wanted = [first + index for index in frame_indices(count, total, sampling=sampling, fps=fps, rng=rng)]
            frames = _decode(container, set(wanted))
    except VideoProblem:
        raise
    except (av.FFmpegError, ValueError, OverflowError, MemoryError, UnicodeError) as error:
        raise VideoProblem(f"cannot be decoded ({error}), {len(data)} bytes") from error
    if lost := [index for index in wanted if index not in frames]:
        raise VideoProblem(f"frame {lost[0]} of {total} cannot be decoded; the file is cut short")
    return [frames[index] for index in wanted]


def _clip_range(clip: Sequence[float] | None, total: int, fps: float) -> tuple[int, int]:
    """(first frame, number of frames)."""
    if clip is None:
        return 0, total
    start, end = clip
    first, count = int(start * fps), int((end - start) * fps)
    if first < 0 or count < 1 or first + count > total:
        raise VideoProblem(f"clip [{start}, {end}] is not inside the video, which is {total / fps:.2f} s long")
    return first, count


def _count_frames(data: bytes) -> int:
    """The number of frames, for containers whose header has none."""
    with av.open(io.BytesIO(data), mode="r") as container:
        return sum(_check_frame(frame.width, frame.height) >= 0 for frame in container.decode(video=0))


def _check_frame(width: int, height: int) -> int:
    """The bytes of a frame. Raises VideoProblem for one that would take too much memory."""
    if width * height > MOST_FRAME_PIXELS:
        raise VideoProblem(
            f"its frames have {width} x {height} pixels; expected at most {MOST_FRAME_PIXELS // 1_000_000} million, "
            "so scale it down"
        )
    return width * height * 3


def _decode(container: av.container.InputContainer, wanted: set[int]) -> dict[int, Image.Image]:
    """The wanted frames, decoded in order up to the last one, as seeking is not exact for every codec."""
    frames: dict[int, Image.Image] = {}
    last, taken = max(wanted), 0
    for index, frame in enumerate(container.decode(video=0)):
        size = _check_frame(frame.width, frame.height)
        if index in wanted:
            taken += size
            if taken > MOST_VIDEO_BYTES:
                raise VideoProblem(
                    f"{len(wanted)} frames take more than {MOST_VIDEO_BYTES >> 30} GiB; take fewer, or scale it down"
                )
            frames[index] = Image.fromarray(frame.to_ndarray(format="rgb24"))
        if index == last:
            break
    return frames
