"""What upstream computed on tiny checkpoints (see data/golden/README.md), and how to ask for the same here."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from internvl_trainer.data.dataset_meta import DatasetDescription
from internvl_trainer.data.row_schema import ChatRow, parse_chat_row
from internvl_trainer.data.sample import Sample, SampleSettings, build_sample
from internvl_trainer.model.load import LoadedModel, load_chat_model
from internvl_trainer.model.tokenizer import load_tokenizer

torch.set_num_threads(1)  # models this small lose more to waking threads than they win

GOLDEN = Path(__file__).parent / "data" / "golden"
RESULTS: dict[str, Any] = json.loads((GOLDEN / "golden.json").read_text(encoding="utf-8"))
CASES = sorted(RESULTS)
"""`kind/template`, such as qwen2/Hermes-2."""
KINDS = sorted(path.name for path in (GOLDEN / "checkpoints").iterdir())
ROWS: list[dict[str, Any]] = [
    json.loads(line) for line in (GOLDEN / "data" / "samples.jsonl").read_text(encoding="utf-8").splitlines()
]
DATASET = DatasetDescription("golden", root=str(GOLDEN / "data"), annotation=str(GOLDEN / "data" / "samples.jsonl"))

tokenizer_of = cache(load_tokenizer)


def checkpoint(kind: str) -> Path:
    return GOLDEN / "checkpoints" / kind


def settings(template: str, **changes: Any) -> SampleSettings:
    """The settings the golden data were made with."""
    values: dict[str, Any] = {
        "image_size": 56,
        "context_tokens": 4,
        "max_tiles": 6,
        "min_frames": 5,
        "max_frames": 5,
        "frame_sampling": "middle",
        "max_length": 1024,
        "compat": "upstream",
    }
    return SampleSettings(template, **(values | changes))


def read_file(root: str, relative: str) -> bytes:
    return (Path(root) / relative).read_bytes()


def chat_row(content: dict[str, Any]) -> ChatRow:
    """A row that has no errors."""
    row, findings = parse_chat_row(json.dumps(content).encode(), "rows.jsonl", 1)
    if row is None:
        raise ValueError("; ".join(str(finding) for finding in findings))
    return row


def sample(case: str, row: int, **changes: Any) -> Sample:
    """A golden row through this project's own data path."""
    kind, template = case.split("/")
    tokenizer = tokenizer_of(checkpoint(kind))
    return build_sample(chat_row(ROWS[row]), DATASET, settings(template, **changes), tokenizer, read_file)


@cache
def arrays(case: str) -> dict[str, np.ndarray]:
    """Upstream's arrays: s{i}.input_ids, .labels, .image_flags, .logits_last16."""
    kind, template = case.split("/")
    return dict(np.load(checkpoint(kind) / f"golden_{template}.npz"))


@cache
def pixels() -> dict[str, np.ndarray]:
    """Upstream's s{i}.pixel_values, the same for every kind."""
    return dict(np.load(GOLDEN / "data" / "pixels.npz"))


def load(kind: str, **options: Any) -> LoadedModel:
    """A golden checkpoint in fp32."""
    return load_chat_model(checkpoint(kind), **({"dtype": torch.float32} | options))
