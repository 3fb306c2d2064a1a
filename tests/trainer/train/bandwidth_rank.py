"""One of two ranks that check their bandwidth: `bandwidth_rank.py OUTPUT SCENARIO…`; each leaves what it found.

In OUTPUT/SCENARIO: rank-N.json, log-N, and the output of the run, `run`.
"""

import json
import logging
import os
import sys
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import torch
from internvl_trainer.artifacts.storage import FolderStorage
from internvl_trainer.distributed import Group, Rendezvous, join_group, prepare_environment
from internvl_trainer.errors import Unavailable
from internvl_trainer.metrics import Reporter
from internvl_trainer.train.bandwidth_check import check_bandwidth

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from trainer.contexts import group_context
from trainer.runs import make_config


def init_distributed(dist_backend: str, timeout: timedelta, **_: object) -> None:
    """DeepSpeed's function, without the seconds that importing it takes."""
    torch.distributed.init_process_group(dist_backend, timeout=timeout)


def refuse(*_: object, **__: object) -> None:
    raise Unavailable("StorageUnavailable", "the bucket does not answer")


def check(output: Path, scenario: str, group: Group) -> None:
    output.mkdir(exist_ok=True)
    logging.basicConfig(filename=output / f"log-{group.rank}", level=logging.INFO, force=True)
    config = make_config(str(output / "run"), workers=2, network={"bandwidthCheck": scenario != "off"})
    if scenario == "unavailable" and not group.leads:
        FolderStorage.upload = refuse  # type: ignore[method-assign]
    context = group_context(config, "train", group, Reporter(config.job, "train"))
    found = check_bandwidth(context)
    _, metrics = context.reporter.answer("/metrics") or ("", b"")
    _, progress = context.reporter.answer("/progress") or ("", b"{}")
    answer = {
        "found": found.to_dict() if found else None,
        "metrics": metrics.decode(),
        "progress": json.loads(progress),
    }
    (output / f"rank-{group.rank}.json").write_text(json.dumps(answer))


def main(output: Path, scenarios: list[str]) -> None:
    sys.modules["deepspeed"] = SimpleNamespace(ops=SimpleNamespace(), init_distributed=init_distributed)  # type: ignore[assignment]
    prepare_environment("cpu", 2)
    group = join_group(Rendezvous.from_environment(os.environ), "cpu")
    for scenario in scenarios:
        check(output / scenario, scenario, group)
    torch.distributed.destroy_process_group()  # its threads may abort an interpreter that ends before them


main(Path(sys.argv[1]), sys.argv[2:])
