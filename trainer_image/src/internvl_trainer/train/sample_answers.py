"""Greedy answers to a fixed handful of held-out rows while a chat model trains, for a person to look at.

They do not change training: dropout is off, greedy decoding draws no random number, and each micro-batch of training
sets its own seed. An error becomes the row's problem, and training goes on.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from internvl_api.spec import Samples

from internvl_trainer.artifacts.sources import open_media
from internvl_trainer.data.loader import RowDataset
from internvl_trainer.data.media import open_picture
from internvl_trainer.data.pictures import small_jpeg
from internvl_trainer.data.row_schema import IMAGE_MARK, ChatRow, Turn, place_marks
from internvl_trainer.data.row_tiles import read_media
from internvl_trainer.data.sample import SampleSettings
from internvl_trainer.distributed import Group
from internvl_trainer.errors import first_line
from internvl_trainer.model.greedy_answers import Prompt, generate_all, make_prompt
from internvl_trainer.model.load import LoadedModel

logger = logging.getLogger(__name__)

_PICTURE_SIDE = 360  # pixels, of the longest side


@dataclass(frozen=True)
class Answered:
    """One row with the model's answer, or why there is none.

    Attributes:
        row: its number among the rows of data.validation.
        reference: the row's own answer.
        at_limit: whether the answer was cut at samples.maxNewTokens.
    """

    row: int
    question: str = ""
    reference: str = ""
    answer: str | None = None
    at_limit: bool = False
    problem: str | None = None


class SampleAnswers:
    """Answers to the same rows at different steps, each by one rank. All ranks call `answers` together.

    Each rank computes alone, so it must hold the whole weights: ZeRO stage 1 or 2.
    """

    def __init__(
        self,
        rows: RowDataset,
        loaded: LoadedModel,
        settings: SampleSettings,
        wanted: Samples,
        group: Group,
        *,
        seed: int,
    ) -> None:
        self._rows, self._loaded, self._settings, self._group = rows, loaded, settings, group
        self._tokens, self.every = wanted.max_new_tokens, wanted.every_steps
        self.chosen = draw_rows(len(rows), wanted.rows, seed)

    def answers(self, engine: Any, is_stopping: Callable[[], bool]) -> list[dict[str, Any]] | None:
        """`Answered` of each row as JSON, in their order, on every rank; None when a rank got a stop meanwhile."""
        engine.eval()
        try:
            found = self._own_answers(is_stopping)
        finally:
            engine.train()
        if found is None:
            return None
        shares = self._group.gather([asdict(each) for each in found])
        return sorted((each for share in shares for each in share), key=lambda each: self.chosen.index(each["row"]))

    def pictures(self) -> dict[int, bytes]:
        """Row to a small JPEG of its first picture, for the rows that have one that can be opened."""
        found = {}
        for number in self.chosen:
            dataset, row = self._rows.chat_row(number)
            if row is None or not row.media.images:
                continue
            try:
                opener = dataset.media_opener(open_media)
                picture = open_picture(row.media.images[0], dataset.description.root, opener, self._settings.decoding)
                found[number] = small_jpeg(picture, _PICTURE_SIDE)
            except Exception as error:  # noqa: BLE001 - a picture to look at never stops training
                logger.warning("the picture of sample row %d cannot be shown: %s", number, error)
        return found

    def _own_answers(self, is_stopping: Callable[[], bool]) -> list[Answered] | None:
        own = self.chosen[self._group.rank :: self._group.world_size]
        found = []
        for turn in range(-(-len(self.chosen) // self._group.world_size)):
            if self._group.any(is_stopping()):
                return None
            if turn < len(own):
                found.append(self._answer(own[turn]))
        return found

    def _answer(self, number: int) -> Answered:
        asked = Answered(number)
        try:
            asked, prompt = self._ask(number)
            (found,) = generate_all(
                self._loaded, [prompt], template=self._settings.template, max_new_tokens=self._tokens
            )
        except Exception as error:  # noqa: BLE001 - see the module
            return self._failed(asked, error)
        return Answered(number, asked.question, asked.reference, found.text, found.at_limit)

    def _ask(self, number: int) -> tuple[Answered, Prompt]:
        dataset, row = self._rows.chat_row(number)
        if row is None:
            raise ValueError("the row cannot be read any more")
        turns, reference = question_of(row)
        settings = self._settings.for_dataset(dataset.description)
        groups = read_media(row.media, settings, dataset.description.root, dataset.media_opener(open_media))
        placed = place_marks(turns, row.media, frames=len(groups))
        groups = groups[: sum(turn.text.count(IMAGE_MARK) for turn in placed)]  # the others belong to later questions
        tiles = np.concatenate(groups) if groups else None
        prompt = make_prompt(self._loaded, placed, tiles, [len(group) for group in groups], template=settings.template)
        return Answered(number, turns[-1].text.replace(IMAGE_MARK, "").strip(), reference), prompt

    def _failed(self, asked: Answered, error: Exception) -> Answered:
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        problem = first_line(error)
        logger.warning("sample row %d has no answer: %s; training goes on", asked.row, problem)
        return Answered(asked.row, asked.question, asked.reference, problem=problem)


def draw_rows(count: int, wanted: int, seed: int) -> list[int]:
    """Up to `wanted` of `count` rows, drawn by the seed, in ascending order."""
    return sorted(int(row) for row in np.random.default_rng([seed, count]).permutation(count)[:wanted])


def question_of(row: ChatRow) -> tuple[Sequence[Turn], str]:
    """The turns up to the first question, and the row's own answer to it; empty where it has none."""
    place = next(place for place, turn in enumerate(row.turns) if turn.role == "human")
    before = [turn for turn in row.turns[:place] if turn.role == "system"]
    after = row.turns[place + 1 : place + 2]
    return [*before, row.turns[place]], after[0].text if after else ""
