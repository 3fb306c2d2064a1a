"""Measures data loading and padding on one core. It asserts no limits."""

from __future__ import annotations

import json
import time
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from golden import chat_row, checkpoint, load, read_file, settings, tokenizer_of
from internvl_trainer.data.collate import collate
from internvl_trainer.data.dataset_meta import DatasetDescription
from internvl_trainer.data.index import RowIndex
from internvl_trainer.data.packing import PackedOrder, PackLimits
from internvl_trainer.data.row_checks import Checker, check_rows
from internvl_trainer.data.sample import Sample, build_sample
from internvl_trainer.data.sampler import GlobalOrder
from internvl_trainer.data.tokenize import IGNORED
from internvl_trainer.model.chat_model import ChatModel
from padded import pad_rows
from PIL import Image
from rich.console import Console
from rich.table import Table
from skimage.data import astronaut
from transformers import InternVLForConditionalGeneration

Made = TypeVar("Made")
ROWS, MICRO_BATCH, PACK_TOKENS = 64, 8, 1024
INDEX_ROWS = 1_000_000
UPSTREAM_ROWS = 15  # rows per second and core of upstream's dataset class: 640x480 JPEG, 6 tiles of 448 and a thumbnail
PICTURES, PICTURE_ROWS = 40, 40


def bench_padded_grouped_packed() -> None:
    """Forward and backward pass on text rows of 64 to 512 tokens: padded in order, grouped by length, packed."""
    torch.set_num_threads(1)
    lengths = np.random.default_rng(0).integers(64, 513, ROWS)
    rows = [_text_row(int(length)) for length in lengths]
    plain, grouped = (GlobalOrder(ROWS, MICRO_BATCH, 0, given) for given in (None, lengths))
    table = np.stack([lengths, np.zeros(ROWS, np.int64)], axis=1)
    packed = PackedOrder(table, PackLimits(PACK_TOKENS, 48, 20), 1, 0)
    ways: dict[str, Iterator[dict[str, torch.Tensor]]] = {
        "padded": _padded(plain, rows),
        "grouped by length": _padded(grouped, rows),
        "packed": (
            collate([rows[draw.row] for draw in packed.batch(step)[0]]) for step in range(packed.count_steps(1, None))
        ),
    }
    report = _table(f"{ROWS} text rows of 64 to 512 tokens, fp32, one thread", "batches", "efficiency", "tokens/CPU s")
    model = _small_model()
    for name, batches in ways.items():
        places, seconds = _train(model, batches)
        tokens = int(lengths.sum())
        report.add_row(name, f"{tokens / places:.3f}", f"{tokens / seconds:.0f}")
    Console().print(report)


