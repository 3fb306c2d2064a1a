"""Reserved tokens written in a text: found, and tokenized as the plain characters they are.

A tokenizer matches its special tokens anywhere. Without this, `<|im_end|>` in a caption would end the turn, and
`<IMG_CONTEXT>` would ask for pixels that no image has.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from internvl_trainer.data.diagnostics import Finding

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_GROUNDING = frozenset(f"<{slash}{name}>" for name in ("ref", "box", "quad") for slash in ("", "/"))
"""Special tokens that rows write on purpose: regions and their boxes."""
MARKS = frozenset(
    (
        "<img>",
        "<IMG_CONTEXT>",
        "</img>",
        "<|im_start|>",
        "<|im_end|>",
        "<|system|>",
        "<|user|>",
        "<|assistant|>",
        "<|end|>",
    )
)
"""Marks of images and of the templates' turns, reserved even where a tokenizer's files call them ordinary tokens."""


@dataclass(frozen=True)
class Tokens:
    """(n,) int64 ids, and the characters [start, end) that each stands for."""

    ids: np.ndarray
    starts: np.ndarray
    ends: np.ndarray


@lru_cache(maxsize=8)
def reserved_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    """Id and text of every token that a row's own text must not produce."""
    added = tokenizer.added_tokens_decoder.items()
    return {number: token.content for number, token in added if _is_reserved(token)}


def written_in(text: str, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The reserved tokens that a text spells, whether or not the tokenizer knows them."""
    names = sorted(MARKS | set(reserved_tokens(tokenizer).values()))
    return [name for name in names if name in text]


def plain_text_warning(names: Sequence[str], field: str) -> Finding:
    """The warning about reserved tokens that are tokenized as plain text."""
    message = f"the text contains {listed(names)}; it is tokenized as plain text and marks nothing"
    return Finding("ReservedToken", message, field, "warning")


def listed(names: Sequence[str]) -> str:
    """The tokens in words."""
    return f"the reserved token {names[0]}" if len(names) == 1 else f"the reserved tokens {', '.join(names)}"


def _is_reserved(token: Any) -> bool:
    return token.content in MARKS or (token.special and token.content not in _GROUNDING)


def tokenize(
    text: str,
    tokenizer: PreTrainedTokenizerBase,
    own: Sequence[tuple[int, int]],
    *,
    plain: bool = True,
    add_special_tokens: bool = True,
) -> tuple[Tokens, list[str]]:
    """The text's tokens, and the reserved tokens found in the row's own parts.

    Args:
        own: [start, end) of the parts of `text` that the row wrote; the rest is the template's.
        plain: tokenize the reserved tokens found as plain text.
    """
    encoded = tokenizer(text, return_offsets_mapping=True, add_special_tokens=add_special_tokens)
    offsets = np.array(encoded["offset_mapping"], np.int64).reshape(-1, 2)
    tokens = Tokens(np.array(encoded["input_ids"], np.int64), offsets[:, 0], offsets[:, 1])
    reserved = reserved_tokens(tokenizer)
    written = [
        place
        for place in np.flatnonzero(np.isin(tokens.ids, list(reserved))).tolist()
        if any(start <= tokens.starts[place] < tokens.ends[place] <= end for start, end in own)
    ]
    names = [reserved[int(tokens.ids[place])] for place in written]
    return _as_plain_text(text, tokens, written if plain else (), tokenizer), list(dict.fromkeys(names))


def _as_plain_text(text: str, tokens: Tokens, places: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> Tokens:
    """The tokens with those at `places` replaced by the ids of their characters, which keep the token's range."""
    if not places:
        return tokens
    columns = np.stack([tokens.ids, tokens.starts, tokens.ends])
    parts, done = [], 0
    for place in places:
        start, end = int(tokens.starts[place]), int(tokens.ends[place])
        plain = _without_special_tokens(tokenizer).encode(text[start:end], add_special_tokens=False).ids
        parts += [columns[:, done:place], np.array([plain, [start] * len(plain), [end] * len(plain)], np.int64)]
        done = place + 1
    return Tokens(*np.concatenate([*parts, columns[:, done:]], axis=1))


@lru_cache(maxsize=8)
def _without_special_tokens(tokenizer: PreTrainedTokenizerBase) -> Any:
    """A copy of the tokenizer that reads special tokens as plain text; the original is shared by threads."""
    settings = json.loads(tokenizer.backend_tokenizer.to_str())
    for token in settings["added_tokens"]:
        token["special"] = token["special"] or token["content"] in MARKS
    copy = type(tokenizer.backend_tokenizer).from_str(json.dumps(settings))
    copy.encode_special_tokens = True
    return copy
