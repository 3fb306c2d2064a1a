"""Stages as a finished run leaves them in storage, without having trained."""

from __future__ import annotations

import hashlib
import json
import tempfile
from pathlib import Path
from typing import Any

from internvl_api.pipeline import SCORED_BY
from internvl_api.run_config import RunConfig
from internvl_api.status import StageName
from internvl_trainer.artifacts.storage import Storage
from internvl_trainer.stage_store import StageStore

ADAPTER = {"adapter/adapter_config.json": b"{}", "adapter/adapter_model.safetensors": b"adapter" * 100}
RECORD = {"metrics.jsonl": b'{"step": 1, "loss": 2.5}\n', "tensorboard/events.out.tfevents.1": b"events"}
MODEL = {"model/config.json": b'{"model_type": "internvl_chat"}', "model/README.md": b"# the base model's\n"}
FIGURES = {"coco": {"CIDEr": 1.31}}
BASELINE = {"coco": {"CIDEr": 0.79}}
TASK = {"task": "caption-coco", "annotation": "s3://data/coco.json"}


def bytes_of(name: str, size: int) -> bytes:
    """The same for the same name, and no two parts alike."""
    return hashlib.shake_256(name.encode()).digest(size)


def shards(count: int, size: int) -> dict[str, bytes]:
    """Weight files of a model directory."""
    names = [f"model/model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]
    return {name: bytes_of(name, size) for name in names}


def leave_stage(storage: Storage, config: RunConfig, stage: StageName, files: dict[str, bytes], **extra: Any) -> None:
    """Files of a stage and its manifest."""
    with tempfile.TemporaryDirectory() as scratch:
        for name, content in files.items():
            path = Path(scratch) / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        paths = {name: Path(scratch) / name for name in files}
        stages = StageStore(config, storage)
        stages.commit(stage, stages.upload(stage, paths), **extra)


def leave_run(storage: Storage, config: RunConfig, model: dict[str, bytes] | None = None) -> dict[str, bytes]:
    """Every stage that the configuration asks for, before publish; what of it must be published, by name."""
    kind = "adapter" if config.method == "lora" else "model"
    weights = ADAPTER if config.method == "lora" else MODEL | (model or shards(2, 1000))
    leave_stage(storage, config, "preflight", {"preflight.json": b"{}", "row_sizes.npz": b"sizes"})
    leave_stage(storage, config, "train", weights | RECORD, kind=kind, steps=1)
    published = weights | RECORD | {"preflight.json": b"{}"}
    if config.method == "lora" and config.merge.formats:
        merged = MODEL | (model or shards(2, 1000))
        leave_stage(storage, config, "merge", merged, artifacts={})
        published |= merged
    measured = {"baseline-evaluate": {"baseline": BASELINE}, "evaluate": {"final": FIGURES}}
    for stage, scored_by in SCORED_BY.items():
        if config.evaluation.tasks and (stage == "evaluate" or config.evaluation.baseline):
            answers = {"predictions/coco.jsonl": _row(stage), "scores.json": b"{}"}
            leave_stage(storage, config, stage, answers, evaluation={})
            scored = {"predictions/coco.jsonl": _row(stage, CIDEr=1.0), "scores.json": b"{}"}
            leave_stage(storage, config, scored_by, scored, evaluation=measured[stage])
            published[f"predictions/{stage}/coco.jsonl"] = scored["predictions/coco.jsonl"]
    return published


def _row(prediction: str, **scores: float) -> bytes:
    return json.dumps({"id": 1, "prediction": prediction, "scores": scores}).encode() + b"\n"


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
