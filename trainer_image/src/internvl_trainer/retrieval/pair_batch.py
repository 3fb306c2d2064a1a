"""PairRows become PairSamples (an augmented image, its caption, another image's caption), and samples a batch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from transformers import PreTrainedTokenizerBase

from internvl_trainer.retrieval.caption_files import PairRow
from internvl_trainer.retrieval.caption_text import MAX_TOKENS, PADDING, SUMMARIZE, encode_caption, normalise_caption

# torchvision's RandomResizedCrop with upstream's scale: area of the crop, its aspect ratio, and attempts to fit one.
_AREA, _ASPECT, _ATTEMPTS = (0.5, 1.0), (3 / 4, 4 / 3), 10


@dataclass(frozen=True)
class PairSample:
    """One training row as arrays.

    Attributes:
        pixels: (3, S, S) uint8.
        positive, negative, summarize: token ids.
    """

    pixels: np.ndarray
    image_id: int
    positive: list[int]
    negative: list[int]
    summarize: list[int]


def choose_negative(image_ids: np.ndarray, row: int, rng: np.random.Generator) -> int:
    """A uniformly drawn row of another image; `image_ids` must hold two different values."""
    while image_ids[found := int(rng.integers(len(image_ids)))] == image_ids[row]:
        pass
    return found


def build_pair_sample(
    image: Image.Image,
    row: PairRow,
    negative: PairRow,
    tokenizer: PreTrainedTokenizerBase,
    rng: np.random.Generator,
    *,
    image_size: int,
    max_tokens: int = MAX_TOKENS,
) -> PairSample:
    """The sample of an RGB image and its caption, with another image's row as the negative.

    Args:
        rng: draws the crop and the mirroring.
    """
    text, other = normalise_caption(row.caption), normalise_caption(negative.caption)
    return PairSample(
        pixels=augment_image(image, image_size, rng),
        image_id=row.image_id,
        positive=encode_caption(tokenizer, text, max_tokens),
        negative=encode_caption(tokenizer, other, max_tokens),
        summarize=encode_caption(tokenizer, SUMMARIZE + text, max_tokens),
    )


def collate_pairs(pairs: Sequence[PairSample]) -> dict[str, torch.Tensor]:
    """Keyword arguments of RetrievalModel.forward; each kind of text is padded to its longest."""
    batch = {
        "pixel_values": torch.from_numpy(np.stack([pair.pixels for pair in pairs])),
        "image_ids": torch.tensor([pair.image_id for pair in pairs]),
    }
    for kind in ("positive", "negative", "summarize"):
        ids, mask = pad_captions([getattr(pair, kind) for pair in pairs])
        batch |= {f"{kind}_input_ids": ids, f"{kind}_attention_mask": mask}
    return batch


def pad_captions(captions: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """(B, L) int64 ids, padded on the right to the longest, and their mask of 1 and 0."""
    lengths = torch.tensor([len(caption) for caption in captions])
    ids = torch.full((len(captions), int(lengths.max())), PADDING)
    for row, caption in zip(ids, captions, strict=True):
        row[: len(caption)] = torch.tensor(caption)
    mask = torch.arange(ids.shape[1])[None] < lengths[:, None]
    return ids, mask.long()


def resize_image(image: Image.Image, image_size: int) -> np.ndarray:
    """(3, S, S) uint8 of a whole RGB image resized to a square, for evaluation."""
    return _channels_first(image.resize((image_size, image_size), Image.Resampling.BICUBIC))


def augment_image(image: Image.Image, image_size: int, rng: np.random.Generator) -> np.ndarray:
    """(3, S, S) uint8 of a random crop of at least half of an RGB image, mirrored at random, for training."""
    left, top, width, height = choose_crop(*image.size, rng)
    crop = image.crop((left, top, left + width, top + height))
    crop = crop.resize((image_size, image_size), Image.Resampling.BICUBIC)
    if rng.random() < 0.5:
        crop = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return _channels_first(crop)


def choose_crop(width: int, height: int, rng: np.random.Generator) -> tuple[int, int, int, int]:
    """(left, top, width, height) of a crop of random area and aspect ratio; the middle when no draw fits."""
    for _ in range(_ATTEMPTS):
        area = width * height * rng.uniform(*_AREA)
        aspect = math.exp(rng.uniform(math.log(_ASPECT[0]), math.log(_ASPECT[1])))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1)), w, h
    w = min(width, round(height * _ASPECT[1]))
    h = min(height, round(width / _ASPECT[0]))
    return (width - w) // 2, (height - h) // 2, w, h


def _channels_first(image: Image.Image) -> np.ndarray:
    return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))
