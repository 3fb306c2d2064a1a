"""Labels as upstream computes them, with its errors, to reproduce numbers that upstream published.

Upstream finds each answer by tokenizing the pieces of the text again and adding up their lengths. Where the sum misses
the length of the whole, it drops the row's supervision. The corrections by one below are its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from internvl_trainer.data.tokenize import Template

_IGNORED = -100


def label_like_upstream(
    text: str, ids: np.ndarray, tokenizer: PreTrainedTokenizerBase, template: Template, max_length: int | None
) -> np.ndarray:
    """(L,) labels for a template that is tokenized as one text."""
    labels = np.array(ids)

    def count(piece: str) -> int:
        return len(tokenizer(piece)["input_ids"])

    if template.name == "internlm2-chat":
        spans, end = _internlm2_spans(text, template, count)
    else:
        spans, end = _turn_spans(text, template, count)
    for start, stop in spans:
        labels[start:stop] = _IGNORED
    labels[end:] = _IGNORED
    if template.name == "phi3-chat":
        labels[labels == tokenizer.convert_tokens_to_ids("<|endoftext|>")] = _IGNORED
    limit = max_length if max_length is not None else len(ids) + 1
    if end < limit and end != min(int((ids != tokenizer.pad_token_id).sum()), limit):
        labels[:] = _IGNORED
    return labels


Spans = tuple[list[tuple[int, int]], int]
"""Token ranges that upstream takes for instructions, and where it believes the text to end."""


def _internlm2_spans(text: str, template: Template, count: Callable[[str], int]) -> Spans:
    """internlm2-chat: pieces between assistant marks, counted without the <s> that tokenizing each alone adds."""
    first, *others = text.split(template.assistant)
    position = 1 + count(first + template.assistant) - 1
    spans = [(0, position)]
    for piece in others[:-1]:
        answer, question = piece.split(template.user)
        position += count(answer) - 1
        instruction = count(template.user + question + template.assistant) - 1
        spans.append((position, position + instruction))
        position += instruction
    return spans, position + count(others[-1]) - 1


def _turn_spans(text: str, template: Template, count: Callable[[str], int]) -> Spans:
    """Hermes-2 and phi3-chat: pieces of one question and one answer, the first with the system message before them."""
    phi3 = template.name == "phi3-chat"
    position = 1 if phi3 else 0
    spans = [(0, position)]
    for number, piece in enumerate(_question_answer_pieces(text, template)):
        head, mark, _ = piece.partition(template.end + template.assistant)
        instruction, length = count(head + mark), count(piece)
        if phi3:  # right for the first piece only: this is why rows of several turns are lost
            instruction, length = instruction - min(number + 1, 2), length - min(number, 1)
        else:
            length += 1  # the end mark, which splitting took away
        spans.append((position, position + instruction))
        position += length
    return spans, position


def _question_answer_pieces(text: str, template: Template) -> Iterator[str]:
    """Stops, as upstream does, at the first piece that is not one question and one answer."""
    parts = text.split(template.end)
    borders = [0, *range(3, len(parts), 2), len(parts)]
    for start, stop in pairwise(borders):
        piece = template.end.join(parts[start:stop])
        if piece.count(template.end + template.assistant) != 1:
            return
        yield piece
