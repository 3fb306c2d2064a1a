"""Recall of images by captions and of captions by images, in blocks, without a matrix of all pairs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from internvl_trainer.errors import UserError
from internvl_trainer.retrieval.model import RetrievalModel, Variant, normalise

RANKS = (1, 5, 10)
_BLOCK_BYTES = 256 << 20
_BYTES_PER_PAIR = 12  # a score, its masked copy, and the masks


@torch.inference_mode()
def image_features(
    model: RetrievalModel, batches: Iterable[torch.Tensor], variants: Sequence[Variant] = ("C", "G")
) -> dict[Variant, torch.Tensor]:
    """(N, C) fp32 normalised features on the CPU for each variant, from batches of pixels."""
    found: dict[Variant, list[torch.Tensor]] = {variant: [] for variant in variants}
    for pixels in batches:
        for variant, features in model.encode_images(pixels, variants).items():
            found[variant].append(normalise(features.float()).cpu())
    return {variant: torch.cat(parts) for variant, parts in found.items()}


@torch.inference_mode()
def text_features(model: RetrievalModel, batches: Iterable[torch.Tensor]) -> torch.Tensor:
    """(M, C) fp32 normalised features on the CPU from batches of token ids, the same for every variant."""
    return torch.cat([normalise(model.encode_texts(ids).float()).cpu() for ids in batches])


@dataclass(frozen=True)
class Ranks:
    """The rank, from 1, of each query's best right answer among the wrong ones.

    Attributes:
        image_to_text: (N,) queries are images, and any of an image's captions is right; upstream's "text retrieval".
        text_to_image: (M,) queries are captions; upstream's "image retrieval".
        best_texts: (N,) position of the caption most similar to each image.
    """

    image_to_text: torch.Tensor
    text_to_image: torch.Tensor
    best_texts: torch.Tensor

    def by_way(self) -> dict[str, torch.Tensor]:
        """The ranks by the names of the metrics."""
        return {"image_to_text": self.image_to_text, "text_to_image": self.text_to_image}


def rank(
    images: torch.Tensor,
    texts: torch.Tensor,
    image_ids: torch.Tensor,
    text_image_ids: torch.Tensor,
    *,
    block_bytes: int = _BLOCK_BYTES,
) -> Ranks:
    """Ranks in both directions, by cosine.

    A tie counts against the model: a right answer is among the k best if fewer than k wrong ones score as high or
    higher. A top-k would decide ties by position, so features that are all equal could reach any score.

    Args:
        images, texts: (N, C) and (M, C), normalised.
        image_ids, text_image_ids: (N,) and (M,) integers; a caption and an image with equal ids belong together.
        block_bytes: memory for one block of scores.

    Raises:
        UserError: features are not finite, an image has no caption, or a caption has no image.
    """
    for name, features in (("images", images), ("texts", texts)):
        if not torch.isfinite(features).all():
            raise UserError("FeaturesNotFinite", f"the features of {name} hold values that are not finite")
    to_text, best = _best_ranks((images, image_ids), (texts, text_image_ids), block_bytes, "image", "caption")
    to_image, _ = _best_ranks((texts, text_image_ids), (images, image_ids), block_bytes, "caption", "image")
    return Ranks(to_text, to_image, best)


Side = tuple[torch.Tensor, torch.Tensor]


def _best_ranks(
    queries: Side, candidates: Side, block_bytes: int, query: str, candidate: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """(Q,) rank of each query's best right answer among the wrong ones, and (Q,) position of its best candidate."""
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
    for block, block_ids in zip(torch.split(features, rows), torch.split(ids, rows), strict=True):
        scores = block @ answers.T
        right = block_ids[:, None] == answer_ids[None, :]
        best = scores.masked_fill(~right, -torch.inf).amax(1, keepdim=True)
        ranks.append(1 + ((scores >= best) & ~right).sum(1))
        firsts.append(scores.argmax(1))
    return torch.cat(ranks), torch.cat(firsts)


def shares(found: torch.Tensor) -> dict[int, float]:
    """For each k of RANKS, the share of queries with a right answer among the k best.

    Args:
        found: (Q,) ranks, from 1.
    """
    return {k: int((found <= k).sum()) / len(found) for k in RANKS}
