"""Small test sets over drawn pictures, and a group of one process, for evaluations in a test's own process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from internvl_api.run_config import RunConfig
from internvl_api.status import StageName, StageResult
from internvl_trainer.model.adapters import LoraSettings, apply_method
from internvl_trainer.model.load import LoadedModel, load_chat_model
from PIL import Image
from trainer.contexts import Alone, group_context
from trainer.runs import make_config

SIDES = ((90, 60), (60, 90), (64, 64), (120, 50))
COLOURS = ("red", "blue", "green", "white", "black")


def draw(folder: Path, count: int) -> list[str]:
    """That many pictures of different shapes; their names."""
    random = np.random.default_rng(7)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    names = [f"images/{number:03d}.png" for number in range(count)]
    for number, name in enumerate(names):
        width, height = SIDES[number % len(SIDES)]
        pixels = random.integers(0, 256, (height // 10, width // 10, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((width, height)).save(folder / name)
    return names


def write_vqa(folder: Path, rows: int) -> Path:
    """Questions about drawn pictures, in upstream's test format."""
    path = folder / "vqa.jsonl"
    lines = [
        {
            "image": name,
            "question": f"what colour is the {'cat' if number % 3 else 'table in the middle'}",
            "question_id": number,
            "answer": COLOURS[number % len(COLOURS)],
        }
        for number, name in enumerate(draw(folder, rows))
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def write_coco(folder: Path, images: int) -> Path:
    """Two captions for each drawn picture, in COCO's format."""
    path = folder / "captions.json"
    names = draw(folder, images)
    captions = [
        {"id": 2 * number + which, "image_id": 1000 + number, "caption": text}
        for number in range(images)
        for which, text in enumerate(
            (f"A {COLOURS[number % 5]} pattern of blocks.", f"Blocks, {COLOURS[number % 5]} and bright, on a table")
        )
    ]
    document = {
        "images": [{"id": 1000 + number, "file_name": name} for number, name in enumerate(names)],
        "annotations": captions,
    }
    path.write_text(json.dumps(document))
    return path


def evaluation_config(folder: Path, tasks: dict[str, dict[str, Any]], **sections: Any) -> RunConfig:
    """A run of a golden checkpoint that evaluates; its output is folder/output."""
    evaluation = {"tasks": tasks, "baseline": True, "batchSize": 8, **sections.pop("evaluation", {})}
    return make_config(str(folder / "output"), evaluation=evaluation, **sections)


def run_evaluation(stage: StageName, config: RunConfig) -> StageResult:
    """The stage in this process."""
    from internvl_trainer.evaluate.run import evaluate

    return evaluate(group_context(config, stage, Alone()))


def predictions(folder: Path, stage: str, task: str) -> list[dict[str, Any]]:
    """Rows of a task's predictions."""
    path = folder / "output" / "stages" / stage / "predictions" / f"{task}.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def load_with_adapter(base: Path) -> LoadedModel:
    """A chat model in fp32 with an adapter that changes its answers; every call gives the same weights."""
    loaded = load_chat_model(base, dtype=torch.float32)
    apply_method(loaded.model, "lora", lora=LoraSettings(4, 2))
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in loaded.model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.2)
    return loaded
