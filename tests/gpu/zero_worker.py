"""One rank of `measure_zero`: three steps of a golden model under each ZeRO stage asked for.

Run as `python zero_worker.py FOLDER DEVICE STAGE…` with a rendezvous in the environment. All processes use one card,
which NCCL refuses: two or more talk over gloo.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

os.environ["DS_ACCELERATOR"] = sys.argv[2]
sys.path.insert(0, str(Path(__file__).parents[1]))

import deepspeed
import torch
from golden import load, sample
from gpu.steps import make_window, take_step
from internvl_trainer.distributed import Group
from internvl_trainer.model.adapters import apply_method
from internvl_trainer.train.chat import freeze
from internvl_trainer.train.components import partitioning
from internvl_trainer.train.engine import build_engine, parameter_groups
from trainer.runs import make_config

DEVICE = sys.argv[2]
CASE = "qwen2/Hermes-2"
STEPS = [(0, 2), (4, 5), (0, 2)]  # the rows of each step, one for each of two ranks


def train(stage: int, group: Group) -> list[float]:
    """The losses of the steps."""
    config = make_config("/unused", training={"zeroStage": stage, "globalBatchSize": 2})
    zero3 = partitioning(config, group)
    loaded = load(CASE.split("/")[0], device=group.device, zero3_config=zero3)
    apply_method(loaded.model, "full", freeze=freeze(config))
    engine = build_engine(config, loaded.model, parameter_groups(loaded.model, 0.0, decay_all=False), group)
    losses = []
    for number, rows in enumerate(STEPS, 1):
        own = rows[group.rank :: group.world_size]
        parts = [[sample(CASE, row)] for row in own]
        window = make_window(parts, group.device, loaded.model.native.config.image_token_id)
        losses.append(take_step(engine, window, config, group, number))
    return losses


def main(folder: Path, stages: list[str]) -> None:
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if DEVICE == "cpu":
        vars(deepspeed.ops)["__compatible_ops__"] = {}  # DeepSpeed compiles its own for minutes; gloo needs none
    backend = "nccl" if DEVICE == "cuda" and ranks == 1 else "gloo"
    os.environ["LOCAL_RANK"] = "0"
    deepspeed.init_distributed(backend, auto_mpi_discovery=False, verbose=False)
    device = torch.device(DEVICE, 0) if DEVICE == "cuda" else torch.device("cpu")
    group = Group(rank, ranks, 0, device, torch.distributed.new_group(backend="gloo"))
    for stage in stages:
        losses = train(int(stage), group)
        if group.leads:
            (folder / f"losses-{ranks}-{stage}.json").write_text(json.dumps(losses), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[3:])
