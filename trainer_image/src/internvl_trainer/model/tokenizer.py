"""Tokenizers loaded from a checkpoint's files, without running its code."""

from __future__ import annotations

import codecs
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sentencepiece import sentencepiece_model_pb2
from transformers import LlamaTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast, Qwen2Tokenizer

from ..data.tokenize import TEMPLATES
from ..errors import UserError
from ..git_lfs import is_pointer
from .checkpoint_format.files import CheckpointError, read_json

CONTEXT_TOKEN = "<IMG_CONTEXT>"
IMAGE_START, IMAGE_END = "<img>", "</img>"

# Tokenizer classes that wrap a sentencepiece model; InternLM2's own class is remote code and not needed.
_SENTENCEPIECE_CLASSES = ("InternLM2Tokenizer", "LlamaTokenizer")
_SENTENCEPIECE_FILE = "tokenizer.model"
_CONFIG_FILE = "tokenizer_config.json"
_BYTE_LEVEL_FILES = ("vocab.json", "merges.txt")


def load_tokenizer(directory: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a chat model. Raises CheckpointError when a file or an image token is missing."""
    tokenizer = read_tokenizer(directory)
    vocabulary: dict[str, int] = tokenizer.get_vocab()
    if absent := [token for token in (IMAGE_START, IMAGE_END, CONTEXT_TOKEN) if token not in vocabulary]:
        raise CheckpointError(
            "ImageTokenMissing",
            f"the tokenizer does not know {', '.join(absent)}; use the tokenizer of an InternVL chat model",
            str(directory / _CONFIG_FILE),
        )
    return tokenizer


def check_template(tokenizer: PreTrainedTokenizerBase, template: str, field: str) -> None:
    """Raises UserError unless each mark of the template is one token, which a template of another family's is not."""
    vocabulary = tokenizer.get_vocab()
    absent = [mark for mark in TEMPLATES[template].marks if mark not in vocabulary]
    if absent:
        fitting = [name for name, each in TEMPLATES.items() if all(mark in vocabulary for mark in each.marks)]
        advice = (
            f"the tokenizer fits {', '.join(fitting)}" if fitting else "use the tokenizer that belongs to the model"
        )
        message = f"the tokenizer does not know {', '.join(absent)} of the template {template}; {advice}"
        raise UserError("TemplateMismatch", message, field)


def read_tokenizer(directory: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of any supported model, padding on the right. Raises CheckpointError when a file is missing."""
    path = directory / _CONFIG_FILE
    config = read_json(path, missing="copy the tokenizer's files from the model's repository")
    for file in ("tokenizer.json", _SENTENCEPIECE_FILE, *_BYTE_LEVEL_FILES):
        _refuse_pointer(directory / file)
    name = str(config.get("tokenizer_class", "")).removesuffix("Fast")
    tokenizer: PreTrainedTokenizerBase
    try:
        if name in _SENTENCEPIECE_CLASSES and _require(directory, [_SENTENCEPIECE_FILE]):
            tokenizer = _load_sentencepiece(directory, add_bos=config.get("add_bos_token", True))
        elif name == "Qwen2Tokenizer" and _require(directory, _BYTE_LEVEL_FILES):
            tokenizer = Qwen2Tokenizer.from_pretrained(directory)
        elif _require(directory, ()):
            tokenizer = PreTrainedTokenizerFast.from_pretrained(directory)
    except UserError:
        raise
    except Exception as error:  # the tokenizers library raises nothing more specific
        raise CheckpointError(
            "InvalidTokenizer", f"the tokenizer ({name or 'no tokenizer_class'}) cannot be read: {error}", str(path)
        ) from error
    tokenizer.padding_side = "right"
    return tokenizer


def _refuse_pointer(path: Path) -> None:
    if path.is_file() and is_pointer(path):
        message = "is a git-lfs pointer, not the file itself; run `git lfs pull` in the clone it comes from"
        raise CheckpointError("TokenizerFileMissing", message, str(path))


def _require(directory: Path, files: tuple[str, ...] | list[str]) -> bool:
    """True when the files, or tokenizer.json in their place, exist. Raises CheckpointError otherwise."""
    if (directory / "tokenizer.json").exists():
        return True
    for file in files or ["tokenizer.json"]:
        if not (directory / file).exists():
            raise CheckpointError(
                "TokenizerFileMissing",
                f"{file} is missing; copy the tokenizer's files from the model's repository",
                str(directory / file),
            )
    return True


def _load_sentencepiece(directory: Path, *, add_bos: bool) -> Any:
    """The tokenizer with the leading space that tokenizer.model asks for; the class would always add one."""
    options: dict[str, Any] = {"add_bos_token": add_bos}
    path = directory / _SENTENCEPIECE_FILE
    if path.exists():
        options["add_prefix_space"] = _adds_dummy_prefix(path)
    return LlamaTokenizer.from_pretrained(directory, **options)


def _adds_dummy_prefix(path: Path) -> bool:
    model = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]  # made at run time by protobuf
    try:
        model.ParseFromString(path.read_bytes())
    except Exception as error:  # protobuf's DecodeError has no public home that is stable across its backends
        raise CheckpointError(
            "InvalidTokenizer", f"not a sentencepiece model ({error}); copy it from the model's repository", str(path)
        ) from error
    return bool(model.normalizer_spec.add_dummy_prefix)


_BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")
_EACH_BYTE = "replace_each_byte"


def _replace_each_byte(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeDecodeError):
        raise error
    return "\ufffd" * (error.end - error.start), error.end


codecs.register_error(_EACH_BYTE, _replace_each_byte)


def decode_answer(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """The text of token ids without special tokens, equal to the sentencepiece tokenizers of the checkpoints.

    The fast decoder drops all bytes of a run that is not valid UTF-8 as a whole; sentencepiece keeps the valid ones.
    """
    tokens = tokenizer.convert_ids_to_tokens(list(ids), skip_special_tokens=True)
    if not any(_BYTE_TOKEN.fullmatch(token) for token in tokens):
        return str(tokenizer.decode(list(ids), skip_special_tokens=True))
    text = b"".join(_token_bytes(token) for token in tokens).decode("utf-8", errors=_EACH_BYTE)
    return text.removeprefix(" ") if getattr(tokenizer, "add_prefix_space", False) else text


def _token_bytes(token: str) -> bytes:
    found = _BYTE_TOKEN.fullmatch(token)
    return bytes([int(found[1], 16)]) if found else token.replace("▁", " ").encode()
