"""Every pair of a dataset checked before anything is trained: its line, its picture, its tokens."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from internvl_trainer.data.diagnostics import Finding
from internvl_trainer.data.sample import DatasetDescription, OpenMedia, RowError, fetch_media
from internvl_trainer.data.tiling import ImageProblem, decode_image
from internvl_trainer.retrieval.caption_files import Caption
from internvl_trainer.retrieval.caption_text import SUMMARIZE, encode_caption, normalise_caption

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_UNCUT = 1 << 20  # tokens, more than any caption has


def check_captions(
    dataset: DatasetDescription,
    captions: list[Caption],
    open_media: OpenMedia,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_tokens: int,
    threads: int,
    sizes: np.ndarray,
) -> list[Finding]:
    """Findings of captions whose line could be read, in the file's order; each picture is decoded once.

    Args:
        max_tokens: of a caption behind its prompt, with its start and end; what is beyond is a warning.
        sizes: (captions, 2), filled in with tokens, and 1 for the picture.
    """
    images = list(dict.fromkeys(caption.image for caption in captions))
    with ThreadPoolExecutor(threads) as pool:
        problems = dict(zip(images, pool.map(partial(_problem, dataset, open_media), images), strict=True))
    return [
        finding.at(dataset.annotation, caption.line)
        for caption, size in zip(captions, sizes, strict=True)
        for finding in _check(caption, problems[caption.image], tokenizer, max_tokens, size)
    ]


def _check(
    caption: Caption,
    problem: Finding | None,
    tokenizer: PreTrainedTokenizerBase,
    max_tokens: int,
    size: np.ndarray,
) -> Iterator[Finding]:
    if problem is not None:
        yield problem
    tokens = len(encode_caption(tokenizer, SUMMARIZE + normalise_caption(caption.text), _UNCUT))
    size[:] = min(tokens, max_tokens), 1
    if tokens > max_tokens:
        message = f"{tokens} tokens with its prompt, of which {max_tokens} fit (training.maxSeqLength); its end is cut"
        yield Finding("CaptionCut", message, "caption", "warning")


def _problem(dataset: DatasetDescription, open_media: OpenMedia, image: str) -> Finding | None:
    try:
        decode_image(fetch_media(dataset.root, image, "image", open_media))
    except RowError as error:
        return error.findings[0]
    except ImageProblem as error:
        return Finding("ImageUndecodable", f"{image}: {error}", "image")
    return None
