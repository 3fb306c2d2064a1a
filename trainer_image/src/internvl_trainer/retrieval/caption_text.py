"""Captions as token ids, normalised and prompted as in upstream's dataset.

Sources: internvl_g/internvl/train/dataset.py (normalisation, "summarize:", 80 tokens) and
clip_benchmark/models/internvl_huggingface (the same prompt, padding with id 0).
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from internvl_trainer.data.reserved_tokens import tokenize

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SUMMARIZE = "summarize:"
"""Prompt before a caption that is compared with images."""
CAPTION_PROMPT = "English caption:"
"""Prompt that QLLaMA continues with a caption."""
MAX_WORDS = 50
MAX_TOKENS = 80
PADDING = 0
"""Padding id of feature extraction, independent of the tokenizer."""

_PUNCTUATION = re.compile(r"[.!\"()*#:;~]")
_SPACES = re.compile(r"\s{2,}")


def normalise_caption(text: str, max_words: int = MAX_WORDS) -> str:
    """The text in lower case without . ! " ( ) * # : ; ~, cut after `max_words` words."""
    plain = _SPACES.sub(" ", _PUNCTUATION.sub(" ", text.lower())).rstrip("\n").strip(" ")
    return " ".join(plain.split(" ")[:max_words])


def encode_caption(tokenizer: PreTrainedTokenizerBase, text: str, max_tokens: int = MAX_TOKENS) -> list[int]:
    """Token ids with start and end token, at most `max_tokens`; a long text loses its end, never the end token.

    Special tokens that the text spells are plain text.
    """
    tokens, _ = tokenize(text, tokenizer, [(0, len(text))], add_special_tokens=False)
    ids = tokens.ids[: max_tokens - 2].tolist()
    return [tokenizer.bos_token_id, *ids, tokenizer.eos_token_id]


def encode_prompt(tokenizer: PreTrainedTokenizerBase, text: str = CAPTION_PROMPT) -> list[int]:
    """Token ids with the start token, for generation to continue."""
    return [tokenizer.bos_token_id, *tokenizer(text, add_special_tokens=False).input_ids]
