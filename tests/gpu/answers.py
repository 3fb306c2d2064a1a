"""Answers of a random model with a key-value cache."""

from __future__ import annotations

import torch
from gpu.card import begin_peak, peak_bytes, seconds_of
from gpu.models import IMAGE_TOKEN, catalogue_model, random_model


def measure_answers(
    name: str,
    device: torch.device,
    *,
    batches: tuple[int, ...] = (1, 16),
    tiles: int = 7,
    text: int = 64,
    new: int = 128,
) -> dict[str, float]:
    """New tokens a second, greedily, for questions about a picture of so many tiles, alone and in a batch."""
    shape = catalogue_model(name)
    model = random_model(shape, device).eval()
    figures = {}
    for size in batches:
        ids = torch.full((size, tiles * shape.context_tokens + text), IMAGE_TOKEN, device=device)
        ids[:, -text:] = IMAGE_TOKEN + 1
        edge = shape.tile_size
        pixels = torch.zeros(size * tiles, 3, edge, edge, dtype=torch.uint8, device=device)

        def answer(ids: torch.Tensor = ids, pixels: torch.Tensor = pixels) -> None:
            model.generate(
                ids, pixels, max_new_tokens=new, min_new_tokens=new, do_sample=False, eos_token_id=1, pad_token_id=0
            )

        begin_peak(device)
        answer()
        figures[f"tokens a second, batch of {size}"] = size * new / seconds_of(answer, device)
        if (peak := peak_bytes(device)) is not None:
            figures[f"peak memory, GB, batch of {size}"] = peak / 1e9
    return figures
