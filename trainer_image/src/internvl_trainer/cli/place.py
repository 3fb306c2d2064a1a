"""Where a process stands among those that run the same command: torchrun's variables, or Slurm's."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping, MutableMapping
from dataclasses import dataclass

from internvl_trainer.errors import UserError

_FIRST_PORT, _PORTS = 20_000, 10_000  # below those that Linux gives to outgoing connections
_LAST_PORT = 65_535
_WHOLE = re.compile(r"[0-9]{1,18}")
_RANGE = re.compile(r"([0-9]{1,18})(?:-([0-9]{1,18}))?")
_TASKS = re.compile(r"([0-9]{1,18})(?:\(x([0-9]{1,18})\))?")
_LONGEST_RANGE = 100_000
# Each stage's processes get their own of these; those of torchrun lead to its own store.
_LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_LAUNCHER_PREFIXES = ("TORCHELASTIC_", "GROUP_", "ROLE_")


@dataclass(frozen=True)
class Place:
    """One task of several that run the same command.

    Attributes:
        task, tasks: number of this task from 0, and how many there are; task 0 leads.
        local_task, local_tasks: the same on this machine.
        host, port: where task 0 can be reached.
        run: what distinguishes this run from others on the same machines.
    """

    task: int
    tasks: int
    local_task: int
    local_tasks: int
    host: str
    port: int
    run: str


def take_place(environment: MutableMapping[str, str]) -> Place | None:
    """The place that the variables give, None for a run of one task; removes torchrun's from `environment`.

    Raises UserError naming a variable that cannot be used.
    """
    if "WORLD_SIZE" in environment and "RANK" in environment:
        place = _of_torchrun(environment)
    elif "SLURM_PROCID" in environment and "SLURM_NTASKS" in environment:
        place = _of_slurm(environment)
    else:
        return None
    for name in list(environment):
        if name in _LAUNCHER_VARIABLES or name.startswith(_LAUNCHER_PREFIXES):
            del environment[name]
    if not 0 <= place.task < max(1, place.tasks):
        last = max(1, place.tasks) - 1
        raise UserError("WrongVariable", f"found task {place.task} of {place.tasks}; expected 0 to {last}")
    if place.tasks < 2:
        return None
    if not 0 < place.port <= _LAST_PORT:
        message = f"task 0 would listen at port {place.port}; expected 1 to {_LAST_PORT}"
        raise UserError("WrongVariable", message, "MASTER_PORT")
    return place


def _of_torchrun(environment: Mapping[str, str]) -> Place:
    task, tasks = _number(environment, "RANK"), _number(environment, "WORLD_SIZE")
    local_task, local_tasks = _number(environment, "LOCAL_RANK", 0), _number(environment, "LOCAL_WORLD_SIZE", 1)
    if tasks > 1 and (local_tasks < 1 or tasks % local_tasks or task % local_tasks != local_task):
        raise UserError(
            "UnevenTasks",
            f"found task {task} of {tasks} as number {local_task} of {local_tasks} on this machine (LOCAL_RANK, "
            "LOCAL_WORLD_SIZE); expected the same number on each machine, in order: use torchrun --nproc-per-node=N",
        )
    return Place(
        task=task,
        tasks=tasks,
        local_task=local_task,
        local_tasks=local_tasks,
        host=environment.get("MASTER_ADDR") or "127.0.0.1",
        port=_number(environment, "MASTER_PORT", 29_500) + 1,  # torchrun itself listens on its port
        run=environment.get("TORCHELASTIC_RUN_ID", "run"),
    )


def _of_slurm(environment: Mapping[str, str]) -> Place:
    """The place of a task that srun started. A step's variables come first: it may use a part of the job."""
    tasks = _number(environment, "SLURM_STEP_NUM_TASKS", _number(environment, "SLURM_NTASKS"))
    task, node = _number(environment, "SLURM_PROCID"), _number(environment, "SLURM_NODEID", 0)
    nodes = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST") or "localhost"
    job, step = environment.get("SLURM_JOB_ID", "0"), environment.get("SLURM_STEP_ID", "0")
    counts = environment.get("SLURM_STEP_TASKS_PER_NODE") or environment.get("SLURM_TASKS_PER_NODE")
    by_node = tasks_of_nodes(counts) if counts else [(-(-tasks // sum(1 for _ in expand_nodes(nodes))), 1)]
    local_tasks, is_even = by_node[0][0], len({count for count, _ in by_node}) == 1
    local_task = _number(environment, "SLURM_LOCALID", task - node * local_tasks)
    in_order = local_task < local_tasks and task == node * local_tasks + local_task
    if not is_even or local_tasks < 1 or tasks % local_tasks or not in_order:
        raise UserError(
            "UnevenTasks",
            f"found task {task} as number {local_task} of node {node}, and {counts or local_tasks} tasks a node; "
            "expected the same number on each node, in order: use srun --ntasks-per-node=N --distribution=block",
        )
    default = _FIRST_PORT + (int(job) if _WHOLE.fullmatch(job) else 0) % _PORTS
    return Place(
        task=task,
        tasks=tasks,
        local_task=local_task,
        local_tasks=local_tasks,
        host=environment.get("MASTER_ADDR") or next(expand_nodes(nodes)),
        port=_number(environment, "MASTER_PORT", default),
        run=f"{job}.{step}",
    )


def expand_nodes(text: str) -> Iterator[str]:
    """The hosts of a Slurm node list. Raises UserError for one that cannot be read.

    >>> list(expand_nodes("gpu[08-10,12],login"))
    ['gpu08', 'gpu09', 'gpu10', 'gpu12', 'login']
    """
    entries = re.findall(r"(?:[^,\[\]]|\[[^\[\]]*\])+", text)
    if not entries or ",".join(entries) != text:
        raise UserError("WrongVariable", f"SLURM_JOB_NODELIST: found {text!r}, expected hosts such as node[01-04,07]")
    for entry in entries:
        parts = re.split(r"\[([^\[\]]*)\]", entry)  # text, ranges, text, ranges, text
        choices = [_range(part, text) if index % 2 else [part] for index, part in enumerate(parts)]
        for combination in itertools.product(*choices):
            yield "".join(combination)


def _range(ranges: str, text: str) -> list[str]:
    numbers: list[str] = []
    for each in ranges.split(","):
        found = _RANGE.fullmatch(each)
        if not found or not 0 <= int(found[2] or found[1]) - int(found[1]) <= _LONGEST_RANGE:
            raise UserError("WrongVariable", f"SLURM_JOB_NODELIST: found {text!r}, expected ranges such as [01-04,07]")
        width = len(found[1])
        numbers += [f"{number:0{width}d}" for number in range(int(found[1]), int(found[2] or found[1]) + 1)]
    return numbers


def tasks_of_nodes(text: str) -> list[tuple[int, int]]:
    """Slurm's counts of tasks, each with the number of nodes that it is for. Raises UserError for a broken list.

    >>> tasks_of_nodes("8(x3),4")
    [(8, 3), (4, 1)]
    """
    found = [_TASKS.fullmatch(each.strip()) for each in text.split(",")]
    if not all(found):
        raise UserError("WrongVariable", f"SLURM_TASKS_PER_NODE: found {text!r}, expected counts such as 8(x4)")
    return [(int(each[1]), int(each[2] or 1)) for each in found if each]


def _number(environment: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = environment.get(name, "" if default is None else str(default))
    if not _WHOLE.fullmatch(text):
        raise UserError("WrongVariable", f"found {text!r}, expected a whole number", name)
    return int(text)
