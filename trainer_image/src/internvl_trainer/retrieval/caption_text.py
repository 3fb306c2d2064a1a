"""Captions of retrieval as upstream's dataset makes them: normalised, behind a prompt, as token ids.

Sources: internvl_g/internvl/train/dataset.py (normalisation, "summarize:", 80 tokens) and
clip_benchmark/models/internvl_huggingface (the same prompt, padding with id 0).
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SUMMARIZE = "summarize:"
"""Before a caption that is compared with images."""
CAPTION_PROMPT = "English caption:"
"""What QLLaMA continues with a caption."""
MAX_WORDS = 50
MAX_TOKENS = 80
PADDING = 0
"""The id that feature extraction takes for padding, whatever the tokenizer says."""

_PUNCTUATION = re.compile(r"[.!\"()*#:;~]")
_SPACES = re.compile(r"\s{2,}")


def normalise_caption(text: str, max_words: int = MAX_WORDS) -> str:
    """Lower case, without . ! " ( ) * # : ; ~, at most `max_words` words; commas, quotes and hyphens stay."""
    plain = _SPACES.sub(" ", _PUNCTUATION.sub(" ", text.lower())).rstrip("\n").strip(" ")
    return " ".join(plain.split(" ")[:max_words])


def encode_caption(tokenizer: PreTrainedTokenizerBase, text: str, max_tokens: int = MAX_TOKENS) -> list[int]:
    """Token ids between the start and the end token; a long text loses its end, never the end token."""
    ids = tokenizer(text, add_special_tokens=False).input_ids[: max_tokens - 2]
    return [tokenizer.bos_token_id, *ids, tokenizer.eos_token_id]


def encode_prompt(tokenizer: PreTrainedTokenizerBase, text: str = CAPTION_PROMPT) -> list[int]:
    """Token ids after the start token, to be continued."""
    return [tokenizer.bos_token_id, *tokenizer(text, add_special_tokens=False).input_ids]
