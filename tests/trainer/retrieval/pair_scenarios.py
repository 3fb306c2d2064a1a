"""Many retrieval trainings in one group of processes; see ../train/scenarios.py.

Run as `python pair_scenarios.py FOLDER` by each rank; every scenario leaves its output in FOLDER/<name>.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from internvl_trainer.distributed import Rendezvous, join_group, prepare_environment

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "cluster"))

from trainer.contexts import group_context
from trainer.retrieval.pair_runs import pair_config
from trainer.train.scenarios import StopAfter

METHODS = ("full", "head", "lora")
STAGES = (1, 3)
STOPPED_AFTER = 4
FIRST_STEP = {"maxSteps": 1, "lrSchedule": "constant", "warmupSteps": 0, "weightDecay": 0.0}
# Weights that stay as they are, so that the loss on what is held out depends on nothing but how it is taken.
HELD_OUT = {"learningRate": 1e-12, "microBatchSize": 4, "maxSteps": 1}


def main(folder: Path) -> None:
    rendezvous = Rendezvous.from_environment(os.environ)
    prepare_environment("cpu", rendezvous.processes)
    group = join_group(rendezvous, "cpu")
    from internvl_trainer.train.trainer import train

    def run(name: str, *, stop_after: int = 1000, **sections: Any) -> None:
        output = folder / f"{group.world_size}" / name
        config = pair_config(folder, str(output), workers=group.world_size, **sections)
        train(group_context(config, "train", group), StopAfter(stop_after))

    for stage in STAGES:
        for method in METHODS:
            run(f"{method}-zero{stage}", method=method, training={"zeroStage": stage})
        run(f"resumed-zero{stage}", stop_after=STOPPED_AFTER, training={"zeroStage": stage})
        run(f"resumed-zero{stage}", training={"zeroStage": stage})
        run(f"first-step-zero{stage}", training={**FIRST_STEP, "zeroStage": stage})
    hard: dict[str, Any] = {"retrieval": {"hardNegatives": True}, "training": {"zeroStage": 3}}
    dropping = {**hard, "model": {"dropPathRate": 0.3}}
    run("hard", **{**hard, "training": {"zeroStage": 3, "maxSteps": 1}})
    run("dropping", **dropping)
    run("dropping-resumed", stop_after=STOPPED_AFTER, **dropping)
    run("dropping-resumed", **dropping)
    held = {"held": {"annotation": str(folder / "data" / "captions.txt"), "format": "flickr", "repeatTime": 0.21}}
    run("held-out", data={"validation": held}, training=HELD_OUT)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
