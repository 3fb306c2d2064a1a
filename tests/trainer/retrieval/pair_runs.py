"""Small retrieval runs: a tiny checkpoint with a tokenizer, drawn pictures, and captions in Flickr30K's format."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from internvl_api.recipes.resolve import parse_spec, resolve
from internvl_api.run_config import RunConfig
from ivft_demo.checkpoint import write_retrieval_checkpoint
from trainer.evaluations import draw

STEPS = 6
IMAGES = 12
GLOBAL_BATCH = 8
ANIMALS = ("dog", "cat", "horse", "bird", "fish", "cow")
PLACES = ("on a beach.", "in the snow.", "under a table!")


def write_pairs(folder: Path, images: int = IMAGES) -> Path:
    """Two captions for each drawn picture."""
    names = draw(folder, images)
    lines = ["image,caption"]
    for number, name in enumerate(names):
        animal = ANIMALS[number % len(ANIMALS)]
        lines += [
            f"{name},A {animal}, number {number}, {PLACES[number % 3]}",
            f"{name},One {animal} and picture {number}",
        ]
    path = folder / "captions.txt"
    path.write_text("\n".join(lines) + "\n")
    return path


def pair_config(folder: Path, output: str, workers: int = 1, **sections: Any) -> RunConfig:
    """A RunConfig of STEPS steps over drawn pictures; `sections` are laid over those of the spec."""
    model = folder / "model"
    if not model.exists():
        write_retrieval_checkpoint(model)
    annotation = folder / "data" / "captions.txt"
    if not annotation.exists():
        write_pairs(folder / "data")
    spec: dict[str, Any] = {
        "model": {"name": "InternVL-14B-224px", "source": str(model)},
        "data": {"train": {"drawn": {"annotation": str(annotation), "format": "flickr"}}},
        "method": "full",
        "workers": workers,
        "lora": {"languageRank": 4, "visionRank": 2, "dropout": 0.0},
        "image": {"tileSize": 42},
        "training": {
            "globalBatchSize": GLOBAL_BATCH,
            "microBatchSize": GLOBAL_BATCH // workers,
            "maxSteps": STEPS,
            "epochs": 50,
            "learningRate": 1e-3,
            "precision": "fp32",
            "dataWorkers": 0,
            "maxSeqLength": 80,
        },
        "retrieval": {"layerDecay": 0.9},
        "checkpoint": {"everySteps": 3},
        "output": output,
    }
    for name, value in sections.items():
        spec[name] = {**spec.get(name, {}), **value} if isinstance(value, dict) else value
    if spec["method"] != "lora":
        del spec["lora"]
    return resolve(parse_spec(spec), job="team/run", job_uid="uid-1")
