"""Check of a merged model: every tensor is read back and computed again in float64.

It finds errors that logits cannot show, as a small adapter moves the logits of a bf16 model by less than rounding.
"""

from __future__ import annotations

import torch

from internvl_trainer.model.checkpoint_format.files import read_tensor
from internvl_trainer.model.checkpoint_format.tensors import DERIVED
from internvl_trainer.model.checkpoint_source import Source
from internvl_trainer.model.trained_weights import TrainedWeights

_ROWS = 128  # of each merged matrix, evenly spread: float64 is slow, and an error is never in a single row
_ARITHMETIC = 1e-6  # of a row's largest value: error of fp32 arithmetic before the rounding to the stored dtype


def find_wrong_tensor(written: Source, source: Source, weights: TrainedWeights | None) -> str | None:
    """Name of the first native tensor that is not source + scaling x B x A (or DoRA's scaling of it), rounded once.

    A tensor without an adapter must be bit-equal; of a merged one 128 rows are computed. Memory: one tensor of each
    checkpoint.
    """
    pieces = {piece.name: piece for piece in source.pieces()}
    for piece in written.pieces():
        if DERIVED.search(piece.name):
            continue
        found = piece.make(read_tensor, written.architecture)
        base = pieces[piece.name].make(read_tensor, source.architecture)
        if weights is not None:
            base = weights.without_adapter()(piece.name, base)
        if not _is_right(found, base, piece.name, weights):
            return piece.name
    return None


def _is_right(found: torch.Tensor, base: torch.Tensor, name: str, weights: TrainedWeights | None) -> bool:
    pair = weights.adapter.pair(name.removesuffix(".weight")) if weights and weights.adapter else None
    if found.shape != base.shape or found.dtype != base.dtype:
        return False
    if pair is None or not name.endswith(".weight"):
        return torch.equal(found, base)
    rows = torch.linspace(0, len(base) - 1, min(_ROWS, len(base)), dtype=torch.float64).round().long()
    exact = base[rows].double() + pair.scaling * pair.up[rows].double() @ pair.down.double()
    if pair.magnitude is not None:
        exact *= (pair.magnitude[rows].double() / exact.norm(dim=1)).unsqueeze(1)
    kind = torch.finfo(found.dtype)
    allowed = kind.eps / 2 * exact.abs() + kind.smallest_normal * kind.eps
    allowed += _ARITHMETIC * exact.abs().amax(dim=1, keepdim=True)
    return bool(((found[rows].double() - exact).abs() <= allowed).all())
