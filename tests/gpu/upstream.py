"""Forward and backward passes in this project's way and in upstream's, by turns, on one model and the same rows."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from gpu.card import begin_peak, peak_bytes, seconds_of
from gpu.models import IMAGE_TOKEN, random_model
from gpu.steps import Figures, Work, prepare
from internvl_trainer.data.collate import collate
from internvl_trainer.data.sample import Sample
from internvl_trainer.model.chat_model import ChatModel
from internvl_trainer.train.engine import on_device
from upstream_way import loss_sum


def measure_against_upstream(work: Work, device: torch.device) -> Figures:
    """Tokens a second of both ways, and their ratio; both recompute activations.

    Upstream's way pads the rows of a micro-batch to the longest, attends with a mask (by
    scaled_dot_product_attention), and takes all logits in fp32.
    """
    model = prepare(random_model(work.shape, device), work.config())
    ways: dict[str, Callable[[ChatModel, list[Sample]], None]] = {"here": _ours, "upstream's way": _theirs}
    parts = work.parts()
    seconds, peaks = dict.fromkeys(ways, 0.0), {}
    for name, way in ways.items():
        begin_peak(device)
        for part in parts:
            way(model, part)
        peaks[name] = peak_bytes(device)
    for _ in range(work.steps):
        for part in parts:
            for name, way in ways.items():
                seconds[name] += seconds_of(partial(way, model, part), device)
    tokens = work.steps * sum(row.length for part in parts for row in part)
    figures: Figures = {f"tokens a second, {name}": tokens / spent for name, spent in seconds.items()}
    figures["ratio of tokens a second"] = seconds["upstream's way"] / seconds["here"]
    figures |= {f"peak memory, GB, {name}": peak / 1e9 for name, peak in peaks.items() if peak is not None}
    return figures


def _ours(model: ChatModel, rows: list[Sample]) -> None:
    device = model.native.device
    model(**on_device(collate(rows, image_token_id=IMAGE_TOKEN), device)).loss_sum.backward()
    model.zero_grad()


def _theirs(model: ChatModel, rows: list[Sample]) -> None:
    loss_sum(model, rows).backward()
    model.zero_grad()
