"""What a model answers, without how each answer ended."""

from collections.abc import Sequence
from typing import Any

from internvl_trainer.model.greedy_answers import Prompt, generate_all
from internvl_trainer.model.load import LoadedModel


def answer_all(loaded: LoadedModel, prompts: Sequence[Prompt], **options: Any) -> list[str]:
    return [each.text for each in generate_all(loaded, prompts, **options)]
