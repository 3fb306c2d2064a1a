"""One of two ranks that meet before steps: `meeting_rank.py OUTPUT`; rank 1 comes when rank 0's files say so."""

import os
import sys
import time
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import torch
from internvl_trainer.distributed import Rendezvous, join_group, prepare_environment


def init_distributed(dist_backend: str, timeout: timedelta, **_: object) -> None:
    """DeepSpeed's function, without the seconds that importing it takes."""
    torch.distributed.init_process_group(dist_backend, timeout=timeout)


def wait_for(path: Path) -> None:
    limit = time.monotonic() + 120
    while not path.exists():
        assert time.monotonic() < limit
        time.sleep(0.05)


def main(output: Path) -> None:
    sys.modules["deepspeed"] = SimpleNamespace(ops=SimpleNamespace(), init_distributed=init_distributed)  # type: ignore[assignment]
    prepare_environment("cpu", 2)
    group = join_group(Rendezvous.from_environment(os.environ), "cpu")
    if group.leads:
        try:
            group.meet([1.0])
        except RuntimeError as error:
            (output / "error").write_text(str(error))
        (output / "sum").write_text(str(group.meet([1.0], patient=True)[0]))
    else:
        wait_for(output / "error")
        group.meet([1.0], patient=True)
        wait_for(output / "sum")


main(Path(sys.argv[1]))
