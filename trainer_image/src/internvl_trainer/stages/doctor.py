"""The doctor stage: check the node of every worker before GPUs are used for hours."""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from internvl_api.run_config import RunConfig
from internvl_api.status import StageResult

from internvl_trainer.all_reduce import WrongSum, timed_all_reduce
from internvl_trainer.doctor.checks import Row, check
from internvl_trainer.doctor.expectations import Expectations, parse_expectations
from internvl_trainer.doctor.machine import AllReduce, Problem
from internvl_trainer.doctor.probe import measure
from internvl_trainer.run_context import GroupContext, RunContext

DOCTOR = "doctor.json"
_MEGABYTES = 64  # to and from disk and storage; and in each all-reduce between workers


class NodeUnfit(Exception):
    """The node of this worker failed a check; the operator tries again, and avoids the node when it fails again."""


def run(context: RunContext) -> StageResult:
    """Check every worker's node; one process of each does it, the others wait.

    Raises:
        NodeUnfit: on the workers whose node failed. The others lose their connection to these.
    """
    joined = context.join_group()
    if joined.group.world_size > 1 and (result := joined.begin()):
        return result
    joined.reporter.doing("checking the nodes")
    between = _between_workers(joined)
    own = _check_node(joined.config, between) if joined.group.local_rank == 0 else []
    nodes = [rows for rows in joined.group.gather([asdict(row) for row in own]) if rows]
    is_broken = any(row["level"] == "failure" for rows in nodes for row in rows)
    if joined.group.leads:
        _store(joined, nodes, is_broken=is_broken)
    if failed := [row for row in own if row.level == "failure"]:
        raise NodeUnfit(_failure(failed))
    if is_broken:
        joined.group.barrier()  # the failed worker's exit ends this process too
    joined.group.barrier()  # the manifest is written
    return StageResult(stage="doctor", outcome="succeeded", reason="Checked", message=summary(nodes))


def expectations_of(config: RunConfig) -> Expectations:
    """What spec.doctor.expect asks for, and the GPUs of a worker."""
    expect = parse_expectations(config.doctor.expect or "")
    needed = config.processes_per_worker if config.device == "cuda" else 0
    return replace(expect, gpus=max(expect.gpus, needed))


def summary(nodes: Sequence[Sequence[dict[str, Any]]]) -> str:
    """How many checks passed on how many nodes, and each warning once."""
    counted = Counter(row["level"] for rows in nodes for row in rows)
    warned = sorted({row["name"] for rows in nodes for row in rows if row["level"] == "warning"})
    text = f"{len(nodes)} worker{'' if len(nodes) == 1 else 's'}: {counted['pass']} checks passed"
    return f"{text}, {counted['warning']} warned ({', '.join(warned)})" if warned else text


def _failure(rows: Sequence[Row]) -> str:
    told = "; ".join(f"{row.name}: {row.found} ({row.advice})" for row in rows)
    return f"doctor: {len(rows)} check{'' if len(rows) == 1 else 's'} failed on this node: {told}"


def _check_node(config: RunConfig, between: AllReduce | Problem | None) -> list[Row]:
    machine = measure(storage=config.output, megabytes=_MEGABYTES, gpus_used=config.device == "cuda")
    return check(replace(machine, between_workers=between), expectations_of(config))


def _between_workers(joined: GroupContext) -> AllReduce | Problem | None:
    """The all-reduce over all ranks, for a run with several workers."""
    if joined.config.workers == 1:
        return None
    group = joined.group
    backend = "gloo" if group.device.type == "cpu" else "nccl"
    try:
        rate = timed_all_reduce(str(group.device), group.rank, group.world_size, _MEGABYTES)
    except WrongSum as error:
        return Problem(f"{backend}: {error}")
    return AllReduce(backend, group.world_size, rate)


def _store(joined: GroupContext, nodes: Sequence[Sequence[dict[str, Any]]], *, is_broken: bool) -> None:
    """Store the rows of every worker; the manifest only when none failed."""
    stages = joined.stages
    stages.discard("doctor")
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / DOCTOR
        path.write_text(json.dumps({"workers": nodes}, indent=1, ensure_ascii=False), encoding="utf-8")
        files = stages.upload("doctor", {DOCTOR: path})
    if not is_broken:
        stages.commit("doctor", files)
