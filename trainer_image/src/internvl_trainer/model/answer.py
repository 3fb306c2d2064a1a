"""One question, one greedy answer: upstream's `chat`, for evaluation and for looking at a model."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from ..data.conversation import TEMPLATES, Turn, encode_prompt
from .load import LoadedModel
from .tokenizer import decode_answer


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
    """The greedy answer, without surrounding space.

    Args:
        question: with one `<image>` mark for each image.
        tiles: (n, 3, S, S) uint8, of all images in order; `tiles_per_image` says how many each has.
    """
    tokenizer, name = loaded.tokenizer, template or loaded.template
    device = next(loaded.model.parameters()).device
    ids = encode_prompt([Turn("human", question)], tokenizer, name, tiles_per_image, loaded.context_tokens)
    generated = loaded.model.generate(
        torch.from_numpy(ids)[None].to(device),
        None if tiles is None else torch.from_numpy(tiles).to(device),
        max_new_tokens=max_new_tokens,
        min_new_tokens=min_new_tokens,
        do_sample=False,
        eos_token_id=end_of_answer(loaded, name),
        pad_token_id=tokenizer.pad_token_id,
    )
    # Upstream's generate puts the language model's bos first; it is a special token, not seen, in published models.
    bos: int | None = loaded.model.native.config.text_config.bos_token_id
    start = [] if bos is None else [bos]
    return decode_answer(tokenizer, start + generated[0].tolist()).strip()


def end_of_answer(loaded: LoadedModel, template: str) -> int:
    """Id of the token that ends a turn."""
    return int(loaded.tokenizer.get_vocab()[TEMPLATES[template].end.strip()])
