"""Measures a row and a step beside upstream's way of making them, in one run. It asserts no limits."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from golden import chat_row, checkpoint, load, read_file, settings, tokenizer_of
from internvl_trainer.data.collate import collate
from internvl_trainer.data.dataset_meta import DatasetDescription
from internvl_trainer.data.sample import Sample, build_sample
from internvl_trainer.data.tokenize import IGNORED
from internvl_trainer.model.chat_model import ChatModel, normalise_tiles
from PIL import Image
from rich.console import Console
from rich.table import Table
from skimage.data import astronaut
from transformers import InternVLForConditionalGeneration
from upstream_way import loss_sum, make_row

ROUNDS, MICRO_BATCH = 20, 4
SHAPES = {  # hidden size, layers, intermediate size, heads, vocabulary; micro-batches
    "tiny": ((256, 2, 768, 4, 512), 8),
    "small": ((768, 12, 2048, 12, 32_000), 3),
}


def bench_row_against_upstream(tmp_path: Path) -> None:
    """Time one row in our way and in upstream's: a 640x480 JPEG (6 tiles of 448 and a thumbnail), question and answer.

    The two ways take turns on one core. A third time is the lower limit of both: to decode and resize the picture.
    """
    torch.set_num_threads(1)
    Image.fromarray(astronaut()).resize((640, 480)).save(tmp_path / "0.jpg", quality=90)
    data = (tmp_path / "0.jpg").read_bytes()
    turns = [
        {"from": "human", "value": "<image>\nProvide a one-sentence caption for the provided image."},
        {"from": "gpt", "value": "An astronaut in an orange suit before a flag and a model."},
    ]
    row = chat_row({"image": "0.jpg", "conversations": turns})
    dataset = DatasetDescription("rows", str(tmp_path), "rows.jsonl")
    wanted = settings("Hermes-2", image_size=448, context_tokens=256, max_tiles=6, max_length=8192, compat="default")
    tokenizer = tokenizer_of(checkpoint("qwen2"))

    def ours() -> Sample:
        return build_sample(row, dataset, wanted, tokenizer, read_file)

    def theirs() -> tuple[torch.Tensor, np.ndarray, np.ndarray]:
        return make_row(data, row.turns, tokenizer, "Hermes-2", size=448, most_tiles=6, context_tokens=256)

    def least() -> list[Image.Image]:
        picture = Image.open(BytesIO(data)).convert("RGB")
        return [picture.resize(size, Image.Resampling.BICUBIC) for size in ((3 * 448, 2 * 448), (448, 448))]

    sample, (tiles, ids, labels) = ours(), theirs()
    assert torch.equal(normalise_tiles(torch.from_numpy(sample.tiles)), tiles)
    assert np.array_equal(sample.input_ids, ids)
    assert np.array_equal(sample.labels, labels)
    assert sample.tiles.shape[0] == 7
    mine, others, floor = _by_turns([(ours, theirs, least)] * ROUNDS)
    table = Table(title="640x480 JPEG, 6 tiles of 448 pixels and a thumbnail: rows a CPU second")
    for column in ("ours", "upstream's way", "ratio", "decode and resize only", "highest possible ratio"):
        table.add_column(column)
    cells = ROUNDS / mine, ROUNDS / others, others / mine, ROUNDS / floor, others / floor
    table.add_row(*(f"{cell:.2f}" for cell in cells))
    Console().print(table)


def bench_step_against_upstream() -> None:
    """Forward and backward pass of the same rows of 64 to 512 tokens, by turns: real tokens a CPU second."""
    torch.set_num_threads(1)
    table = Table(title=f"Rows of 64 to 512 tokens, {MICRO_BATCH} a micro-batch, fp32, one thread: tokens a CPU second")
    for column in ("model", "parameters", "ours", "upstream's way", "ratio"):
        table.add_column(column)
    for name, (shape, batches) in SHAPES.items():
        model = _model(*shape)
        lengths = np.random.default_rng(0).integers(64, 513, batches * MICRO_BATCH)
        rows = [_text(int(length)) for length in lengths]
        parts = [rows[start : start + MICRO_BATCH] for start in range(0, len(rows), MICRO_BATCH)]
        pairs = [(partial(_ours, model, part), partial(_theirs, model, part)) for part in parts]
        mine, others = _by_turns(pairs)
        tokens = int(lengths.sum())
        count = sum(each.numel() for each in model.parameters())
        table.add_row(
            name, f"{count / 1e6:.0f} M", f"{tokens / mine:.0f}", f"{tokens / others:.0f}", f"{others / mine:.2f}"
        )
    Console().print(table)


def _ours(model: ChatModel, rows: Sequence[Sample]) -> None:
    model(**collate(rows)).loss_sum.backward()
    model.zero_grad()


def _theirs(model: ChatModel, rows: Sequence[Sample]) -> None:
    loss_sum(model, rows).backward()
    model.zero_grad()


def _by_turns(rounds: Sequence[Sequence[Callable[[], object]]]) -> list[float]:
    """CPU seconds of all first calls, all second calls, and so on; they take turns, so that other load is the same."""
    seconds = [0.0] * len(rounds[0])
    for calls in rounds:
        for side, call in enumerate(calls):
            began = time.process_time()
            call()
            seconds[side] += time.process_time() - began
    return seconds


def _text(length: int) -> Sample:
    ids = np.random.default_rng(length).integers(5, 200, length)
    labels = ids.copy()
    labels[: length // 2] = IGNORED
    return Sample(ids, labels, np.zeros((1, 3, 56, 56), np.uint8), np.zeros(1, np.int64))


def _model(hidden: int, layers: int, intermediate: int, heads: int, vocabulary: int) -> ChatModel:
    """The golden checkpoint's vision tower with a language model of this shape and random weights."""
    loaded = load("qwen2")
    config = loaded.model.native.config
    config.text_config.update(
        {"hidden_size": hidden, "intermediate_size": intermediate, "num_attention_heads": heads,
         "num_key_value_heads": heads // 2, "num_hidden_layers": layers, "vocab_size": vocabulary,
         "layer_types": ["full_attention"] * layers}
    )  # fmt: skip
    torch.manual_seed(0)
    return ChatModel(InternVLForConditionalGeneration(config), loaded.architecture).train()