def _padded(order: GlobalOrder, rows: list[Sample]) -> Iterator[dict[str, torch.Tensor]]:
    return (pad_rows([rows[draw.row] for draw in order.batch(step)]) for step in range(ROWS // MICRO_BATCH))


def _train(model: ChatModel, batches: Iterator[dict[str, torch.Tensor]]) -> tuple[int, float]:
    """Number of computed positions, and CPU seconds."""
    places, began = 0, time.process_time()
    for batch in batches:
        places += batch["input_ids"].numel()
        model(**batch).loss_sum.backward()
        model.zero_grad()
    return places, time.process_time() - began


def _text_row(length: int) -> Sample:
    ids = np.random.default_rng(length).integers(5, 200, length)
    labels = ids.copy()
    labels[: length // 2] = IGNORED
    return Sample(ids, labels, np.zeros((1, 3, 56, 56), np.uint8), np.zeros(1, np.int64))


def _small_model() -> ChatModel:
    """The golden checkpoint's shape with a language model wide enough that its arithmetic dominates."""
    loaded = load("qwen2")
    config = loaded.model.native.config
    config.text_config.update(
        {"hidden_size": 256, "intermediate_size": 768, "num_attention_heads": 4, "num_key_value_heads": 2}
    )
    config.text_config.update({"num_hidden_layers": 2, "layer_types": ["full_attention"] * 2})
    torch.manual_seed(0)
    return ChatModel(InternVLForConditionalGeneration(config), loaded.architecture).train()


def bench_rows(tmp_path: Path) -> None:
    """Rows with a picture per second on one core: converted to samples, and checked by preflight."""
    torch.set_num_threads(1)
    picture = Image.fromarray(astronaut()).resize((640, 480))
    lines = []
    for number in range(PICTURES):
        picture.save(tmp_path / f"{number}.jpg", quality=90)
        turns = [
            {"from": "human", "value": "<image>\nProvide a one-sentence caption for the provided image."},
            {"from": "gpt", "value": f"An astronaut in an orange suit before a flag and a model, number {number}."},
        ]
        lines += [json.dumps({"image": f"{number}.jpg", "conversations": turns})] * (PICTURE_ROWS // PICTURES)
    annotation = tmp_path / "rows.jsonl"
    annotation.write_text("\n".join(lines), encoding="utf-8")
    dataset = DatasetDescription("rows", str(tmp_path), str(annotation))
    wanted = settings("Hermes-2", image_size=448, context_tokens=256, max_tiles=6, max_length=8192)
    tokenizer, index = tokenizer_of(checkpoint("qwen2")), RowIndex.build(annotation)

    began, cpu = time.monotonic(), time.process_time()
    samples = [
        build_sample(chat_row(json.loads(index[row])), dataset, wanted, tokenizer, read_file)
        for row in range(len(index))
    ]
    sampled = len(index) / (time.process_time() - cpu), len(index) / (time.monotonic() - began)
    assert all(len(sample.tiles) == 7 for sample in samples)
    began, cpu = time.monotonic(), time.process_time()
    assert check_rows(index, Checker(dataset, wanted, read_file, tokenizer)) == []
    checked = len(index) / (time.process_time() - cpu), len(index) / (time.monotonic() - began)

    report = _table("640x480 JPEG, 448-pixel tiles, 6 and a thumbnail", "step", "rows/CPU s", "rows/s", "upstream's 15")
    for name, (per_cpu, per_second) in (("tile and tokenize", sampled), ("preflight", checked)):
        report.add_row(name, f"{per_cpu:.1f}", f"{per_second:.1f}", f"{per_cpu / UPSTREAM_ROWS:.1f} x")
    Console().print(report)


def bench_index_and_plan(tmp_path: Path) -> None:
    """A million rows: memory of the index, and memory and time of one epoch's packing plan."""
    path = tmp_path / "million.jsonl"
    line = json.dumps({"conversations": [{"from": "human", "value": "why"}, {"from": "gpt", "value": "so"}]}) + "\n"
    path.write_text(line * INDEX_ROWS, encoding="utf-8")
    index, *indexed = _cost(lambda: RowIndex.build(path))
    assert len(index) == INDEX_ROWS
    generator = np.random.default_rng(0)
    sizes = np.stack([generator.integers(100, 4000, INDEX_ROWS), generator.integers(0, 13, INDEX_ROWS)], axis=1)
    sizes = sizes.astype(np.int32)

    def plan() -> tuple[PackedOrder, int]:
        order = PackedOrder(sizes, PackLimits(16384, 48, 20), 64, 0)
        return order, order.count_steps(1, None)

    (_, steps), *planned = _cost(plan)
    efficiency = float(sizes[:, 0].sum()) / (steps * 64 * 16384)

    report = _table(f"{INDEX_ROWS:,} rows", "what", "CPU s", "MB kept", "MB at most", "")
    report.add_row("index", f"{indexed[0]:.2f}", *(f"{each / 1e6:.0f}" for each in indexed[1:]), "")
    report.add_row(
        "an epoch's packs",
        f"{planned[0]:.2f}",
        *(f"{each / 1e6:.0f}" for each in planned[1:]),
        f"{steps} steps, {efficiency:.3f} full",
    )
    Console().print(report)


def _cost(make: Callable[[], Made]) -> tuple[Made, float, int, int]:
    """Result, CPU seconds, bytes kept and peak bytes of a call; calls it twice because tracing memory takes time."""
    began = time.process_time()
    make()
    seconds = time.process_time() - began
    tracemalloc.start()
    made = make()
    kept, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return made, seconds, kept, peak


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title)
    for column in columns:
        table.add_column(column)
    return table
