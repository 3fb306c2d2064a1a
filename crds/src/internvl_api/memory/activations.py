"""Bytes of activations that one token or patch costs in transformers' native layers.

Measured: every tensor of a step was followed through transformers' own modules, in bf16 and in fp32, and its size
divided by tokens and dimensions; tests/trainer/test_memory_estimate.py does it again. The part of a coefficient that
does not grow with the element size is of norms and dropout masks, which do not follow the weights' format. Attention
keeps no square matrix (sdpa, flash). For the principle: Korthikanti et al. 2022, arXiv:2205.05198.
"""

from typing import NamedTuple

from internvl_api.models.catalogue import CatalogueModel, LanguageModel, VisionTower

# Cross entropy in fp32 holds, at the worst moment of its backward pass, the log-probabilities and two gradients:
# bytes for each supervised position and word of the vocabulary.
LOGIT_BYTES = 12


class Cost(NamedTuple):
    """Bytes a token (or patch).

    Attributes:
        held: over all layers, from the forward pass to the backward pass.
        layer: on top of that, at the worst moment of going through one layer.
        ends: outside the layers, until the loss is done.
    """

    held: float
    layer: float
    ends: float = 0.0


def language_cost(model: LanguageModel, size: int, *, checkpointing: bool, adapter: bool) -> Cost:
    """Of a decoder whose elements have `size` bytes; `checkpointing` keeps only the inputs of layers."""
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
    """Of a vision tower, a patch (the class token is one more). A tower that does not learn holds nothing."""
    hidden, inner, plain = tower.hidden, tower.intermediate, tower.layer_norm
    if not learns:
        return Cost(0.0, (4 * size + 4.7) * hidden + 2 * size * inner)
    dropped = 8.5 * size * hidden + size * inner if adapter else 0.0
    if checkpointing:
        recomputed = (12.35 * size if plain else 13.35 * size + 20.1) * hidden + 3.125 * size * inner
        return Cost(tower.layers * size * hidden, recomputed + dropped)
    saved = (10 * size if plain else 12 * size + 16) * hidden + 2 * size * inner + dropped
    return Cost(tower.layers * saved, 3 * size * inner)


def projector_held(model: CatalogueModel, size: int) -> int:
    """Of the projector, a context token, when gradients go through it."""
    (inputs, outputs), _ = model.projector_shapes
    return 2 * size * (inputs + outputs)
