"""Preflight of pairs: each mistake has its name, its file and its line, before anything is trained."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from internvl_trainer.errors import UserError
from internvl_trainer.stages.preflight import run as preflight
from PIL import Image
from trainer.contexts import context_of
from trainer.retrieval.pair_runs import pair_config, write_pairs
from trainer.runs import make_config

Edit = Callable[[str], str]


def check(folder: Path, **sections: Any) -> dict[str, Any]:
    """preflight.json of a run. Raises UserError."""
    config = pair_config(folder, str(folder / "out"), **sections)
    result = preflight(context_of(config, "preflight"))
    report: dict[str, Any] = json.loads((folder / "out/stages/preflight/preflight.json").read_text())
    return {**report, "message": result.message}


def as_coco(change: Callable[[list[dict[str, Any]]], object]) -> Edit:
    """The captions in COCO's format, changed."""

    def edit(text: str) -> str:
        pairs = [line.split(",", 1) for line in text.splitlines()[1:]]
        rows = [{"image": image, "caption": caption, "image_id": f"coco_{image[7:10]}"} for image, caption in pairs]
        change(rows)
        return json.dumps(rows, indent=0)

    return edit


def test_good_pairs_pass_with_their_counts(tmp_path: Path) -> None:
    held = {"held": {"annotation": str(tmp_path / "data/captions.txt"), "format": "flickr"}}
    report = check(tmp_path, data={"validation": held})
    assert [dataset["rowsInEpoch"] for dataset in report["datasets"]] == [24, 24]
    assert report["findings"] == []
    assert report["message"].startswith("24 rows an epoch, 24 rows to validate on")


def test_how_pictures_are_decoded_is_said_once(tmp_path: Path) -> None:
    pair_config(tmp_path, str(tmp_path / "out"))
    for path in sorted((tmp_path / "data" / "images").iterdir())[:3]:
        Image.new("RGBA", (8, 8), (9, 9, 9, 0)).save(path)
    (finding,) = check(tmp_path)["findings"]
    assert (finding["reason"], finding["severity"]) == ("ImageTransparent", "warning")
    assert "shown on white (image.background) (6 times in this file)" in finding["message"]


@pytest.mark.parametrize(
    ("form", "edit", "reason", "place"),
    [
        pytest.param(
            "flickr",
            lambda text: re.sub("000.png,A .*", "000.png,", text),
            "CaptionMissing",
            "captions.txt:2: caption: images/000.png",
            id="an image without caption",
        ),
        pytest.param(
            "flickr",
            lambda text: text.split("\n", 1)[1],
            "HeaderMissing",
            "captions.txt:1: expected the header",
            id="no header",
        ),
        pytest.param(
            "coco",
            as_coco(lambda rows: rows[2].update(image_id="coco_000")),
            "ImageIdRepeated",
            "captions.txt:12: image_id: 0 is the id of images/000.png",
            id="two images with one id",
        ),
        pytest.param("flickr", as_coco(list), "HeaderMissing", "captions.txt:1", id="COCO's JSON said to be flickr"),
        pytest.param("coco", lambda text: text, "InvalidJson", "captions.txt:1", id="Flickr's text said to be coco"),
        pytest.param("flickr", lambda text: "image,caption\n", "EmptySplit", "captions.txt", id="an empty split"),
        pytest.param("coco", lambda text: "[]", "EmptySplit", "captions.txt", id="an empty list"),
        pytest.param(
            "flickr",
            lambda text: text.replace("images/003.png,One", "images/gone.png,One"),
            "ImageMissing",
            "captions.txt:9: image: images/gone.png is not below",
            id="an absent image",
        ),
        pytest.param(
            "flickr",
            lambda text: text.replace("images/003.png,One", "../secret.png,One"),
            "PathLeavesRoot",
            "captions.txt:9: image",
            id="a path out of the root",
        ),
        pytest.param(
            "flickr",
            lambda text: text.replace("images/003.png,One", "captions.png,One"),
            "ImageUndecodable",
            "captions.txt:9: image: captions.png",
            id="no image",
        ),
    ],
)
def test_bad_input_is_named(tmp_path: Path, form: str, edit: Edit, reason: str, place: str) -> None:
    annotation = write_pairs(tmp_path / "data")
    (tmp_path / "data" / "captions.png").write_text("no picture")
    annotation.write_text(edit(annotation.read_text()))
    with pytest.raises(UserError) as raised:
        check(tmp_path, data={"train": {"drawn": {"annotation": str(annotation), "format": form}}})
    assert raised.value.reason == reason
    assert place in str(raised.value)


