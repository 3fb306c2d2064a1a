"""Recall of images by captions and of captions by images, in blocks: no matrix of all pairs is ever made."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from internvl_trainer.errors import UserError
from internvl_trainer.retrieval.model import RetrievalModel, Variant, normalise

RANKS = (1, 5, 10)
_BLOCK_BYTES = 256 << 20
_BYTES_PER_PAIR = 12  # a score, its copy without the wrong pairs, and masks


@dataclass(frozen=True)
class Recall:
    """For each k, the share of queries that have a right answer among the k best.

    Attributes:
        image_to_text: queries are images; any of an image's captions is right. Upstream's "text retrieval".
        text_to_image: queries are captions. Upstream's "image retrieval".
    """

    image_to_text: dict[int, float]
    text_to_image: dict[int, float]


@torch.inference_mode()
def image_features(
    model: RetrievalModel, batches: Iterable[torch.Tensor], variants: Sequence[Variant] = ("C", "G")
) -> dict[Variant, torch.Tensor]:
    """(N, C) fp32 normalised features on the CPU for each variant, of batches of pixels; one pass serves them all."""
    found: dict[Variant, list[torch.Tensor]] = {variant: [] for variant in variants}
    for pixels in batches:
        for variant, features in model.encode_variants(pixels, variants).items():
            found[variant].append(normalise(features.float()).cpu())
    return {variant: torch.cat(parts) for variant, parts in found.items()}


@torch.inference_mode()
def text_features(model: RetrievalModel, batches: Iterable[torch.Tensor]) -> torch.Tensor:
    """(M, C) fp32 normalised features on the CPU, of batches of token ids; the same for every variant."""
    return torch.cat([normalise(model.encode_texts(ids).float()).cpu() for ids in batches])


@dataclass(frozen=True)
class Ranks:
    """The place, from 1, of each query's best right answer among the wrong ones.

    Attributes:
        image_to_text: (N,) of images. text_to_image: (M,) of captions.
        best_texts: (N,) positions of the captions most like each image.
    """

    image_to_text: torch.Tensor
    text_to_image: torch.Tensor
    best_texts: torch.Tensor

    def by_way(self) -> dict[str, torch.Tensor]:
        """The ranks by the names that metrics have."""
        return {"image_to_text": self.image_to_text, "text_to_image": self.text_to_image}


def recall(
    images: torch.Tensor,
    texts: torch.Tensor,
    image_ids: torch.Tensor,
    text_image_ids: torch.Tensor,
    *,
    ranks: Sequence[int] = RANKS,
    block_bytes: int = _BLOCK_BYTES,
) -> Recall:
    """R@k both ways, by cosine; for arguments and errors see `rank`."""
    found = rank(images, texts, image_ids, text_image_ids, block_bytes=block_bytes)
    return Recall(shares(found.image_to_text, ranks), shares(found.text_to_image, ranks))


def rank(
    images: torch.Tensor,
    texts: torch.Tensor,
    image_ids: torch.Tensor,
    text_image_ids: torch.Tensor,
    *,
    block_bytes: int = _BLOCK_BYTES,
) -> Ranks:
    """Ranks both ways, by cosine.

    A tie counts against the model: a right answer is among the k best if fewer than k wrong ones score as high or
    higher. (A top-k would decide ties by position, and features that are all equal could score anything; so they score
    0, and the figure does not depend on the data's order.)

    Args:
        images, texts: (N, C) and (M, C), normalised.
        image_ids, text_image_ids: (N,) and (M,) integers; a caption and an image with equal ids belong together.
        block_bytes: memory for one block of scores.

    Raises:
        UserError: features that are not numbers, an image without a caption, a caption without its image.
    """
    for name, features in (("images", images), ("texts", texts)):
        if not torch.isfinite(features).all():
            raise UserError("FeaturesNotFinite", f"the features of {name} hold values that are no finite numbers")
    to_text, best = _best_ranks((images, image_ids), (texts, text_image_ids), block_bytes, "image", "caption")
    to_image, _ = _best_ranks((texts, text_image_ids), (images, image_ids), block_bytes, "caption", "image")
    return Ranks(to_text, to_image, best)


Side = tuple[torch.Tensor, torch.Tensor]


def _best_ranks(
    queries: Side, candidates: Side, block_bytes: int, query: str, candidate: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """(queries,) place, from 1, of each query's best right answer among the wrong ones, and the best of all."""
    features, ids = queries
    answers, answer_ids = candidates
    lonely = ~torch.isin(ids, answer_ids)
    if lonely.any():
        first = int(ids[lonely][0])
        raise UserError(
            "UnmatchedRows", f"{int(lonely.sum())} of {len(ids)} have no {candidate}, such as {query} of image {first}"
        )
    rows = max(1, block_bytes // (_BYTES_PER_PAIR * len(answers)))
    ranks, firsts = [], []
    for block, block_ids in zip(features.split(rows), ids.split(rows), strict=True):
        scores = block @ answers.T
        right = block_ids[:, None] == answer_ids[None, :]
        best = scores.masked_fill(~right, -torch.inf).amax(1, keepdim=True)
        ranks.append(1 + ((scores >= best) & ~right).sum(1))
        firsts.append(scores.argmax(1))
    return torch.cat(ranks), torch.cat(firsts)


def shares(found: torch.Tensor, ranks: Sequence[int] = RANKS) -> dict[int, float]:
    """For each k, the part of queries whose first right answer is among the k best; `found`: (Q,) ranks from 1."""
    return {rank: int((found <= rank).sum()) / len(found) for rank in ranks}
