"""Figures computed from the answers alone, without references; they reveal a collapsed model."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

_RUN = 4  # pieces; as seq-rep-4 of Welleck et al., "Neural Text Generation with Unlikelihood Training" (2019)
# A piece is up to five letters or digits (so an endlessly repeated letter counts as repetition), one character of a
# script without spaces between words (Thai and later in Unicode), or one mark.
_PIECE = re.compile(r"[\u0e00-\U0010ffff]|[^\W\u0e00-\U0010ffff]{1,5}|[^\w\s]")


def answer_figures(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The figures ANSWER_METRICS of predictions, each from 0 to 1.

    distinct_answers: distinct answers, but for case and spaces, per answer; empty_answers: the share of empty ones;
    repetition: the mean of `repetition`. answers_at_limit, the share that was cut at the most new tokens, is missing
    for rows that do not say so (`at_limit`).
    """
    texts = [" ".join(str(row["prediction"]).casefold().split()) for row in rows]
    if not texts:
        return {}
    figures = {
        "distinct_answers": len(set(texts)) / len(texts),
        "empty_answers": texts.count("") / len(texts),
        "repetition": fmean(map(repetition, texts)),
    }
    if all("at_limit" in row for row in rows):
        figures["answers_at_limit"] = fmean(bool(row["at_limit"]) for row in rows)
    return figures


def repetition(text: str) -> float:
    """0 to 1: the share of runs of four pieces (words, marks) that were in the text before."""
    pieces = _PIECE.findall(text)
    runs = [tuple(pieces[start : start + _RUN]) for start in range(len(pieces) - _RUN + 1)]
    return 1 - len(set(runs)) / len(runs) if runs else 0.0
