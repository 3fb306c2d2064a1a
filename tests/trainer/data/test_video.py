import numpy as np
import pytest
from golden import GOLDEN
from internvl_trainer.data.video import VideoProblem, frame_indices, read_frames

CLIP = (GOLDEN / "data" / "videos" / "clip.mp4").read_bytes()


@pytest.mark.parametrize(
    ("count", "total", "sampling", "expected"),
    [
        pytest.param(5, 10, "middle", [0, 2, 4, 6, 8], id="middle of pairs"),
        pytest.param(4, 100, "middle", [12, 37, 62, 87], id="middle of quarters"),
        pytest.param(5, 3, "middle", [0, 1, 2, 2, 2], id="short video repeats its last frame"),
        pytest.param(1, 1, "middle", [0], id="one frame"),
        pytest.param(3, 9, "rand", [1, 4, 7], id="rand without a generator is the middle"),
        pytest.param(8, 50, "fps1", [5, 15, 25, 35, 45], id="one a second at 10 fps"),
        pytest.param(2, 50, "fps1", [5, 15], id="fps keeps to the maximum"),
    ],
)
def test_frame_indices(count: int, total: int, sampling: str, expected: list[int]) -> None:
    assert frame_indices(count, total, sampling=sampling, fps=10.0) == expected


def test_random_frames_come_one_from_each_part_and_repeat_with_the_seed() -> None:
    first = frame_indices(5, 100, sampling="rand", rng=np.random.default_rng(3))
    again = frame_indices(5, 100, sampling="rand", rng=np.random.default_rng(3))
    assert first == again
    assert [index // 20 for index in first] == [0, 1, 2, 3, 4]
    assert first != frame_indices(5, 100, sampling="rand", rng=np.random.default_rng(4))


def test_an_unknown_sampling_is_refused() -> None:
    with pytest.raises(ValueError, match="frame sampling is 'best'; expected middle, rand or fps<number>"):
        frame_indices(5, 10, sampling="best")


def read(data: bytes, **options: object) -> list[bytes]:
    settings: dict[str, object] = {"min_frames": 5, "max_frames": 5, "sampling": "middle"}
    return [frame.tobytes() for frame in read_frames(data, **(settings | options))]  # type: ignore[arg-type]


def test_a_clip_range_takes_frames_from_inside_it() -> None:
    whole = read(CLIP, min_frames=100, max_frames=100)
    clipped = read(CLIP, clip=[0.0, 0.5])
    assert len(clipped) == 5
    assert set(clipped) < set(whole)
    assert clipped != read(CLIP)


@pytest.mark.parametrize(
    ("data", "clip", "message"),
    [
        pytest.param(b"", None, "cannot be decoded (", id="empty"),
        pytest.param(b"no video at all" * 100, None, "cannot be decoded (", id="not a video"),
        pytest.param(CLIP[: len(CLIP) // 3], None, "", id="cut short"),
        pytest.param(CLIP, [0.0, 9999.0], "clip [0.0, 9999.0] is not inside the video", id="clip too long"),
    ],
)
def test_broken_videos_are_refused(data: bytes, clip: list[float] | None, message: str) -> None:
    with pytest.raises(VideoProblem) as caught:
        read(data, clip=clip)
    assert str(caught.value).startswith(message)
