"""Bytes of activations for one token or patch in transformers' native layers.

The coefficients are measured: the size of every tensor of a step in transformers' own modules, in bf16 and fp32, by
tokens and dimensions; tests/trainer/test_memory_estimate.py measures them again. The part of a coefficient that does
not grow with the element size belongs to norms and dropout masks, whose format does not follow the weights'. Attention
keeps no square matrix (sdpa, flash). Principle: Korthikanti et al. 2022, arXiv:2205.05198.
"""

from typing import NamedTuple

from internvl_api.models.catalogue import CatalogueModel, LanguageModel, VisionTower
from internvl_api.models.retrieval import RetrievalCatalogueModel

# At its peak the backward pass of cross entropy in fp32 holds the log-probabilities and two gradients: bytes for each
# supervised token and word of the vocabulary.
LOGIT_BYTES = 12
# The trainer computes the loss in chunks of positions, whose logits need at most this much at a time. Four rows with
# 256 supervised tokens of a vocabulary of 151,674 are one chunk: several need fp32 sums, which cost time and memory.
LOSS_CHUNK_BYTES = 2 * 2**30


def positions_per_chunk(vocabulary: int) -> int:
    """Supervised positions whose logits the trainer computes at a time."""
    return max(1, LOSS_CHUNK_BYTES // (LOGIT_BYTES * vocabulary))


class Cost(NamedTuple):
    """Bytes a token (or patch).

    Attributes:
        held: of all layers, from the forward pass to the backward pass.
        layer: in addition, at the peak of one layer's pass.
        ends: outside the layers, until the loss is computed.
    """

    held: float
    layer: float
    ends: float = 0.0


def language_cost(model: LanguageModel, size: int, *, checkpointing: bool, adapter: bool) -> Cost:
    """Cost of a decoder with elements of `size` bytes; `checkpointing` keeps only the inputs of layers."""
    hidden, inner, keys = model.hidden, model.intermediate, model.kv_width
    fused = model.kind == "phi3"
    ends = (2.5 * size + 4) * hidden
    keys_bytes = (3 if fused else 2) * size * keys
    if checkpointing:
        recomputed = {
            (False, False): 5.5 * size + 12.2,
            (False, True): 16 * size + 16,
            (True, False): 7.5 * size + 12.2,
            (True, True): 10.75 * size + 16.1,
        }[fused, adapter]
        return Cost(model.layers * size * hidden, recomputed * hidden + 6 * size * inner + keys_bytes, ends)
    saved = {
        (False, False): 6 * size + 8,
        (False, True): 14.5 * size + 8,
        (True, False): 8 * size + 8,
        (True, True): 9.25 * size + 8,
    }[fused, adapter]
    layer = saved * hidden + (5 if adapter else 4) * size * inner + keys_bytes
    return Cost(model.layers * layer, ends + 6 * hidden + 1.5 * size * inner, ends)


def vision_cost(tower: VisionTower, size: int, *, checkpointing: bool, learns: bool, adapter: bool) -> Cost:
    """Cost of a vision tower for each patch (the class token is one more). A frozen tower holds nothing."""
    hidden, inner, plain = tower.hidden, tower.intermediate, tower.layer_norm
    if not learns:
        return Cost(0.0, (4 * size + 4.7) * hidden + 2 * size * inner)
    dropped = 8.5 * size * hidden + size * inner if adapter else 0.0
    if checkpointing:
        recomputed = (12.35 * size if plain else 13.35 * size + 20.1) * hidden + 3.125 * size * inner
        return Cost(tower.layers * size * hidden, recomputed + dropped)
    saved = (10 * size if plain else 12 * size + 16) * hidden + 2 * size * inner + dropped
    return Cost(tower.layers * saved, 3 * size * inner)


def loss_bytes(model: LanguageModel, size: int, supervised: int, *, learns: bool, whole: bool) -> int:
    """Bytes of the loss of `supervised` positions, beyond what is held until it is computed.

    Args:
        learns: the head has gradients. The sum over several chunks is in fp32, beside a chunk's own gradient.
        whole: the logits of all positions are there at once, as in upstream's code.
    """
    rows = supervised * size * model.hidden
    if whole:
        return rows + supervised * LOGIT_BYTES * model.vocab
    chunk = min(supervised, positions_per_chunk(model.vocab))
    gradient = size * model.vocab * model.hidden if learns else 0
    sums = 4 * model.vocab * model.hidden if learns and supervised > chunk else 0
    logits = max(LOGIT_BYTES * model.vocab * chunk, size * model.vocab * chunk + gradient)
    return 2 * rows + sums + logits


def projector_held(model: CatalogueModel, size: int) -> int:
    """Bytes that the projector holds for each context token when gradients go through it."""
    if isinstance(model, RetrievalCatalogueModel):
        return 0  # its layers recompute the cross-attention
    (inputs, outputs), _ = model.projector_shapes
    return 2 * size * (inputs + outputs)
