"""The cross entropy of a language model, with the logits of a few positions in memory at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from internvl_api.memory.activations import positions_per_chunk
from torch import nn
from torch.nn import functional


class HeadLoss(nn.Module):
    """Computes losses and their gradients chunk by chunk, so that logits need no more memory for longer rows.

    It is a module because ZeRO-3 gathers parameters around a module's call: once a pass on every rank, although ranks
    differ in their number of chunks. The head stays a part of the native model, and is lent for each call.
    """

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.positions = positions_per_chunk(vocabulary)

    def compute(
        self, head: nn.Module, hidden: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The weighted sum of the positions' cross entropies, and each cross entropy without a gradient; both fp32.

        Args:
            head: maps hidden states to logits.
            hidden: (positions, hidden) states.
            targets: (positions,) int64 ids.
            weights: (positions,) fp32.
        """
        _register_borrowed(self, head)
        result: tuple[torch.Tensor, torch.Tensor] = self(hidden, targets, weights, head=head)
        return result

    def forward(self, hidden: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor, *, head: nn.Module) -> Any:
        learning = [parameter for parameter in head.parameters() if parameter.requires_grad]
        inputs = [hidden, *learning] if torch.is_grad_enabled() else [hidden.detach()]
        # Not head(...): under ZeRO-3 its hooks would gather the weights once a chunk, and ranks differ in their chunks.
        return _ChunkedLoss.apply(head.forward, self.positions, targets, weights, *inputs)  # type: ignore[no-untyped-call]


def _register_borrowed(module: nn.Module, head: nn.Module) -> None:
    """Let ZeRO-3 gather the head's parameters when `module` runs."""
    for parameter in head.parameters():
        if hasattr(parameter, "ds_id"):
            from internvl_trainer.import_deepspeed import deepspeed

            deepspeed.zero.register_external_parameter(module, parameter)


class _ChunkedLoss(torch.autograd.Function):
    """Takes the gradients while a chunk's logits are there; the backward pass only scales them.

    Nothing is computed twice, so that dropout and autocast in the head need no care.
    """

    @staticmethod
    def forward(
        ctx: Any,
        head: Callable[[torch.Tensor], torch.Tensor],
        positions: int,
        targets: torch.Tensor,
        weights: torch.Tensor,
        hidden: torch.Tensor,
        *learning: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        losses = torch.empty_like(weights)
        of_hidden = torch.empty_like(hidden) if hidden.requires_grad else None
        # A sum of many chunks in bf16 would lose digits.
        several = len(hidden) > positions
        of_head = [torch.zeros_like(each, dtype=torch.float32) for each in learning] if several else []
        for start in range(0, max(1, len(hidden)), positions):  # without positions, once: gradients are zeros, not None
            chunk = slice(start, start + positions)
            rows = hidden[chunk].detach().requires_grad_(hidden.requires_grad)
            losses[chunk], gradients = _losses(head, rows, targets[chunk], weights[chunk], learning)
            if of_hidden is not None:
                of_hidden[chunk] = gradients.pop(0)
            if several:
                _add(of_head, gradients)
            else:
                of_head = gradients
        ctx.save_for_backward(of_hidden, *of_head)
        ctx.dtypes = [each.dtype for each in learning]
        ctx.mark_non_differentiable(losses)
        return (losses * weights).sum(), losses

    @staticmethod
    def backward(ctx: Any, *scales: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        of_hidden, *of_head = ctx.saved_tensors
        scaled = [_scaled(each, scales[0], dtype) for each, dtype in zip(of_head, ctx.dtypes, strict=True)]
        return None, None, None, None, None if of_hidden is None else of_hidden.mul_(scales[0]), *scaled


def _losses(
    head: Callable[[torch.Tensor], torch.Tensor],
    rows: torch.Tensor,
    targets: torch.Tensor,
    weights: torch.Tensor,
    learning: tuple[torch.Tensor, ...],
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Cross entropies of a chunk, and the gradients of their weighted sum: of the rows that want one, then the head."""
    wanted = [each for each in (rows, *learning) if each.requires_grad]
    with torch.set_grad_enabled(bool(wanted)):
        losses = functional.cross_entropy(head(rows).float(), targets, reduction="none")
        gradients = torch.autograd.grad((losses * weights).sum(), wanted) if wanted else ()
    return losses.detach(), list(gradients)


def _add(sums: list[torch.Tensor], gradients: list[torch.Tensor]) -> None:
    """Add each gradient to its sum, and drop it: the next chunk needs its memory."""
    for total in sums:
        total.add_(gradients.pop(0))


def _scaled(gradient: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`gradient * scale` in `dtype`, rounded once; in place where it can be, else without a copy in fp32."""
    out = gradient if gradient.dtype == dtype else torch.empty_like(gradient, dtype=dtype)
    return torch.mul(gradient, scale, out=out)
