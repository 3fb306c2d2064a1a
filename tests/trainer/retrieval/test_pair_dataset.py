"""Pairs drawn by position: the same for every attempt, with negatives of other pictures."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from internvl_trainer.artifacts.sources import open_media
from internvl_trainer.data.loader import Failure
from internvl_trainer.data.sampler import Position
from internvl_trainer.model.tokenizer import read_tokenizer
from internvl_trainer.retrieval.caption_text import encode_caption, normalise_caption
from internvl_trainer.retrieval.pair_batch import PairSample
from internvl_trainer.retrieval.pair_dataset import OpenPairs, PairDataset, collate_micro_batch, open_pairs
from trainer.retrieval.pair_runs import IMAGES, pair_config


def open_rows(folder: Path, seed: int | None = 1, *, twice: bool = False) -> tuple[list[OpenPairs], PairDataset]:
    config = pair_config(folder, str(folder / "out"))
    datasets = open_pairs(config) * (2 if twice else 1)
    tokenizer = read_tokenizer(folder / "model")
    return datasets, PairDataset(datasets, tokenizer, open_media, image_size=42, max_tokens=80, seed=seed, bad_lines={})


def draw(rows: PairDataset, row: int, epoch: int = 0) -> PairSample:
    pair = rows[Position(epoch, row)]
    assert isinstance(pair, PairSample)
    return pair


def test_a_position_says_it_all(tmp_path: Path) -> None:
    (_, rows), (_, again) = open_rows(tmp_path), open_rows(tmp_path)
    first, repeated, later = draw(rows, 3), draw(again, 3), draw(rows, 3, epoch=1)
    assert np.array_equal(first.pixels, repeated.pixels)
    assert (first.negative, first.positive) == (repeated.negative, repeated.positive)
    assert not np.array_equal(first.pixels, later.pixels)
    assert first.positive == later.positive


def test_what_is_held_out_is_the_same_in_each_epoch(tmp_path: Path) -> None:
    _, rows = open_rows(tmp_path, seed=None)
    assert np.array_equal(draw(rows, 3).pixels, draw(rows, 3, epoch=5).pixels)


def test_negatives_are_captions_of_other_pictures(tmp_path: Path) -> None:
    (dataset,), rows = open_rows(tmp_path)
    tokenizer = read_tokenizer(tmp_path / "model")
    ids = [tuple(encode_caption(tokenizer, normalise_caption(row.caption))) for row in dataset.index]
    for row, caption in enumerate(dataset.index):
        of_others = {text for text, other in zip(ids, dataset.index, strict=True) if other.image != caption.image}
        assert tuple(draw(rows, row).negative) in of_others


def test_a_picture_in_two_datasets_is_one(tmp_path: Path) -> None:
    """Its captions in the other one are right answers, too."""
    _, rows = open_rows(tmp_path, twice=True)
    assert (len(rows), rows.images) == (4 * IMAGES, IMAGES)
    assert draw(rows, 0).image_id == draw(rows, 1).image_id == draw(rows, 2 * IMAGES).image_id
    assert draw(rows, 0).image_id != draw(rows, 2).image_id


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        pytest.param(lambda path: path.unlink(), "ImageMissing", id="gone"),
        pytest.param(lambda path: path.write_bytes(b"no picture"), "ImageUndecodable", id="broken"),
    ],
)
def test_a_picture_that_vanished_ends_training_with_its_place(tmp_path: Path, damage: object, reason: str) -> None:
    _, rows = open_rows(tmp_path)
    damage(tmp_path / "data/images/001.png")  # type: ignore[operator]
    failure = collate_micro_batch([rows[Position(0, row)] for row in range(4)])
    assert isinstance(failure, Failure)
    assert failure.reason == reason
    assert "captions.txt:4: image: images/001.png" in failure.message
    assert "did it change after preflight?" in failure.message


def test_a_pair_weighs_one(tmp_path: Path) -> None:
    _, rows = open_rows(tmp_path)
    batch = collate_micro_batch([draw(rows, row) for row in range(5)])
    assert not isinstance(batch, Failure)
    assert (batch.rows, batch.weight, batch.supervised_tokens) == (5, 5.0, 5)
    assert batch.tokens < batch.places
