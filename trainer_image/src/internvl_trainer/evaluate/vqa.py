"""Accuracy of short answers: equal to a reference, and the VQA benchmark's consensus of people.

The consensus and its normalisation follow the benchmark's published definition (https://visualqa.org/evaluation.html):
an answer counts in full when three of the people asked gave it, averaged over leaving out each person once.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

_CONSENSUS = 3  # people who gave an answer for it to count in full
_ARTICLES = {"a", "an", "the"}
_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_DIGITS = {word: str(value) for value, word in enumerate(_NUMBERS)} | {"none": "0"}
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_PERIOD = re.compile(r"\.(?!\d)")  # one inside a number stays
_COMMA = re.compile(r"\d,\d")
_CONTRACTIONS = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've
    he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've
    needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll
    somebody's someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd
    there'd've there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll
    what're what's what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't
    would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've
"""
_RESTORED = {
    form[:place] + form[place + 1 :]: form
    for form in _CONTRACTIONS.split()
    for place, character in enumerate(form)
    if character == "'"
}
"""A contraction without one of its apostrophes, to the contraction."""


def exact_match(prediction: str, references: Sequence[str]) -> float:
    """1.0 when it equals a reference but for case and surrounding space, else 0.0 (as upstream's accuracy)."""
    return float(prediction.strip().lower() in {reference.strip().lower() for reference in references})


def vqa_accuracy(prediction: str, references: Sequence[str]) -> float:
    """0 to 1: mean, over leaving out one person, of min(others who gave this answer / 3, 1).

    The benchmark has ten answers to a question. With fewer than four there are never three others: all of them count
    in full then, and a single reference has to be met.
    """
    answer, given = normalise(prediction), [normalise(reference) for reference in references]
    if len(given) == 1:
        return float(answer == given[0])
    needed = min(_CONSENSUS, len(given) - 1)
    same = given.count(answer)
    shares = [min((same - (answer == left_out)) / needed, 1.0) for left_out in given]
    return sum(shares) / len(shares)


def normalise(answer: str) -> str:
    """Lower case, without punctuation and articles, numbers as digits, contractions with their apostrophes."""
    text = _without_punctuation(" ".join(answer.split()))
    words = [_DIGITS.get(word, word) for word in text.lower().split()]
    return " ".join(_RESTORED.get(word, word) for word in words if word not in _ARTICLES)


def _without_punctuation(text: str) -> str:
    """A mark beside a space (any mark, where a number has a thousands comma) goes; between letters it parts them."""
    has_thousands = _COMMA.search(text) is not None
    result = text
    for mark in _PUNCTUATION:
        beside_space = f"{mark} " in text or f" {mark}" in text
        result = result.replace(mark, "" if beside_space or has_thousands else " ")
    return _PERIOD.sub("", result)
