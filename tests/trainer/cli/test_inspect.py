import argparse
import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from closeness import LOSS, assert_close
from golden import CASES, GOLDEN, RESULTS, ROWS, arrays, checkpoint, pixels
from internvl_trainer.cli import inspect
from internvl_trainer.model.chat_model import normalise_tiles
from PIL import Image
from rich.console import Console


def run(*arguments: object) -> tuple[int, str]:
    parser = argparse.ArgumentParser()
    inspect.add_arguments(parser)
    text = io.StringIO()
    code = inspect.run(parser.parse_args([str(each) for each in arguments]), Console(file=text, width=300))
    return code, text.getvalue()


def golden_arguments(case: str) -> list[object]:
    kind, template = case.split("/")
    data = GOLDEN / "data"
    return [
        *("--model", checkpoint(kind), "--template", template),
        *("--annotation", data / "samples.jsonl", "--root", data),
        *("--image-size", 56, "--min-tiles", 1, "--max-tiles", 6, "--video-frames", 5),
    ]


@pytest.mark.parametrize("case", [pytest.param(case, id=case) for case in CASES])
def test_the_file_holds_what_upstream_computed(case: str, tmp_path: Path) -> None:
    out = tmp_path / "rows.npz"
    code, _ = run(*golden_arguments(case), "--compat", "upstream", "--with-loss", "--quiet", "--out", out)
    assert code == 0
    found, golden = dict(np.load(out)), arrays(case)
    for row in range(len(ROWS)):
        for key in ("input_ids", "labels", "image_flags"):
            np.testing.assert_array_equal(found[f"s{row}.{key}"], golden[f"s{row}.{key}"])
        np.testing.assert_array_equal(found[f"s{row}.pixel_values"], pixels()[f"s{row}.pixel_values"])
        assert_close(found[f"s{row}.logits_last16"], golden[f"s{row}.logits_last16"])
        loss = RESULTS[case]["samples"][row]["loss"]
        if loss is None:
            assert np.isnan(found[f"s{row}.loss"])
        else:
            assert_close(found[f"s{row}.loss"], loss, LOSS)


def test_the_view_shows_text_counts_and_image_tokens() -> None:
    code, text = run(*golden_arguments("qwen2/Hermes-2"))
    assert code == 0
    assert "row 2 (line 3): 206 tokens, 8 supervised, 7 tiles" in text
    assert "<img><IMG_CONTEXT>×28</img>" in text
    assert "<|im_start|>user\nhello there<|im_end|><|im_start|>assistant\ndescribe the table<|im_end|>" in text
    assert "고양이는" in text  # characters of several tokens are shown whole


def test_only_supervised_tokens_are_green() -> None:
    text = io.StringIO()
    parser = argparse.ArgumentParser()
    inspect.add_arguments(parser)
    arguments = parser.parse_args([str(each) for each in [*golden_arguments("internlm2/internlm2-chat"), "--rows", 1]])
    inspect.run(arguments, Console(file=text, width=1000, force_terminal=True, color_system="standard"))
    pieces = text.getvalue().split("\x1b[")
    green = "".join(piece.split("m", 1)[1] for piece in pieces[1:] if piece.split("m", 1)[0] in ("1;32", "1;92"))
    assert green == "a red square!<|im_end|>"


def test_the_checkpoint_says_what_is_not_given() -> None:
    data = GOLDEN / "data"
    code, text = run("--model", checkpoint("phi3"), "--annotation", data / "samples.jsonl", "--root", data, "--rows", 1)
    assert code == 0
    assert "<|user|>what colour is the cat<|end|><|assistant|>a red square!<|end|>" in text


def test_broken_rows_are_told_and_the_others_shown(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    broken = {**ROWS[2], "image": "none.png"}
    rows.write_text("".join(f"{json.dumps(row)}\n" for row in (broken, ROWS[0])) + "{\n")
    out = tmp_path / "rows.npz"
    model = checkpoint("qwen2")
    code, text = run("--model", model, "--annotation", rows, "--root", GOLDEN / "data", "--out", out)
    assert code == 65
    assert f"{rows}:1: image: none.png is not below {GOLDEN / 'data'}" in text
    assert f"{rows}:3: not valid JSON" in text
    assert {name.split(".")[0] for name in np.load(out)} == {"s1"}


TURNS = [{"from": "human", "value": "what"}, {"from": "gpt", "value": "a cat"}]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"image": "images"}, "images is a folder; expected a picture"),
        ({"image": "images/"}, "images/ is a folder; expected a picture"),
        ({"image": "."}, "'.' leaves the dataset's root"),
        ({"image": ["images"]}, "image[0]: images is a folder"),
        ({"image": "photo.jpg"}, f"found 'images/photo.jpg': if it is meant, set root to {GOLDEN / 'data' / 'images'}"),
        ({"image": "A" * 5000}, "AAAA…: cannot be decoded"),
        ({"image": "iVBORw0KGgo" + "A" * 33}, "cannot be decoded"),
        ({"image": "data:image/png;base64,AAAA"}, "cannot be decoded"),
        ({"image": "samples.jsonl"}, "samples.jsonl: cannot be decoded"),
        ({"video": "checkpoints"}, "checkpoints is not below"),
        ({"video": "videos"}, "videos is a folder without pictures"),
        ({"video": "images", "clip": [0, 1]}, "clip: frames that are pictures have no time"),
        ({"video": ["images/photo.jpg", "none.png"]}, "video[1]: none.png is not below"),
        ({"video": ["images/photo.jpg", "images"]}, "video[1]: images is a folder"),
    ],
)
def test_media_that_cannot_be_used_are_findings_and_no_tracebacks(
    tmp_path: Path, row: dict[str, object], message: str
) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({**row, "conversations": TURNS}) + "\n")
    code, text = run("--model", checkpoint("qwen2"), "--annotation", rows, "--root", GOLDEN / "data", "--quiet")
    assert code == 65
    assert f"{rows}:1: " in text
    assert message in text


def test_a_folder_of_frames_is_shown(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"video": "images", "conversations": TURNS}) + "\n")
    code, text = run("--model", checkpoint("qwen2"), "--annotation", rows, "--root", GOLDEN / "data")
    assert code == 0
    assert f"{len(list((GOLDEN / 'data' / 'images').iterdir()))} tiles" in text


@pytest.mark.parametrize(("option", "grey"), [("white", 255), ("black", 0), ("none", 9)])
def test_pictures_are_decoded_as_the_options_say(tmp_path: Path, option: str, grey: int) -> None:
    Image.new("RGBA", (8, 8), (9, 9, 9, 0)).save(tmp_path / "clear.png")
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"image": "clear.png", "conversations": TURNS}) + "\n")
    arguments = ["--model", checkpoint("qwen2"), "--annotation", rows, "--root", tmp_path, "--out", tmp_path / "r.npz"]
    assert run(*arguments, "--background", option)[0] == 0
    found = np.load(tmp_path / "r.npz")["s0.pixel_values"]
    expected = normalise_tiles(torch.full((1, 3, 1, 1), grey, dtype=torch.uint8)).numpy()
    np.testing.assert_allclose(found, np.broadcast_to(expected, found.shape))
    upstream = run(*arguments, "--background", option, "--compat", "upstream")
    assert upstream[0] == 0
    dropped = normalise_tiles(torch.full((1, 3, 1, 1), 9, dtype=torch.uint8)).numpy()
    np.testing.assert_allclose(np.load(tmp_path / "r.npz")["s0.pixel_values"][0, :, 0, 0], dropped[0, :, 0, 0])
