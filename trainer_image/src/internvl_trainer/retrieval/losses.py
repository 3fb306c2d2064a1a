"""Losses of retrieval training: contrast of images and texts over all ranks (ITC), and matching of pairs (ITM)."""

from __future__ import annotations

from typing import Any

import torch
from torch import distributed
from torch.nn import functional


class _GatherWithGradient(torch.autograd.Function):
    """All ranks' rows in rank order; the backward pass sums all ranks' gradients for each rank's rows."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor) -> torch.Tensor:
        pieces = [torch.empty_like(rows) for _ in range(distributed.get_world_size())]
        distributed.all_gather(pieces, rows.contiguous())
        return torch.cat(pieces)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:
        whole = gradients[0].clone(memory_format=torch.contiguous_format)
        distributed.all_reduce(whole)
        return whole.chunk(distributed.get_world_size())[distributed.get_rank()]


def _is_alone() -> bool:
    return not distributed.is_initialized() or distributed.get_world_size() == 1


def gather_rows(rows: torch.Tensor) -> torch.Tensor:
    """(world x B, ...) rows of all ranks from (B, ...) of each, with gradient; B is the same on every rank.

    Without gradient the rows are returned as they are: held-out rows are contrasted batch by batch, so that their loss
    does not depend on the world size.
    """
    if not torch.is_grad_enabled() or _is_alone():
        return rows
    gathered: torch.Tensor = _GatherWithGradient.apply(rows)  # type: ignore[no-untyped-call]
    return gathered


def gather_tokens(tokens: torch.Tensor) -> torch.Tensor:
    """`gather_rows` of (B, L) ids or masks, padded with 0 to the longest L of all ranks."""
    if not torch.is_grad_enabled() or _is_alone():
        return tokens
    length = torch.tensor(tokens.shape[1], device=tokens.device)
    distributed.all_reduce(length, distributed.ReduceOp.MAX)
    return gather_rows(functional.pad(tokens, (0, int(length) - tokens.shape[1])))


def contrastive_loss(
    visions: torch.Tensor, queries: torch.Tensor, texts: torch.Tensor, image_ids: torch.Tensor, scale: torch.Tensor
) -> torch.Tensor:
    """ITC, the mean over this rank's rows; its mean over ranks is the loss of the global batch.

    The candidates of a row are all ranks' rows; its target is spread evenly over those with its image id, as all
    captions of an image are right. Both the vision tower's and the queries' features are compared with the texts, in
    both directions. Formula: upstream's internvl_stage2_retrieval.

    Args:
        visions, queries, texts: (B, C), normalised.
        image_ids: (B,) integers.
        scale: the inverse temperature.
    """
    same = image_ids[:, None] == gather_rows(image_ids)[None, :]
    targets = same.to(texts.dtype) / same.sum(1, keepdim=True)
    all_texts = gather_rows(texts)
    total = torch.zeros((), device=texts.device)
    for images in (queries, visions):
        to_text = _soft_cross_entropy(scale * (images @ all_texts.T), targets)
        to_image = _soft_cross_entropy(scale * (texts @ gather_rows(images).T), targets)
        total = total + (to_text + to_image) / 2
    return total


def _soft_cross_entropy(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return -(functional.log_softmax(logits, dim=1) * targets).sum(1).mean()


def matching_loss(negatives: torch.Tensor, positives: torch.Tensor) -> torch.Tensor:
    """ITM, the cross entropy of (B, 2) logits with the classes 0 (another image's text) and 1 (its own)."""
    logits = torch.cat([negatives, positives])
    labels = torch.arange(2, device=logits.device).repeat_interleave(len(negatives))
    return functional.cross_entropy(logits, labels)


def mine_negatives(
    images: torch.Tensor, texts: torch.Tensor, image_ids: torch.Tensor, scale: torch.Tensor
) -> torch.Tensor:
    """(B,) int64 position of a text of another image for each image, or -1 when there is none.

    Positions count all ranks' texts. They are drawn from the softmax of ITC similarities over other images' texts, as
    in ALBEF (arXiv:2107.07651) and BLIP (arXiv:2201.12086).

    Args:
        images, texts: (B, C), this rank's, normalised; no gradient flows.
    """
    images, all_texts = images.detach(), gather_rows(texts.detach())
    same = image_ids[:, None] == gather_rows(image_ids)[None, :]
    logits = (scale.detach() * (images @ all_texts.T)).float().masked_fill(same, -torch.inf)
    alone = same.all(1)
    weights = logits.masked_fill(alone[:, None], 0.0).softmax(1)
    return torch.multinomial(weights, 1).squeeze(1).masked_fill(alone, -1)
