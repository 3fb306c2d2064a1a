"""Two ranks train two steps on a base model in three shards, with ZeRO-1 and with ZeRO-3, and export.

Each leaves the names of the weight files that it wrote in `zero<stage>-rank<rank>.json`.

With ZeRO-1 the base is a folder; with ZeRO-3 each rank, a pod of its own, reads its shares of it from object storage.

Run by the launcher as `python export_worker.py FOLDER`.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from internvl_trainer.distributed import Rendezvous, join_group, prepare_environment
from internvl_trainer.metrics import Reporter
from internvl_trainer.signals import StopFlag
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from trainer.contexts import group_context
from trainer.runs import make_config

SHARDS = 3
BASE_URI = "s3://models/base"


def main(folder: Path) -> None:
    rendezvous = Rendezvous.from_environment(os.environ)
    prepare_environment("cpu", rendezvous.processes)
    group = join_group(rendezvous, "cpu")
    from internvl_trainer.train import export
    from internvl_trainer.train.trainer import train

    written: list[str] = []

    def record(tensors: dict[str, torch.Tensor], path: Path, **options: Any) -> None:
        written.append(path.name)
        save_file(tensors, path, **options)

    export.save_file = record
    base = folder / "base"  # made by the test
    for stage, source in ((1, str(base)), (3, BASE_URI)):
        training = {"zeroStage": stage, "maxSteps": 2}
        config = make_config(
            str(folder / f"zero{stage}"), source, workers=2, training=training, model={"template": "Hermes-2"}
        )
        context = group_context(config, "train", group, Reporter(config.job, "train"))
        train(context, StopFlag(leave=sys.exit))
        (folder / f"zero{stage}-rank{group.rank}.json").write_text(json.dumps(written))
        written.clear()


def split(whole: Path, target: Path) -> None:
    """The checkpoint with its tensors in SHARDS files."""
    shutil.copytree(whole, target)
    tensors = load_file(target / "model.safetensors")
    (target / "model.safetensors").unlink()
    names = sorted(tensors)
    shards = {f"model-{n + 1:05d}-of-{SHARDS:05d}.safetensors": names[n::SHARDS] for n in range(SHARDS)}
    for file, members in shards.items():
        save_file({name: tensors[name] for name in members}, target / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {name: file for file, members in shards.items() for name in members}}
    (target / "model.safetensors.index.json").write_text(json.dumps(index))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