def test_bad_lines_can_be_left_out(tmp_path: Path) -> None:
    annotation = write_pairs(tmp_path / "data")
    annotation.write_text(annotation.read_text().replace("images/003.png,One", "images/gone.png,One"))
    report = check(tmp_path, data={"badRows": "skip", "maxBadRows": 1})
    assert report["skippedLines"] == {"drawn": [9]}
    assert report["datasets"][0]["rowsInEpoch"] == 23


def test_an_empty_split_cannot_be_skipped_and_nothing_says_so(tmp_path: Path) -> None:
    annotation = write_pairs(tmp_path / "data")
    annotation.write_text("image,caption\n")
    with pytest.raises(UserError, match=r"right split and language.*correct the file\. All") as raised:
        check(tmp_path, data={"badRows": "skip", "maxBadRows": 1})
    assert raised.value.reason == "EmptySplit"
    assert "data.badRows" not in str(raised.value)


def test_a_reserved_token_in_a_caption_is_a_warning(tmp_path: Path) -> None:
    annotation = write_pairs(tmp_path / "data")
    annotation.write_text(annotation.read_text().replace("images/003.png,One", "images/003.png,<img> <IMG_CONTEXT>"))
    (finding,) = check(tmp_path)["findings"]
    assert (finding["reason"], finding["severity"], finding["line"]) == ("ReservedToken", "warning", 9)
    assert "the reserved tokens <IMG_CONTEXT>, <img>; it is tokenized as plain text" in finding["message"]


def test_a_long_caption_is_a_warning(tmp_path: Path) -> None:
    report = check(tmp_path, training={"maxSeqLength": 16})
    assert {finding["reason"] for finding in report["findings"]} == {"CaptionCut"}


def test_a_test_set_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    annotation = write_pairs(tmp_path / "data")
    broken = tmp_path / "data" / "test.txt"
    broken.write_text(annotation.read_text().split("\n", 1)[1])
    task = {"task": "retrieval", "format": "flickr", "annotation": str(broken)}
    with pytest.raises(UserError, match=r"test\.txt:1: expected the header"):
        check(tmp_path, evaluation={"tasks": {"held": task}})


@pytest.mark.parametrize(
    ("file", "reason"),
    [
        pytest.param("tokenizer.model", "TokenizerFileMissing", id="no tokenizer"),
        pytest.param("model.safetensors", "WeightsMissing", id="no weights"),
        pytest.param("config.json", "FileMissing", id="no config"),
    ],
)
def test_an_incomplete_checkpoint_is_named(tmp_path: Path, file: str, reason: str) -> None:
    pair_config(tmp_path, str(tmp_path / "out"))
    (tmp_path / "model" / file).unlink()
    with pytest.raises(UserError) as raised:
        check(tmp_path)
    assert raised.value.reason == reason


def test_a_chat_checkpoint_is_no_retrieval_model(tmp_path: Path) -> None:
    chat = Path(__file__).parents[2] / "data/golden/checkpoints/internlm2"
    with pytest.raises(UserError) as raised:
        check(tmp_path, model={"source": str(chat)})
    assert raised.value.reason == "UnsupportedArchitecture"


def test_a_retrieval_checkpoint_has_to_be_named_as_one(tmp_path: Path) -> None:
    pair_config(tmp_path, str(tmp_path / "out"))
    config = make_config(str(tmp_path / "chat"), str(tmp_path / "model"))
    with pytest.raises(UserError, match=r"name it as one: model\.name InternVL-14B-224px"):
        preflight(context_of(config, "preflight"))
