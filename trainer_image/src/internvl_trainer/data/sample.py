"""A ChatRow becomes a Sample: tiles of its media, token ids and labels of its turns."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np

from .dataset_meta import DatasetDescription
from .diagnostics import Finding, RowError, errors_of
from .media import OpenMedia
from .pictures import DEFAULT, Decoding
from .row_schema import ChatRow, place_marks
from .row_tiles import read_media
from .tiling import blank_tile, stack_tiles
from .tokenize import IMAGE_CONTEXT, EncodedRow, encode

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class SampleSettings:
    """How rows become samples.

    Attributes:
        image_size: pixels of a tile's side.
        context_tokens: `<IMG_CONTEXT>` tokens for each tile.
        min_tiles, max_tiles: of an image, without its thumbnail.
        min_frames, max_frames: of a video.
        frame_sampling: "middle", "rand" or "fpsX"; see `video.frame_indices`.
        max_length: tokens; longer rows are cut at the end.
        compat: "default", or "upstream" for upstream's labels with their errors.
        decoding: of pictures that are turned, transparent or deeper than 8 bits.
    """

    template: str
    image_size: int = 448
    context_tokens: int = 256
    dynamic_tiles: bool = True
    min_tiles: int = 1
    max_tiles: int = 12
    thumbnail: bool = True
    min_frames: int = 8
    max_frames: int = 32
    frame_sampling: str = "rand"
    max_length: int = 8192
    compat: str = "default"
    decoding: Decoding = DEFAULT

    def for_dataset(self, dataset: DatasetDescription) -> SampleSettings:
        """These settings with the dataset's own number of tiles."""
        return self if dataset.max_tiles is None else replace(self, max_tiles=dataset.max_tiles)


@dataclass
class Sample:
    """One row as arrays, ready to be collated.

    Attributes:
        input_ids, labels: (L,) int64; labels are -100 where nothing is supervised.
        tiles: (n, 3, S, S) uint8; a text-only row has one blank tile.
        image_flags: (n,) int64; 0 for the blank tile.
        findings: warnings; errors raise RowError.
        source: number of its dataset among the run's.
    """

    input_ids: np.ndarray
    labels: np.ndarray
    tiles: np.ndarray
    image_flags: np.ndarray
    findings: list[Finding] = field(default_factory=list)
    source: int = 0

    @property
    def length(self) -> int:
        """Number of tokens."""
        return int(self.input_ids.shape[0])


def build_sample(
    row: ChatRow,
    dataset: DatasetDescription,
    settings: SampleSettings,
    tokenizer: PreTrainedTokenizerBase,
    open_media: OpenMedia,
    rng: np.random.Generator | None = None,
) -> Sample:
    """The sample of one row.

    Args:
        rng: draws augmentation and video frames; None makes both deterministic.

    Raises:
        RowError: an image or video is absent or broken, its tokens exceed the maximum length, or nothing is
            supervised.
    """
    settings = settings.for_dataset(dataset)
    groups = read_media(row.media, settings, dataset.root, open_media, rng=rng, augment=dataset.data_augment)
    encoded = encode_row(row, [len(group) for group in groups], settings, tokenizer)
    tiles = np.concatenate(groups) if groups else stack_tiles([blank_tile(settings.image_size)])
    return Sample(
        input_ids=encoded.input_ids,
        labels=encoded.labels,
        tiles=tiles,
        image_flags=np.full(len(tiles), 1 if groups else 0, np.int64),
        findings=encoded.findings,
    )


def encode_row(
    row: ChatRow, tiles_per_image: list[int], settings: SampleSettings, tokenizer: PreTrainedTokenizerBase
) -> EncodedRow:
    """Ids and labels of a row, given the number of tiles of each image or frame.

    Raises:
        RowError: nothing is supervised, or the maximum length cuts through the images.
    """
    encoded = encode(
        place_marks(row.turns, row.media, frames=len(tiles_per_image)),
        tokenizer,
        settings.template,
        tiles_per_image=tiles_per_image,
        context_tokens=settings.context_tokens,
        compat=settings.compat,
        max_length=settings.max_length,
    )
    reserved = [finding for finding in errors_of(encoded.findings) if finding.reason == "ReservedToken"]
    if reserved:  # a context token in the text would count as an image's
        raise RowError(reserved)
    context = int((encoded.input_ids == tokenizer.convert_tokens_to_ids(IMAGE_CONTEXT)).sum())
    if context != (wanted := sum(tiles_per_image) * settings.context_tokens):
        raise RowError.single(
            "ImageTokensCut",
            f"its images need {wanted} tokens, of which {context} fit in the maximum length {settings.max_length}; "
            f"raise the maximum length or lower the maximum number of tiles",
            "conversations",
        )
    if errors_of(encoded.findings):
        raise RowError(encoded.findings)  # with the warnings: truncation is why nothing is supervised
    return encoded
