"""What upstream's retrieval model computed on tiny checkpoints (see data/golden-retrieval/README.md)."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub import save_torch_state_dict
from internvl_trainer.model.checkpoint_format import to_upstream
from internvl_trainer.retrieval.load import LoadedRetrievalModel, load_retrieval_model

torch.set_num_threads(1)  # models this small lose more to waking threads than they win

GOLDEN = Path(__file__).parent / "data" / "golden-retrieval"
FOLDERS = {"no-cross-attention": GOLDEN, "cross-attention": GOLDEN / "cross-attention"}
CASES = list(FOLDERS)
_TEXTS = ("positive", "negative", "summarize")
ARGUMENTS = (
    "pixel_values",
    "image_ids",
    *(f"{text}_{part}" for text in _TEXTS for part in ("input_ids", "attention_mask")),
    *("input_ids", "attention_mask", "labels"),
)


def checkpoint(case: str) -> Path:
    return FOLDERS[case] / "checkpoint"


@cache
def results(case: str) -> dict[str, Any]:
    value: dict[str, Any] = json.loads((FOLDERS[case] / "golden.json").read_text(encoding="utf-8"))
    return value


@cache
def arrays(case: str) -> dict[str, np.ndarray]:
    return dict(np.load(FOLDERS[case] / "golden.npz"))


def batch(case: str) -> dict[str, torch.Tensor]:
    """The forward arguments."""
    return {name: torch.from_numpy(arrays(case)[name]) for name in ARGUMENTS}


def load(case: str, **options: Any) -> LoadedRetrievalModel:
    """A golden checkpoint in fp32, in eval mode."""
    loaded = load_retrieval_model(checkpoint(case), **({"dtype": torch.float32} | options))
    loaded.model.eval()
    return loaded


def save_retrieval_model(loaded: LoadedRetrievalModel, directory: str | Path, *, shard_size: int = 10**9) -> None:
    """Write config.json and the weights in upstream's layout, each tensor as it is in memory."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(loaded.upstream_config, indent=2) + "\n", encoding="utf-8")
    tensors = ((name, parameter.detach().cpu()) for name, parameter in loaded.model.named_parameters())
    upstream = dict(to_upstream(tensors, loaded.architecture))  # type: ignore[arg-type]
    save_torch_state_dict(upstream, directory, max_shard_size=shard_size)
