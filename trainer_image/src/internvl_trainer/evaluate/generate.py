"""Questions to answers: media to tiles while the model works on the rows before."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from internvl_trainer.artifacts.sources import open_media
from internvl_trainer.data.diagnostics import RowError
from internvl_trainer.data.row_schema import Turn
from internvl_trainer.data.row_tiles import read_media
from internvl_trainer.data.sample import SampleSettings
from internvl_trainer.errors import UserError
from internvl_trainer.evaluate.annotations import Question
from internvl_trainer.evaluate.chunks import Chunk
from internvl_trainer.evaluate.tasks import OpenTask, with_marks
from internvl_trainer.model.greedy_answers import Generated, Prompt, generate_all, make_prompt
from internvl_trainer.model.load import LoadedModel

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Answerer:
    """A model with all that decides its answers, but for the task."""

    loaded: LoadedModel
    settings: SampleSettings
    batch_size: int

    def prompts(self, chunk: Chunk, pool: Executor) -> list[Future[Prompt]]:
        """Begin to read the media of a chunk."""
        return [pool.submit(self.prompt, chunk.task, question) for question in chunk.questions]

    def prompt(self, task: OpenTask, question: Question) -> Prompt:
        """Tiles as in training, and the question with a mark for each. Raises UserError naming the row."""
        settings = self.settings.for_dataset(task.dataset)
        try:
            groups = read_media(question.media, settings, task.dataset.root, open_media)
        except RowError as error:
            raise UserError(error.findings[0].reason, str(error), question.place) from error
        turns = [Turn("human", with_marks(question, len(groups)))]
        if question.system is not None:
            turns.insert(0, Turn("system", question.system))
        tiles = np.concatenate(groups) if groups else None
        return make_prompt(self.loaded, turns, tiles, [len(group) for group in groups], template=settings.template)

    def answers(self, task: OpenTask, prompts: Sequence[Prompt]) -> list[Generated]:
        """Greedy, in the order of the prompts."""
        return generate_all(
            self.loaded,
            prompts,
            template=self.settings.template,
            batch_size=self.batch_size,
            max_new_tokens=task.max_new_tokens,
            min_new_tokens=task.min_new_tokens,
        )


def one_ahead(items: Iterable[Item], begin: Callable[[Item], Result]) -> Iterator[tuple[Item, Result]]:
    """Each item with what `begin` made of it; the next is begun before one is given out."""
    waiting: list[tuple[Item, Result]] = []
    for item in items:
        waiting.append((item, begin(item)))
        if len(waiting) > 1:
            yield waiting.pop(0)
    yield from waiting
