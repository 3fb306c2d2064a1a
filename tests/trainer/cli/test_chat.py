"""`internvl-trainer chat`: what the guides' demo does, from a shell."""

from __future__ import annotations

import io
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from golden import RESULTS, load
from internvl_api.constants import ExitCode
from internvl_trainer.__main__ import main
from internvl_trainer.cli import chat as chat_command
from internvl_trainer.cli.chat import read_image
from internvl_trainer.data.pictures import Decoding, decode_image
from internvl_trainer.data.row_schema import Turn
from internvl_trainer.data.tiling import cut_tiles
from internvl_trainer.errors import UserError
from internvl_trainer.model.adapter_files import save_adapter
from internvl_trainer.model.adapters import LoraSettings, apply_method
from internvl_trainer.model.greedy_answers import make_prompt
from internvl_trainer.model.load import LoadedModel
from PIL import Image
from trainer.answers import answer_all
from trainer.runs import GOLDEN

CHECKPOINTS = GOLDEN / "checkpoints"
WIDE, PHOTO = GOLDEN / "data/images/wide.png", GOLDEN / "data/images/photo.jpg"
CAPTION = "Provide a one-sentence caption for the provided image."


def chat(*words: str | Path) -> int:
    return main(["chat", *map(str, words)])


def said(capsys: pytest.CaptureFixture[str]) -> str:
    return capsys.readouterr().out.rstrip("\n")


def expected(loaded: LoadedModel, *turns: str, tokens: int) -> str:
    """The answer to the last of the turns, human and gpt by turns, about PHOTO."""
    loaded.model.eval()
    tiles = cut_tiles(decode_image(PHOTO.read_bytes()), loaded.image_size, 1, 6, thumbnail=True)
    roles = [Turn("gpt" if number % 2 else "human", text) for number, text in enumerate(turns)]
    prompt = make_prompt(loaded, roles, tiles, [len(tiles)])
    (text,) = answer_all(loaded, [prompt], max_new_tokens=tokens, min_new_tokens=1)
    return text


@pytest.mark.parametrize("kind", ["qwen2", "internlm2", "phi3"])
def test_the_answer_is_upstreams(capsys: pytest.CaptureFixture[str], kind: str) -> None:
    golden = next(result["greedy_caption"] for case, result in sorted(RESULTS.items()) if case.startswith(f"{kind}/"))
    image = {2: WIDE, 3: PHOTO}[golden["sample"]]
    options = ["--max-tiles", "6", "--max-new-tokens", "12"]
    assert chat("--model", CHECKPOINTS / kind, "--image", image, "--question", CAPTION, *options) == ExitCode.OK
    assert said(capsys) == golden["text"]


