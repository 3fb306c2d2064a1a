"""What a retrieval model makes of test rows: features of a picture and of its captions, or a caption of its own.

A row's features are stored with its chunk like another model's answers, so that an evaluation that was ended goes on
where it was; `retrieval_figures` compares them when all are there.
"""

from __future__ import annotations

import base64
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import torch
from internvl_api.publish_condition import RETRIEVAL_METRICS
from transformers import PreTrainedTokenizerBase

from internvl_trainer.artifacts.sources import open_media
from internvl_trainer.data.diagnostics import RowError
from internvl_trainer.data.media import open_picture
from internvl_trainer.data.pictures import DEFAULT, Decoding
from internvl_trainer.errors import UserError
from internvl_trainer.evaluate.annotations import Question
from internvl_trainer.evaluate.chunks import Answer, Chunk, Row
from internvl_trainer.evaluate.tasks import OpenTask
from internvl_trainer.model.greedy_answers import Generated
from internvl_trainer.model.tokenizer import decode_answer
from internvl_trainer.retrieval.caption_text import PADDING, SUMMARIZE, encode_caption, encode_prompt, normalise_caption
from internvl_trainer.retrieval.load import LoadedRetrievalModel
from internvl_trainer.retrieval.model import Variant
from internvl_trainer.retrieval.pair_batch import pad_captions, resize_image
from internvl_trainer.retrieval.recall import RANKS, Ranks, image_features, rank, shares, text_features

_VARIANTS: tuple[Variant, ...] = ("C", "G")
_TEXTS = "texts"
FEATURES = "features"


@dataclass(frozen=True)
class Picture:
    """A test row that is ready for the model; `pixels` are (3, S, S) uint8."""

    question: Question
    pixels: np.ndarray


@dataclass(frozen=True)
class RetrievalAnswerer:
    """A retrieval model with all that decides its answers, but for the task.

    Attributes:
        normalises: captions are compared as they were trained on; upstream's evaluation takes them as they stand.
    """

    loaded: LoadedRetrievalModel
    tokenizer: PreTrainedTokenizerBase
    batch_size: int
    max_tokens: int
    normalises: bool
    decoding: Decoding = DEFAULT

    def prompts(self, chunk: Chunk, pool: Executor) -> list[Future[Picture]]:
        """Begin to read the pictures of a chunk."""
        return [pool.submit(self._picture, chunk.task, question) for question in chunk.questions]

    def answers(self, task: OpenTask, prompts: Sequence[Picture]) -> list[Answer]:
        """Features for a retrieval task, captions for the others; in the order of the prompts."""
        return list(self._describe(prompts) if task.retrieves else self._caption(task, prompts))

    def _picture(self, task: OpenTask, question: Question) -> Picture:
        try:
            image = open_picture(question.media.images[0], task.dataset.root, open_media, self.decoding)
        except RowError as error:
            raise UserError(error.findings[0].reason, str(error), question.place) from error
        return Picture(question, resize_image(image, self.loaded.image_size))

    def _describe(self, pictures: Sequence[Picture]) -> Iterator[Answer]:
        images = image_features(self.loaded.model, self._pixels(pictures), _VARIANTS)
        texts = iter(text_features(self.loaded.model, self._captions(pictures)))
        for number, picture in enumerate(pictures):
            own = torch.stack([next(texts) for _ in picture.question.references])
            yield {variant: _pack(images[variant][number]) for variant in _VARIANTS} | {_TEXTS: _pack(own)}

    def _caption(self, task: OpenTask, pictures: Sequence[Picture]) -> Iterator[Generated]:
        ids = [encode_prompt(self.tokenizer, picture.question.text or "") for picture in pictures]
        for pixels, prompts in zip(self._pixels(pictures), _batches(ids, self.batch_size), strict=True):
            input_ids, mask = _pad_left(prompts)
            generated = self.loaded.model.generate(
                pixels,
                input_ids.to(self._device),
                mask.to(self._device),
                do_sample=False,
                num_beams=task.beams,
                min_new_tokens=task.min_new_tokens,
                max_new_tokens=task.max_new_tokens,
                pad_token_id=PADDING,
                eos_token_id=self.tokenizer.eos_token_id,
            )
            for row in generated.tolist():
                text = decode_answer(self.tokenizer, row).strip()
                yield Generated(text, at_limit=self.tokenizer.eos_token_id not in row)

    def _pixels(self, pictures: Sequence[Picture]) -> Iterator[torch.Tensor]:
        for batch in _batches(pictures, self.batch_size):
            yield torch.from_numpy(np.stack([picture.pixels for picture in batch])).to(self._device)

    def _captions(self, pictures: Sequence[Picture]) -> Iterator[torch.Tensor]:
        for batch in _batches(
            list(chain.from_iterable(each.question.references for each in pictures)), self.batch_size
        ):
            texts = [normalise_caption(text) if self.normalises else text for text in batch]
            ids, _ = pad_captions([encode_caption(self.tokenizer, SUMMARIZE + text, self.max_tokens) for text in texts])
            yield ids.to(self._device)

    @property
    def _device(self) -> torch.device:
        return self.loaded.model.logit_scale.device


