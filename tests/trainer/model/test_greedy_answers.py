"""Answers in batches: those that each question gets by itself."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from golden import KINDS, load, sample
from internvl_trainer.data.row_schema import Turn
from internvl_trainer.model.greedy_answers import Prompt, generate_all, make_prompt, plan_batches
from internvl_trainer.model.load import LoadedModel
from trainer.answers import answer_all

pytestmark = pytest.mark.slow

QUESTIONS = ("hello there", "what colour is the cat on the table in the middle of it?", "describe")


def prompts(loaded: LoadedModel) -> list[Prompt]:
    """Text only, one image, several images."""
    made = [make_prompt(loaded, [Turn("human", text)], None, ()) for text in QUESTIONS]
    for row, tiles_per_image in ((3, [7]), (4, [3, 3, 2])):
        kept = sample("qwen2/Hermes-2", row).tiles[: sum(tiles_per_image)]
        counts = [len(part) for part in np.array_split(kept, len(tiles_per_image))]
        question = Turn("human", "<image>\n" * len(counts) + "what is it")
        made.append(make_prompt(loaded, [question], kept, counts))
    return made


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_answers_as_each_would_alone(kind: str) -> None:
    loaded = load(kind)
    loaded.model.eval()
    questions = prompts(loaded)
    lengths = {"max_new_tokens": 10, "min_new_tokens": 3}
    alone = [answer_all(loaded, [question], **lengths)[0] for question in questions]
    assert len(set(alone)) > 1
    assert answer_all(loaded, questions, batch_size=5, **lengths) == alone
    assert answer_all(loaded, questions[::-1], batch_size=2, **lengths) == alone[::-1]


def test_answers_are_as_long_as_they_must_be(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the token that the model likes best as the end of an answer."""
    loaded = load("internlm2")
    loaded.model.eval()
    (question,) = prompts(loaded)[:1]
    ids = torch.from_numpy(question.ids)[None]
    first = loaded.model.generate(ids, max_new_tokens=1, do_sample=False, eos_token_id=-1, pad_token_id=0)
    monkeypatch.setattr("internvl_trainer.model.greedy_answers.end_of_answer", lambda *_: int(first))
    assert answer_all(loaded, [question], max_new_tokens=6) == [""]
    assert answer_all(loaded, [question], max_new_tokens=6, min_new_tokens=4) != [""]
    assert not generate_all(loaded, [question], max_new_tokens=6)[0].at_limit
    (cut,) = generate_all(loaded, [question], max_new_tokens=6, min_new_tokens=6)
    assert cut.at_limit


def test_a_gpu_that_is_too_small_gets_fewer_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = load("qwen2")
    loaded.model.eval()
    questions = prompts(loaded)
    wanted = answer_all(loaded, questions, batch_size=5, max_new_tokens=4)
    tried: list[int] = []
    generate = loaded.model.generate

    def small(ids: torch.Tensor, *arguments: Any, **options: Any) -> torch.Tensor:
        tried.append(len(ids))
        if len(ids) > room:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return generate(ids, *arguments, **options)

    monkeypatch.setattr(loaded.model, "generate", small)
    room = 2
    assert answer_all(loaded, questions, batch_size=5, max_new_tokens=4) == wanted
    assert tried == [5, 2, 3, 1, 2]
    room = 0
    with pytest.raises(torch.OutOfMemoryError):
        answer_all(loaded, questions, batch_size=5, max_new_tokens=4)


@pytest.mark.parametrize(
    ("lengths", "batch_size", "limit", "wanted"),
    [
        pytest.param([5, 3, 9, 1], 2, None, [[3, 1], [0, 2]], id="neighbours in length"),
        pytest.param([5, 3, 9, 1], 8, None, [[3, 1, 0, 2]], id="all at once"),
        pytest.param([5, 3, 9, 8], 8, 7, [[1, 0], [3], [2]], id="those beyond the limit by themselves"),
        pytest.param([7, 7], 8, 7, [[0, 1]], id="up to the limit together"),
    ],
)
def test_batches(lengths: list[int], batch_size: int, limit: int | None, wanted: list[list[int]]) -> None:
    assert list(plan_batches(lengths, batch_size, limit)) == wanted


@pytest.mark.parametrize("limit", [pytest.param(160, id="all beyond it"), pytest.param(175, id="some beyond it")])
def test_rows_beyond_the_length_that_was_trained_on_are_answered_alike(limit: int) -> None:
    """Dynamic scaling looks at the longest row of a batch, and remembers the longest so far."""
    loaded = load("internlm2")
    loaded.model.eval()
    text = loaded.model.native.config.text_config
    text.max_position_embeddings, text.rope_parameters["factor"] = limit, 8.0
    loaded.model.reset_rotary()
    questions = prompts(loaded)
    assert max(len(question.ids) for question in questions) > limit
    alone = [answer_all(loaded, [question], max_new_tokens=16)[0] for question in questions]
    assert answer_all(loaded, questions, batch_size=8, max_new_tokens=16) == alone