@pytest.mark.slow
def test_processes_that_hold_the_model_together_answer_as_one(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--model", CHECKPOINTS / "internlm2", "--image", PHOTO, "--question", CAPTION, "--max-new-tokens", "8"]
    assert chat(*words) == ExitCode.OK
    command = [sys.executable, "-m", "internvl_trainer", "chat", *map(str, words), "--processes", "2"]
    done = subprocess.run(command, capture_output=True, timeout=300, check=False)
    assert done.returncode == ExitCode.OK, done.stderr.decode()
    assert done.stdout.decode().rstrip("\n") == said(capsys)


def test_heads_that_processes_cannot_share_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert chat("--model", CHECKPOINTS / "qwen2", "--question", "hello", "--processes", "3") == ExitCode.USER_ERROR
    assert (
        "--processes: found 3; the model's 4 heads, 2 key-value heads and 128 MLP channels must be shared evenly"
        in (capsys.readouterr().err)
    )


def test_a_conversation_remembers(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("what is it?\n\n  and <image> this?\nwhere?\n"))
    options = ["--max-tiles", "6", "--max-new-tokens", "4"]
    assert chat("--model", CHECKPOINTS / "qwen2", "--image", PHOTO, *options) == ExitCode.OK
    printed = capsys.readouterr()
    loaded = load("qwen2")
    first = expected(loaded, "<image>\nwhat is it?", tokens=4)
    second = expected(loaded, "<image>\nwhat is it?", first, "where?", tokens=4)
    assert printed.out == f"{first}\n{second}\n"
    assert "ImageMarkMismatch: question: found 1 <image> marks for 0 pictures" in printed.err


def test_an_adapter_and_transformers_format(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    native = tmp_path / "native"
    assert main(["convert", str(CHECKPOINTS / "qwen2"), str(native), "--to", "hf"]) == ExitCode.OK
    loaded = load("qwen2")
    apply_method(loaded.model, "lora", lora=LoraSettings(4))
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in loaded.model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.2)
    save_adapter(loaded.model, tmp_path / "adapter")
    capsys.readouterr()
    options = ["--image", PHOTO, "--question", "what?", "--max-tiles", "6", "--max-new-tokens", "8"]
    assert chat("--model", native, "--adapter", tmp_path / "adapter", *options) == ExitCode.OK
    trained = said(capsys)
    assert trained == expected(loaded, "<image>\nwhat?", tokens=8)
    assert trained != expected(load("qwen2"), "<image>\nwhat?", tokens=8)


def test_several_pictures(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--model", CHECKPOINTS / "qwen2", "--image", PHOTO, "--image", WIDE, "--max-new-tokens", "6"]
    assert chat(*options, "--question", "same?") == ExitCode.OK
    unmarked = said(capsys)
    assert chat(*options, "--question", "<image>\n<image>\nsame?") == ExitCode.OK
    assert said(capsys) == unmarked


@pytest.mark.parametrize(
    ("words", "message"),
    [
        pytest.param(["--model", "none"], "FileMissing: none/config.json:", id="no model"),
        pytest.param(
            ["--model", str(CHECKPOINTS / "qwen2"), "--image", "none.png"],
            "ImageMissing: none.png: cannot be read: No such file or directory; check the path",
            id="no picture",
        ),
        pytest.param(
            ["--model", str(CHECKPOINTS / "qwen2"), "--image", __file__],
            f"ImageUndecodable: {__file__}: cannot be decoded",
            id="a picture that is none",
        ),
        pytest.param(
            ["--model", str(CHECKPOINTS / "qwen2"), "--adapter", "none"], "FileMissing: none/adapter_", id="no adapter"
        ),
        pytest.param(
            ["--model", str(CHECKPOINTS / "qwen2"), "--image", str(WIDE), "--question", "<image> <image>"],
            "ImageMarkMismatch: question: found 2 <image> marks for 1 pictures",
            id="marks that do not fit",
        ),
        pytest.param(
            ["--model", str(CHECKPOINTS / "qwen2"), "--question", "\udcff"],
            "InvalidText: question: found \\udcff, half of a surrogate pair",
            id="bytes that are no text",
        ),
    ],
)
def test_mistakes(capsys: pytest.CaptureFixture[str], words: list[str], message: str) -> None:
    assert chat(*words, *([] if "--question" in words else ["--question", "what?"])) == ExitCode.USER_ERROR
    assert message in capsys.readouterr().err


def test_an_adapter_of_another_model(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    loaded = load("internlm2")
    apply_method(loaded.model, "lora", lora=LoraSettings(4))
    save_adapter(loaded.model, tmp_path)
    assert chat("--model", CHECKPOINTS / "phi3", "--adapter", tmp_path, "--question", "x") == ExitCode.USER_ERROR
    assert "AdapterMismatch" in capsys.readouterr().err
    shutil.copyfile(CHECKPOINTS / "phi3/model.safetensors", tmp_path / "trained_weights.safetensors")
    assert chat("--model", CHECKPOINTS / "internlm2", "--adapter", tmp_path, "--question", "x") == ExitCode.USER_ERROR
    assert "tensors have no place in the model" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "size", "grey", "warned"),
    [
        ([], (8, 4), 255, ("ImageOrientation", "ImageTransparent")),
        (["--exif", "apply"], (4, 8), 255, ("ImageOrientation", "ImageTransparent")),
        (["--background", "black"], (8, 4), 0, ("ImageOrientation", "ImageTransparent")),
        (["--background", "none"], (8, 4), 9, ("ImageOrientation",)),
    ],
)
def test_pictures_are_decoded_as_in_training(
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    words: list[str],
    size: tuple[int, int],
    grey: int,
    warned: tuple[str, ...],
) -> None:
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.new("RGBA", (8, 4), (9, 9, 9, 0)).save(tmp_path / "photo.png", exif=turned)
    seen = []

    def stop(_: object) -> None:
        raise UserError("Seen", "the pictures are read before the model")

    def look(path: Path, decoding: Decoding) -> object:
        seen.append(read_image(path, decoding))
        return seen[-1]

    monkeypatch.setattr(chat_command, "_choose_processes", stop)
    monkeypatch.setattr(chat_command, "read_image", look)
    chat("--model", "none", "--image", tmp_path / "photo.png", *words, "--question", "what?")
    assert (seen[0].size, seen[0].getpixel((0, 0))) == (size, (grey,) * 3)
    printed = capsys.readouterr().err
    assert tuple(reason for reason in ("ImageOrientation", "ImageTransparent") if reason in printed) == warned


def test_questions_in_another_encoding_are_named(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO("你好一只猫".encode("gbk")), "utf-8"))
    assert chat("--model", CHECKPOINTS / "qwen2") == ExitCode.USER_ERROR
    assert "InvalidEncoding: stdin: not valid UTF-8" in capsys.readouterr().err


def test_more_tiles_than_any_model_has_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        chat("--model", CHECKPOINTS / "qwen2", "--max-tiles", "100000", "--question", "what?")
    assert "--max-tiles: found 100000, expected at most 64" in capsys.readouterr().err
