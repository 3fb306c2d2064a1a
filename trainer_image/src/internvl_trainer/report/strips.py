"""The answers to sample rows over the steps of training, as strips for the report."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from internvl_trainer.report.record import Record
from internvl_trainer.report.samples import data_uri, visible

MOST_SHOWN = 12  # entries of a strip; the others are in samples.jsonl


@dataclass(frozen=True)
class Entry:
    """An answer that stayed the same from the first to the last of these steps.

    Attributes:
        note: why there is no answer, or that it was cut; empty otherwise.
    """

    first: int
    last: int
    text: str
    note: str = ""

    @property
    def steps(self) -> str:
        """The steps in words."""
        return f"step {self.first}" if self.first == self.last else f"steps {self.first}–{self.last}"


@dataclass(frozen=True)
class Strip:
    """One row of data.validation.

    Attributes:
        picture: as a data URI; None for a row without one.
        left_out: entries in the middle that are not shown.
    """

    question: str
    reference: str
    picture: str | None
    entries: list[Entry]
    left_out: int


def make_strips(record: Record) -> list[Strip]:
    """A strip for each sample row, in the order in which they were first asked; equal answers in a row are one entry.

    training.samples and data.validation may change between two attempts, so that rounds may have other rows.
    """
    found: dict[int, list[tuple[dict[str, Any], list[Entry]]]] = {}
    for each in record.sample_rounds:
        for answered in each["answers"]:
            known = found.setdefault(answered["row"], [])
            question = answered["question"]  # empty where the row could not be read
            if not known or (question and known[-1][0]["question"] not in ("", question)):
                known.append((answered, []))
            elif question and not known[-1][0]["question"]:
                known[-1] = (answered, known[-1][1])
            _append(known[-1][1], each["step"], answered)
    return [
        _strip(row, entries, None if place else record.sample_pictures.get(number))  # pictures are those of the first
        for number, known in found.items()
        for place, (row, entries) in enumerate(known)
    ]


def _strip(row: dict[str, Any], entries: list[Entry], picture: bytes | None) -> Strip:
    half = MOST_SHOWN // 2
    shown = entries if len(entries) <= MOST_SHOWN else [*entries[:half], *entries[-half:]]
    return Strip(
        question=visible(row["question"]),
        reference=visible(row["reference"]),
        picture=data_uri(picture, "image/jpeg") if picture else None,
        entries=shown,
        left_out=len(entries) - len(shown),
    )


def _append(entries: list[Entry], step: int, answered: dict[str, object]) -> None:
    problem = answered["problem"]
    text = "" if problem is not None else visible(answered["answer"]) or "(empty)"
    note = f"no answer: {problem}" if problem is not None else "cut" if answered["at_limit"] else ""
    if entries and (entries[-1].text, entries[-1].note) == (text, note):
        entries[-1] = Entry(entries[-1].first, step, text, note)
    else:
        entries.append(Entry(step, step, text, note))
