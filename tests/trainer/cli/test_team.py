"""Several tasks of one run: their place by torchrun's and Slurm's variables, and what they tell each other."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from internvl_api.status import StageResult
from internvl_trainer.cli.launcher import decisive_outcome
from internvl_trainer.cli.place import Place, expand_nodes, take_place, tasks_of_nodes
from internvl_trainer.cli.run import for_this_run, own_ranks
from internvl_trainer.cli.team import Follower, Leader, follow, lead
from internvl_trainer.distributed import free_port
from internvl_trainer.errors import Unavailable, UserError
from internvl_trainer.exit_status import Outcome
from trainer.runs import make_config

# As srun sets them for task 9 of a job with one task for each of eight GPUs on four nodes.
SRUN = {
    "SLURM_JOB_ID": "4711",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "9",
    "SLURM_NTASKS": "32",
    "SLURM_NODEID": "1",
    "SLURM_LOCALID": "1",
    "SLURM_NNODES": "4",
    "SLURM_TASKS_PER_NODE": "8(x4)",
    "SLURM_JOB_NODELIST": "gpu[007-009,021]",
}


def srun(**changes: str | None) -> dict[str, str]:
    return {name: value for name, value in {**SRUN, **changes}.items() if value is not None}


def torchrun(rank: int, world: int = 4, local: int = 2) -> dict[str, str]:
    return {
        "RANK": str(rank),
        "WORLD_SIZE": str(world),
        "LOCAL_RANK": str(rank % local),
        "LOCAL_WORLD_SIZE": str(local),
        "MASTER_ADDR": "first.example",
        "MASTER_PORT": "29600",
        "TORCHELASTIC_RUN_ID": "job",
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "GROUP_RANK": "1",
        "HOME": "/home/me",
    }


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        pytest.param({}, None, id="alone"),
        pytest.param({"SLURM_JOB_ID": "1", "SLURM_NTASKS": "4"}, None, id="a shell of salloc"),
        pytest.param(
            srun(SLURM_NTASKS="1", SLURM_PROCID="0", SLURM_NODEID="0", SLURM_LOCALID="0", SLURM_TASKS_PER_NODE="1"),
            None,
            id="1",
        ),
        pytest.param(srun(), Place(9, 32, 1, 8, "gpu007", 24711, "4711.0"), id="a task for each GPU"),
        pytest.param(
            srun(SLURM_PROCID="3", SLURM_NTASKS="4", SLURM_NODEID="3", SLURM_LOCALID="0", SLURM_TASKS_PER_NODE="1(x4)"),
            Place(3, 4, 0, 1, "gpu007", 24711, "4711.0"),
            id="a task for each node",
        ),
        pytest.param(
            srun(SLURM_TASKS_PER_NODE=None, SLURM_LOCALID=None),
            Place(9, 32, 1, 8, "gpu007", 24711, "4711.0"),
            id="counts that Slurm leaves out",
        ),
        pytest.param(
            srun(
                SLURM_STEP_NUM_TASKS="2",
                SLURM_STEP_NODELIST="gpu[008-009]",
                SLURM_STEP_TASKS_PER_NODE="1(x2)",
                SLURM_PROCID="1",
                SLURM_LOCALID="0",
                SLURM_STEP_ID="3",
                MASTER_PORT="31000",
            ),
            Place(1, 2, 0, 1, "gpu008", 31000, "4711.3"),
            id="a step on a part of the job",
        ),
        pytest.param(torchrun(3), Place(3, 4, 1, 2, "first.example", 29601, "job"), id="torchrun"),
        pytest.param(torchrun(0, world=1, local=1), None, id="torchrun with one process"),
    ],
)
def test_the_place_of_a_task(environment: dict[str, str], expected: Place | None) -> None:
    assert take_place(environment) == expected
    assert not {"RANK", "WORLD_SIZE", "TORCHELASTIC_USE_AGENT_STORE"} & set(environment), "the stages have their own"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        pytest.param({"SLURM_PROCID": "x"}, "SLURM_PROCID: found 'x', expected a whole number", id="no number"),
        pytest.param({"SLURM_TASKS_PER_NODE": "8(x3),4"}, "use srun --ntasks-per-node=N", id="uneven tasks"),
        pytest.param({"SLURM_LOCALID": "4"}, "--distribution=block", id="tasks dealt out in turn"),
        pytest.param({"SLURM_JOB_NODELIST": "gpu[1-"}, "expected hosts such as", id="a broken list"),
        pytest.param({"SLURM_TASKS_PER_NODE": "many"}, "expected counts such as 8(x4)", id="broken counts"),
        pytest.param({"SLURM_PROCID": "²"}, "SLURM_PROCID: found '²', expected a whole number", id="another script"),
        pytest.param({"SLURM_JOB_NODELIST": "gpu[9-7]"}, "expected ranges such as", id="a range without hosts"),
        pytest.param({"SLURM_LOCALID": "9", "SLURM_NODEID": "0"}, "--distribution=block", id="beyond its node"),
        pytest.param({"MASTER_PORT": "70000"}, "MASTER_PORT: task 0 would listen at port 70000", id="no port"),
    ],
)
def test_variables_that_cannot_be_used_are_named(changes: dict[str, str], said: str) -> None:
    with pytest.raises(UserError) as error:
        take_place(srun(**changes))
    assert said in str(error.value)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        pytest.param({"LOCAL_WORLD_SIZE": "0"}, "as number 1 of 0 on this machine", id="none on this machine"),
        pytest.param({"LOCAL_WORLD_SIZE": "8"}, "as number 1 of 8 on this machine", id="more here than in all"),
        pytest.param({"WORLD_SIZE": "5"}, "use torchrun --nproc-per-node=N", id="uneven tasks"),
        pytest.param({"LOCAL_RANK": "2"}, "as number 2 of 2 on this machine", id="beyond its machine"),
        pytest.param({"MASTER_PORT": "65535"}, "MASTER_PORT: task 0 would listen at port 65536", id="the last port"),
    ],
)
def test_torchruns_variables_that_cannot_be_used_are_named(changes: dict[str, str], said: str) -> None:
    with pytest.raises(UserError) as error:
        take_place({**torchrun(3), **changes})
    assert said in str(error.value)


def test_an_empty_address_is_this_machine() -> None:
    found = take_place({**torchrun(0), "MASTER_ADDR": ""})
    assert found is not None
    assert found.host == "127.0.0.1"


@pytest.mark.parametrize(
    ("text", "hosts"),
    [
        ("login", ["login"]),
        ("gpu[08-10,12],login", ["gpu08", "gpu09", "gpu10", "gpu12", "login"]),
        ("r[1-2]n[01-02]", ["r1n01", "r1n02", "r2n01", "r2n02"]),
        ("a[1-2]-ib.example,b7", ["a1-ib.example", "a2-ib.example", "b7"]),
    ],
)
def test_node_lists_are_expanded(text: str, hosts: list[str]) -> None:
    assert list(expand_nodes(text)) == hosts


@pytest.mark.parametrize("text", ["", "a,,b", "a[", "a]", "a[1-x]", "a[1-999999999]", "a[]", "a[3-1]"])
def test_a_broken_node_list_is_refused(text: str) -> None:
    with pytest.raises(UserError):
        list(expand_nodes(text))


def test_tasks_are_counted_by_node() -> None:
    assert tasks_of_nodes("8(x2),4,1") == [(8, 2), (4, 1), (1, 1)]


@pytest.mark.parametrize(
    ("task", "local_tasks", "nproc", "rank", "local_rank", "started"),
    [
        pytest.param(1, 1, 2, 2, 0, 2, id="a task for each node starts two"),
        pytest.param(3, 2, None, 3, 1, 1, id="a task for each rank"),
    ],
)
def test_ranks_follow_from_the_place_and_the_global_batch_stays(
    task: int, local_tasks: int, nproc: int | None, rank: int, local_rank: int, started: int
) -> None:
    tasks = 2 * local_tasks
    place = Place(task, tasks, task % local_tasks, local_tasks, "first", 1, "run")
    config = for_this_run(make_config("/out"), nproc, place)
    assert (config.workers, config.processes_per_worker, config.gradient_accumulation) == (2, 2, 1)
    ranks = own_ranks(config, place)
    assert (ranks.world_size, ranks.rank, ranks.local_rank, ranks.processes) == (4, rank, local_rank, started)
    assert ranks.environment(ranks.local_rank)["RANK"] == str(rank)


def place(task: int, tasks: int, port: int, run: str = "1.0") -> Place:
    return Place(task, tasks, 0, 1, "127.0.0.1", port, run)


def outcome(code: int, reason: str = "Trained") -> Outcome:
    how = {0: "succeeded", 75: "resume"}.get(code, "failed")
    return Outcome(code, StageResult.model_validate({"stage": "train", "outcome": how, "reason": reason}))


class Task(threading.Thread):
    """A task other than 0, which answers each order with the next of `outcomes`, and leaves without one."""

    def __init__(self, place: Place, *outcomes: Outcome) -> None:
        super().__init__(daemon=True)
        self._place, self._outcomes = place, list(outcomes)
        self.orders: list[Any] = []
        self.code: int | None = None
        self.follower: Follower | None = None
        self.start()

    def run(self) -> None:
        with follow(self._place, limit=60) as self.follower:
            for order in self.follower.orders():
                self.orders.append(order)
                if not self._outcomes:
                    return
                self.follower.answer(self._outcomes.pop(0))
            self.code = self.follower.code


@contextmanager
def leading(tasks: int, port: int) -> Iterator[Leader]:
    with lead(place(0, tasks, port), limit=60) as leader:
        yield leader


def test_the_others_run_what_the_first_says_and_end_with_its_code() -> None:
    port = free_port()
    others = [Task(place(task, 3, port), outcome(0), outcome(75, "Stopped")) for task in (1, 2)]
    with leading(3, port) as leader:
        leader.start("train", 1234)
        assert decisive_outcome(leader.outcomes("train", outcome(0))).code == 0
        leader.start("evaluate", 1235)
        assert decisive_outcome(leader.outcomes("evaluate", outcome(75))).code == 75
        assert not leader.have_failed(), "a stop is no failure"
        leader.end(75)
    for other in others:
        other.join(60)
        assert other.orders == [("train", 1234), ("evaluate", 1235)]
        assert other.code == 75


def test_a_failure_elsewhere_ends_the_stage_here_and_is_told() -> None:
    port = free_port()
    other = Task(place(1, 2, port), outcome(65, "RowUnusable"))
    with leading(2, port) as leader:
        leader.start("train", 1)
        while not leader.have_failed():
            threading.Event().wait(0.01)
        found = decisive_outcome(leader.outcomes("train", outcome(1, "InternalError")))
        assert (found.code, found.result.reason) == (65, "RowUnusable")
        leader.end(found.code)
    other.join(60)
    assert other.code == 65


def test_a_task_that_is_gone_is_named() -> None:
    port = free_port()
    other = Task(place(1, 2, port))
    with leading(2, port) as leader:
        leader.start("train", 1)
        other.join(60)
        found = decisive_outcome(leader.outcomes("train", outcome(0)))
        assert leader.have_failed()
    assert (found.code, found.result.reason) == (69, "TaskLost")
    assert "task 1 of 2 is gone" in found.result.message


def test_the_others_notice_that_the_first_failed_or_is_gone() -> None:
    port = free_port()
    other = Task(place(1, 2, port), outcome(1, "InternalError"))
    with leading(2, port) as leader:
        leader.start("train", 1)
        leader.outcomes("train", outcome(1, "InternalError"))
        assert other.follower is not None
    other.join(60)
    while not other.follower.have_failed():  # the end of the connection may be read after the last order
        threading.Event().wait(0.01)
    assert other.code == 1, "a leader that does not say how it ends has failed"


def test_strangers_and_other_runs_are_turned_away() -> None:
    port = free_port()
    come = threading.Event()

    def strangers() -> None:
        for hello in (
            b"GET / HTTP/1.1\r\n\r\n",
            b'{"run": "2.0", "task": 1}\n',
            b'{"run": "1.0", "task": 7}\n',
            b"[]\n",
            b"[" * 30_000 + b"\n",
        ):
            while True:
                try:
                    with socket.create_connection(("127.0.0.1", port), timeout=30) as connection:
                        connection.sendall(hello)
                        connection.settimeout(60)
                        assert connection.recv(1) == b""
                    break
                except ConnectionRefusedError:
                    continue
                except ConnectionResetError:
                    break
        come.set()

    threading.Thread(target=strangers, daemon=True).start()

    def ours() -> None:
        come.wait(60)
        Task(place(1, 2, port), outcome(0)).join(60)

    threading.Thread(target=ours, daemon=True).start()
    with leading(2, port) as leader:
        assert come.is_set()
        leader.start("train", 1)
        assert len(leader.outcomes("train", outcome(0))) == 2
        leader.end(0)


def test_tasks_that_do_not_come_are_named_with_the_next_step() -> None:
    missing = r"task\(s\) 1, 2 of 3 did not come .* write `srun internvl-trainer run"
    with pytest.raises(Unavailable, match=missing), lead(place(0, 3, free_port()), limit=0.05):
        pass
    unreachable = r"task 1 could not reach task 0 at 127\.0\.0\.1"
    with pytest.raises(Unavailable, match=unreachable), follow(place(1, 3, free_port()), limit=0.0):
        pass


def test_a_port_that_another_process_has_is_one_message() -> None:
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        with (
            pytest.raises(Unavailable, match=f"cannot listen at port {port} .* set MASTER_PORT"),
            lead(place(0, 2, port)),
        ):
            pass
