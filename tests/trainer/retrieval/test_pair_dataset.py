"""Pairs drawn by position: the same for every attempt, with negatives of other pictures."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from internvl_trainer.artifacts.sources import open_media
from internvl_trainer.data.loader import Failure
from internvl_trainer.data.row_schema import MediaFile, RowMedia
from internvl_trainer.data.sampler import Position
from internvl_trainer.evaluate.annotations import Question
from internvl_trainer.evaluate.chunks import Chunk
from internvl_trainer.evaluate.run import make_answerer
from internvl_trainer.evaluate.tasks import OpenTask
from internvl_trainer.evaluate.weights import Evaluated
from internvl_trainer.model.tokenizer import read_tokenizer
from internvl_trainer.retrieval.caption_text import encode_caption, normalise_caption
from internvl_trainer.retrieval.load import LoadedRetrievalModel
from internvl_trainer.retrieval.pair_batch import PairSample
from internvl_trainer.retrieval.pair_dataset import OpenPairs, PairDataset, collate_micro_batch, open_pairs
from internvl_trainer.train.retrieval import _rows as pairs_of_run
from PIL import Image
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


@pytest.mark.parametrize("background", ["white", "black"])
def test_pictures_are_decoded_as_the_run_says_in_training_and_evaluation(tmp_path: Path, background: str) -> None:
    config = pair_config(tmp_path, str(tmp_path / "out"), image={"background": background})
    turned = Image.Exif()
    turned[0x0112] = 6
    for path in (tmp_path / "data" / "images").iterdir():
        Image.new("RGBA", (8, 8), (9, 9, 9, 0)).save(path, exif=turned)
    model = LoadedRetrievalModel(None, SimpleNamespace(image_size=42), {})  # type: ignore[arg-type]
    rows = pairs_of_run(config, open_pairs(config), model, read_tokenizer(tmp_path / "model"), {}, "spec.data", 1)
    shade = 255 if background == "white" else 0
    assert (draw(rows, 0).pixels == shade).all()
    task = OpenTask("retrieval", open_pairs(config)[0].description, [QUESTION], 0, 1)
    answerer = make_answerer(config, Evaluated(model, tmp_path / "model"))
    with ThreadPoolExecutor(1) as pool:
        (picture,) = answerer.prompts(Chunk(task, 0), pool)
    assert (picture.result().pixels == shade).all()


QUESTION = Question(0, RowMedia((MediaFile("images/000.png", "image"),)), ("a dog",), "captions.txt:2")
