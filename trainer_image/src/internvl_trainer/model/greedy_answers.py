"""Greedy answers with a key-value cache, equal to upstream's `chat`."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from internvl_trainer.data.row_schema import Turn
from internvl_trainer.data.tokenize import TEMPLATES, encode_prompt
from internvl_trainer.faults import is_gpu_out_of_memory
from internvl_trainer.model.load import LoadedModel
from internvl_trainer.model.rotary import constant_up_to
from internvl_trainer.model.tokenizer import decode_answer

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Prompt:
    """A prompt to answer: (L,) int64 ids, and (n, 3, S, S) uint8 tiles of all its images in order, or None."""

    ids: np.ndarray
    tiles: np.ndarray | None = None


@dataclass(frozen=True)
class Generated:
    """An answer without surrounding space, and whether it was cut at the most new tokens."""

    text: str
    at_limit: bool


def answer(
    loaded: LoadedModel,
    question: str,
    tiles: np.ndarray | None = None,
    tiles_per_image: Sequence[int] = (),
    *,
    template: str | None = None,
    max_new_tokens: int = 30,
    min_new_tokens: int = 0,
) -> str:
    """The greedy answer to one question, without surrounding space.

    Args:
        question: with one `<image>` mark for each image.
        tiles: (n, 3, S, S) uint8, of all images in order; `tiles_per_image` says how many each has.
    """
    prompt = make_prompt(loaded, [Turn("human", question)], tiles, tiles_per_image, template=template)
    (found,) = generate_all(
        loaded, [prompt], template=template, max_new_tokens=max_new_tokens, min_new_tokens=min_new_tokens
    )
    return found.text


def make_prompt(
    loaded: LoadedModel,
    turns: Sequence[Turn],
    tiles: np.ndarray | None,
    tiles_per_image: Sequence[int],
    *,
    template: str | None = None,
) -> Prompt:
    """The prompt of a conversation that ends with a question and has one `<image>` mark for each image."""
    name = template or loaded.template
    return Prompt(encode_prompt(turns, loaded.tokenizer, name, tiles_per_image, loaded.context_tokens), tiles)


def generate_all(
    loaded: LoadedModel,
    prompts: Sequence[Prompt],
    *,
    template: str | None = None,
    batch_size: int = 1,
    max_new_tokens: int = 30,
    min_new_tokens: int = 0,
) -> list[Generated]:
    """The greedy answer to each prompt, without surrounding space, computed in batches of up to `batch_size`."""
    end = end_of_answer(loaded, template or loaded.template)
    # Upstream's generate returns the language model's bos first; decoding skips it in published models.
    bos: int | None = loaded.model.native.config.text_config.bos_token_id
    start = [] if bos is None else [bos]
    answers = [Generated("", at_limit=False)] * len(prompts)
    limit = constant_up_to(loaded.model.native.config.text_config)
    waiting = deque(plan_batches([len(prompt.ids) + max_new_tokens for prompt in prompts], batch_size, limit))
    while waiting:
        places = waiting.popleft()
        if limit is not None:
            loaded.model.reset_rotary()  # dynamic scaling keeps the frequencies of the longest row it has seen
        generated = _generate(
            loaded,
            [prompts[place] for place in places],
            end,
            max_new_tokens=max_new_tokens,
            min_new_tokens=min_new_tokens,
        )
        if generated is None:
            half = len(places) // 2
            waiting.extendleft([places[half:], places[:half]])
            continue
        for place, ids in zip(places, generated, strict=True):
            is_whole = end in ids
            own = ids[: ids.index(end)] if is_whole else ids  # the rest only fills the batch
            answers[place] = Generated(decode_answer(loaded.tokenizer, start + own).strip(), at_limit=not is_whole)
    return answers


def plan_batches(lengths: Sequence[int], batch_size: int, limit: int | None) -> Iterator[list[int]]:
    """Positions of the rows of each batch, grouped by length to save padding.

    Above `limit` tokens, rotary frequencies depend on the longest row of a batch. Such a row is a batch by itself, so
    that an answer never depends on other rows.
    """
    order = sorted(range(len(lengths)), key=lambda place: lengths[place])
    alone = [place for place in order if limit is not None and lengths[place] > limit]
    together = order[: len(order) - len(alone)]
    for start in range(0, len(together), batch_size):
        yield together[start : start + batch_size]
    for place in alone:
        yield [place]


def _generate(
    loaded: LoadedModel, prompts: Sequence[Prompt], end: int, *, max_new_tokens: int, min_new_tokens: int
) -> list[list[int]] | None:
    """New ids of each prompt; None when the batch does not fit in the GPU's memory.

    Prompts are padded on the left, and the padding is masked.
    """
    device = next(loaded.model.parameters()).device
    padding = loaded.tokenizer.pad_token_id or 0
    longest = max(len(prompt.ids) for prompt in prompts)
    ids = torch.full((len(prompts), longest), padding, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt.ids) :] = torch.from_numpy(prompt.ids)
        mask[row, longest - len(prompt.ids) :] = 1
    tiles = [prompt.tiles for prompt in prompts if prompt.tiles is not None]
    try:
        generated = loaded.model.generate(
            ids.to(device),
            torch.from_numpy(np.concatenate(tiles)).to(device) if tiles else None,
            attention_mask=mask.to(device),
            max_new_tokens=max_new_tokens,
            min_new_tokens=min_new_tokens,
            do_sample=False,
            eos_token_id=end,
            pad_token_id=padding,
        )
    except RuntimeError as error:
        # With a sharded model, the other GPUs may have room: halving the batch here alone would leave them waiting.
        if len(prompts) == 1 or loaded.shard is not None or not is_gpu_out_of_memory(error):
            raise
        logger.warning("the GPU has no memory for %d prompts at a time; answering half as many", len(prompts))
        return None
    result: list[list[int]] = generated.tolist()
    return result


def end_of_answer(loaded: LoadedModel, template: str) -> int:
    """Id of the token that ends a turn."""
    return int(loaded.tokenizer.get_vocab()[TEMPLATES[template].end.strip()])
