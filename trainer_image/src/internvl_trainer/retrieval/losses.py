"""What retrieval training minimises: contrast of images and texts over all ranks, and matching of pairs."""

from __future__ import annotations

from typing import Any

import torch
from torch import distributed
from torch.nn import functional


class _GatherWithGradient(torch.autograd.Function):
    """Every rank's rows, in the order of ranks; each rank's rows get the sum of all ranks' gradients for them."""

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
    """(B, ...) of each rank to (world x B, ...), with gradient; B is the same on every rank.

    The same rows when alone, and where there is no gradient: what is held out is contrasted batch by batch, so that its
    loss does not depend on how many ranks there are.
    """
    if not torch.is_grad_enabled() or _is_alone():
        return rows
    gathered: torch.Tensor = _GatherWithGradient.apply(rows)  # type: ignore[no-untyped-call]
    return gathered


def gather_tokens(tokens: torch.Tensor) -> torch.Tensor:
    """`gather_rows` of (B, L) ids or masks, L being each rank's own: all are padded with 0 to the longest."""
    if not torch.is_grad_enabled() or _is_alone():
        return tokens
    length = torch.tensor(tokens.shape[1], device=tokens.device)
    distributed.all_reduce(length, distributed.ReduceOp.MAX)
    return gather_rows(functional.pad(tokens, (0, int(length) - tokens.shape[1])))


def contrastive_loss(
    visions: torch.Tensor, queries: torch.Tensor, texts: torch.Tensor, image_ids: torch.Tensor, scale: torch.Tensor
) -> torch.Tensor:
    """ITC: the mean over this rank's rows; averaged over ranks it is the loss of the whole global batch.

    Each row's candidates are all ranks' rows, and its target is shared evenly among those with its image id (captions
    of one photograph are all right answers). Half of it compares the vision tower's features with the texts, half the
    queries', each in both directions (upstream: internvl_stage2_retrieval).

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
    """ITM: cross entropy of (B, 2) logits, the classes being 0 (another image's text) and 1 (its own)."""
    logits = torch.cat([negatives, positives])
    labels = torch.arange(2, device=logits.device).repeat_interleave(len(negatives))
    return functional.cross_entropy(logits, labels)


def mine_negatives(
    images: torch.Tensor, texts: torch.Tensor, image_ids: torch.Tensor, scale: torch.Tensor
) -> torch.Tensor:
    """(B,) for each image a text that is not its own, likelier the more alike they are; -1: there is none.

    Positions among all ranks' texts, as contrast has them. Drawn from the softmax of ITC similarities over other
    images' texts, as ALBEF and BLIP do.

    Args:
        images, texts: (B, C), this rank's, normalised; no gradient flows.
    """
    images, all_texts = images.detach(), gather_rows(texts.detach())
    same = image_ids[:, None] == gather_rows(image_ids)[None, :]
    logits = (scale.detach() * (images @ all_texts.T)).float().masked_fill(same, -torch.inf)
    alone = same.all(1)
    weights = logits.masked_fill(alone[:, None], 0.0).softmax(1)
    return torch.multinomial(weights, 1).squeeze(1).masked_fill(alone, -1)