def retrieval_figures(rows: Sequence[Row]) -> tuple[dict[str, float], list[Row]]:
    """R@k both ways for InternVL-C and -G, and the rows as predictions: the caption that InternVL-G finds for each.

    A row's own figures are whether its captions are found, and the share of its captions that find it.
    """
    owners = torch.tensor([number for number, row in enumerate(rows) for _ in row["references"]])
    texts = torch.cat([_unpack(row[FEATURES][_TEXTS]) for row in rows])
    captions = [caption for row in rows for caption in row["references"]]
    found: dict[str, Ranks] = {}
    for variant in _VARIANTS:
        images = torch.cat([_unpack(row[FEATURES][variant]) for row in rows])
        found[variant] = rank(images, texts, torch.arange(len(rows)), owners)
    totals = {
        f"{variant}_{way}_R{k}": share
        for variant, ranks in found.items()
        for way, places in ranks.by_way().items()
        for k, share in shares(places).items()
    }
    scores = _own_scores(found, owners, len(rows))
    return {name: totals[name] for name in RETRIEVAL_METRICS}, [
        {**_without_features(row), "prediction": captions[int(best)], "scores": own}
        for row, best, own in zip(rows, found["G"].best_texts, scores, strict=True)
    ]


def _own_scores(found: dict[str, Ranks], owners: torch.Tensor, count: int) -> list[dict[str, float]]:
    each: list[dict[str, float]] = [{} for _ in range(count)]
    for variant, ranks in found.items():
        for k in RANKS:
            hits = torch.zeros(count).index_add(0, owners, (ranks.text_to_image <= k).float())
            parts = hits / torch.bincount(owners, minlength=count)
            for own, to_text, share in zip(each, (ranks.image_to_text <= k).tolist(), parts.tolist(), strict=True):
                own[f"{variant}_image_to_text_R{k}"] = float(to_text)
                own[f"{variant}_text_to_image_R{k}"] = share
    return each


def _without_features(row: Row) -> Row:
    return {name: value for name, value in row.items() if name != FEATURES}


def _batches(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    return (items[start : start + size] for start in range(0, len(items), size))


def _pad_left(prompts: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    ids, mask = pad_captions([prompt[::-1] for prompt in prompts])
    return ids.flip(1), mask.flip(1)


def _pack(features: torch.Tensor) -> dict[str, Any]:
    """Exact, and safe to read: shape and bytes of fp32 numbers, little-endian."""
    data = np.ascontiguousarray(features.numpy(), "<f4")
    return {"shape": list(data.shape), "data": base64.b64encode(data.tobytes()).decode()}


def _unpack(packed: dict[str, Any]) -> torch.Tensor:
    """(n, C) fp32."""
    data = np.frombuffer(base64.b64decode(packed["data"]), "<f4").reshape(packed["shape"])
    return torch.from_numpy(np.atleast_2d(data).copy())
