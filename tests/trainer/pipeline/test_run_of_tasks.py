"""`internvl-trainer run` in two processes with the variables that srun or torchrun sets for them."""

from __future__ import annotations

import signal
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest
from internvl_api.constants import ExitCode
from internvl_trainer.distributed import free_port
from trainer.runs import STEPS, Stage, environment, losses, make_config, started, write_config


def srun(task: int, port: int) -> dict[str, str]:
    """Of a job step on two nodes with a task each; here both nodes are this machine."""
    return {
        "SLURM_JOB_ID": "4711",
        "SLURM_STEP_ID": "0",
        "SLURM_NTASKS": "2",
        "SLURM_PROCID": str(task),
        "SLURM_NODEID": str(task),
        "SLURM_LOCALID": "0",
        "SLURM_TASKS_PER_NODE": "1(x2)",
        "SLURM_JOB_NODELIST": "localhost,localhost",
        "MASTER_PORT": str(port),
    }


def torchrun(task: int, port: int) -> dict[str, str]:
    """Of two processes on one machine."""
    return {
        "RANK": str(task),
        "WORLD_SIZE": "2",
        "LOCAL_RANK": str(task),
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }


def start_both(
    stack: ExitStack, config: Path, folder: Path, variables: Callable[[int, int], dict[str, str]]
) -> list[Stage]:
    port = free_port()
    return [
        stack.enter_context(
            started(
                ["run", str(config)],
                environment(folder / str(task), **variables(task, port)),
                folder / f"result-{task}",
            )
        )
        for task in (0, 1)
    ]


@pytest.mark.slow
def test_a_preempted_job_of_two_nodes_resumes_when_it_is_requeued(tmp_path: Path) -> None:
    output = tmp_path / "output"
    config = write_config(make_config(str(output)), tmp_path)
    with ExitStack() as stack:
        tasks = start_both(stack, config, tmp_path, srun)
        tasks[0].wait_for("step 2/", timeout=600)
        for task in tasks:
            task.stop(signal.SIGTERM)
        assert [task.wait(600) for task in tasks] == [ExitCode.RESUME] * 2, tasks[0].output
    assert "saving a checkpoint" in tasks[0].output
    with ExitStack() as stack:
        tasks = start_both(stack, config, tmp_path, srun)
        assert [task.wait(600) for task in tasks] == [ExitCode.OK] * 2, tasks[0].output
    assert sorted(losses(output)) == list(range(1, STEPS + 1))
    assert "step 1/" not in tasks[0].output, "the second start goes on from the checkpoint"
    assert (output / "artifacts" / "manifest.json").exists()


@pytest.mark.slow
def test_torchruns_processes_are_the_ranks_of_one_run(tmp_path: Path) -> None:
    output = tmp_path / "output"
    config = write_config(make_config(str(output), training={"maxSteps": 2}), tmp_path)
    with ExitStack() as stack:
        tasks = start_both(stack, config, tmp_path, torchrun)
        assert [task.wait(600) for task in tasks] == [ExitCode.OK] * 2, tasks[0].output
    assert sorted(losses(output)) == [1, 2]
