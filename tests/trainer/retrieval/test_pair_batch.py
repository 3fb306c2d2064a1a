"""Rows of retrieval training: crops, captions as token ids, negatives, batches that the model takes."""

from pathlib import Path

import numpy as np
import pytest
import torch
from internvl_trainer.model.tokenizer import read_tokenizer
from internvl_trainer.retrieval.caption_files import PairRow
from internvl_trainer.retrieval.caption_text import SUMMARIZE, encode_caption, encode_prompt
from internvl_trainer.retrieval.pair_batch import (
    augment_image,
    build_pair_sample,
    choose_crop,
    choose_negative,
    collate_pairs,
    resize_image,
)
from PIL import Image
from retrieval_golden import load
from sentencepiece import SentencePieceProcessor

CHECKPOINT = Path(__file__).parents[2] / "data" / "golden" / "checkpoints" / "internlm2"
PHOTO = Path(__file__).parents[2] / "data" / "golden" / "data" / "images" / "photo.jpg"
ROWS = [
    PairRow("a.jpg", 1, "Two DOGS run.", "captions.txt", 2),
    PairRow("b.jpg", 2, "A cat, asleep on a warm stone.", "captions.txt", 3),
]


@pytest.fixture(scope="module")
def tokenizer():
    return read_tokenizer(CHECKPOINT)


def test_captions_have_both_ends_and_keep_them_when_cut(tokenizer) -> None:
    pieces = SentencePieceProcessor(str(CHECKPOINT / "tokenizer.model")).encode("summarize:two dogs run")
    assert encode_caption(tokenizer, "summarize:two dogs run") == [1, *pieces, 2]
    assert encode_caption(tokenizer, "summarize:two dogs run", max_tokens=6) == [1, *pieces[:4], 2]
    assert len(encode_caption(tokenizer, "dog " * 200)) == 80


def test_a_prompt_stays_open(tokenizer) -> None:
    pieces = SentencePieceProcessor(str(CHECKPOINT / "tokenizer.model")).encode("English caption:")
    assert encode_prompt(tokenizer) == [1, *pieces]


def test_a_batch_is_what_the_model_takes(tokenizer) -> None:
    """Texts are normalised, prompts where they belong, padding masked; a loss comes out."""
    rng = np.random.default_rng(0)
    image = Image.open(PHOTO).convert("RGB")
    pairs = [build_pair_sample(image, own, other, tokenizer, rng, image_size=42) for own, other in (ROWS, ROWS[::-1])]
    batch = collate_pairs(pairs)
    assert batch["pixel_values"].shape == (2, 3, 42, 42)
    assert batch["pixel_values"].dtype == torch.uint8
    assert batch["image_ids"].tolist() == [1, 2]
    texts = ["two dogs run", "a cat, asleep on a warm stone"]
    for kind, wanted in (
        ("positive", texts),
        ("negative", texts[::-1]),
        ("summarize", [SUMMARIZE + text for text in texts]),
    ):
        for ids, mask, text in zip(batch[f"{kind}_input_ids"], batch[f"{kind}_attention_mask"], wanted, strict=True):
            assert ids[mask.bool()].tolist() == encode_caption(tokenizer, text)
            assert ids[~mask.bool()].eq(0).all()
    small = {name: each % 119 + 1 if name.endswith("input_ids") else each for name, each in batch.items()}
    with torch.no_grad():
        assert torch.isfinite(load("cross-attention").model(**small).loss)


def test_negatives_are_of_other_images_and_any_of_them() -> None:
    ids, rng = np.array([4, 4, 7, 9]), np.random.default_rng(0)
    assert {choose_negative(ids, 0, rng) for _ in range(60)} == {2, 3}
    assert {choose_negative(ids, 2, rng) for _ in range(60)} == {0, 1, 3}


@pytest.mark.parametrize("size", [(640, 480), (333, 500), (40, 2000), (1, 1)], ids=str)
def test_crops_lie_in_the_image(size: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        left, top, width, height = choose_crop(*size, rng)
        assert left >= 0
        assert top >= 0
        assert left + width <= size[0]
        assert top + height <= size[1]
        assert min(width, height) > 0
        if size in ((640, 480), (333, 500)):
            assert 0.49 < width * height / (size[0] * size[1]) <= 1.0
            assert 0.74 < width / height < 1.35


def test_augmentation_is_drawn_from_the_seed() -> None:
    image = Image.open(PHOTO).convert("RGB")
    first, again, other = (augment_image(image, 56, np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_evaluation_sees_the_whole_image() -> None:
    image = Image.new("RGB", (80, 40))
    image.paste((255, 0, 0), (60, 0, 80, 40))
    pixels = resize_image(image, 28)
    assert pixels.shape == (3, 28, 28)
    assert pixels[0, :, 24:].min() > 250
    assert pixels[0, :, :18].max() < 5
    assert pixels[1:].max() == 0
