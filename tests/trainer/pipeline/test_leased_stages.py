"""A stage holds the lease of its output while it works, and of no other moment."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from internvl_api.run_config import RunConfig
from internvl_api.status import StageName, StageResult
from internvl_trainer.artifacts.fenced_storage import kept_alive
from internvl_trainer.artifacts.lease_record import Lease, Owner, parse_lease
from internvl_trainer.artifacts.output_layout import LEASE_FILE, RUN_FILE
from internvl_trainer.artifacts.output_lease import OutputLease, Timing
from internvl_trainer.artifacts.storage import FolderStorage, Storage, open_storage
from internvl_trainer.errors import LeaseLost, UserError
from internvl_trainer.metrics import Reporter
from internvl_trainer.run_context import RunContext
from internvl_trainer.signals import StopRequested, stop_by_exception
from internvl_trainer.stages import pipeline
from trainer.runs import make_config

FAST = Timing(live=5, beat=0.01, grace=1, poll=0.01)


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    return make_config(str(tmp_path / "output"))


@pytest.fixture
def output(config: RunConfig) -> Storage:
    return open_storage(config.output, field="spec.output")


@pytest.fixture
def working(monkeypatch: pytest.MonkeyPatch) -> list[Callable[[RunContext], object]]:
    """Put here what the stage does instead of its work; heartbeats are quick."""
    work: list[Callable[[RunContext], object]] = []

    def run(context: RunContext) -> StageResult:
        with stop_by_exception():
            for act in work:
                act(context)
        return StageResult(stage=context.stage, outcome="succeeded", reason="Merged", message="ok")

    monkeypatch.setattr(pipeline, "_run", run)
    monkeypatch.setattr(pipeline, "OutputLease", partial(OutputLease, timing=FAST))
    monkeypatch.setenv("INTERNVL_ATTEMPT", "1")
    return work


def run_stage(stage: StageName, config: RunConfig, said: Reporter | None = None) -> StageResult:
    return pipeline.run_stage(stage, config, said or Reporter(config.job, stage))


def stored(output: Storage) -> Lease:
    found = output.read_tagged(LEASE_FILE)
    lease = parse_lease(found.data) if found else None
    assert lease is not None
    return lease


def other(output: Storage, attempt: int = 1, job: str = "team-b/cats") -> OutputLease:
    """A lease that another process has just taken."""
    lease = OutputLease(output, Owner(job, "uid-1", "train", attempt, None), timing=FAST)
    lease.acquire()
    return lease


@pytest.mark.parametrize(("stage", "finished"), [("merge", False), ("publish", True)])
def test_a_stage_holds_the_lease_until_it_ends(
    stage: StageName, finished: bool, config: RunConfig, output: Storage, working: list[Callable[..., object]]
) -> None:
    during: list[Lease] = []
    working.append(lambda _: during.append(stored(output)))
    run_stage(stage, config)
    run_stage(stage, config)
    assert [(lease.released, lease.epoch, lease.owner.stage) for lease in during] == [
        (False, 1, stage),
        (False, 2, stage),
    ]
    assert (stored(output).released, stored(output).finished) == (True, finished)


def test_a_stage_that_fails_releases_the_lease(
    config: RunConfig, output: Storage, working: list[Callable[..., object]]
) -> None:
    def fail(_: RunContext) -> None:
        raise ValueError("made by the test")

    working.append(fail)
    with pytest.raises(ValueError, match="made by the test"):
        run_stage("merge", config)
    assert stored(output).released


def test_an_output_in_use_is_refused_before_any_work(
    config: RunConfig, output: Storage, working: list[Callable[..., object]]
) -> None:
    reporter = Reporter(config.job, "merge")
    working.append(lambda _: pytest.fail("it works"))
    with kept_alive(other(output), on_loss=lambda: None), pytest.raises(UserError) as caught:
        run_stage("merge", config, reporter)
    assert caught.value.reason == "OutputInUse"
    assert "run team-b/cats (attempt 1) is writing to" in caught.value.message
    assert "team-b/cats" in (reporter.progress.detail or "")
    assert {file.key for file in output.list() if file.size} == {LEASE_FILE}


def test_a_stage_that_is_replaced_stops_at_once_and_writes_no_more(
    config: RunConfig, output: Storage, working: list[Callable[..., object]]
) -> None:
    def be_replaced(context: RunContext) -> None:
        other(output, attempt=2, job=config.job)
        try:
            time.sleep(60)
        except StopRequested:
            context.storage.write("late", b"x")

    working.append(be_replaced)
    with pytest.raises(LeaseLost, match=r"attempt 2\) has taken .*; stage merge of run team/run \(attempt 1\)"):
        run_stage("merge", config)
    assert output.stat("late") is None
    assert stored(output).owner.attempt == 2
    assert not stored(output).released


def test_an_error_after_the_lease_was_lost_is_no_mistake_of_the_user(
    config: RunConfig, output: Storage, working: list[Callable[..., object]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def miss_a_file(context: RunContext) -> None:
        other(output, attempt=2, job=config.job)
        context.storage.read("pruned by the successor")

    monkeypatch.setattr(pipeline, "OutputLease", partial(OutputLease, timing=Timing()))  # nobody has noticed yet
    working.append(miss_a_file)
    with pytest.raises(LeaseLost):
        run_stage("merge", config)


def test_a_later_stage_of_a_run_reads_once_whose_output_it_is(
    config: RunConfig, output: Storage, working: list[Callable[..., object]], monkeypatch: pytest.MonkeyPatch
) -> None:
    reads: list[str] = []
    read = FolderStorage.read

    def note(storage: FolderStorage, key: str) -> bytes:
        reads.append(key)
        return read(storage, key)

    monkeypatch.setattr(FolderStorage, "read", note)
    run_stage("train", config)
    assert reads.count(RUN_FILE) == 2, "before a lease is written there, and under the lease"
    reads.clear()
    run_stage("merge", config)
    assert reads.count(RUN_FILE) == 1


def test_an_output_of_another_run_gets_no_lease(
    config: RunConfig, output: Storage, working: list[Callable[..., object]]
) -> None:
    output.write(RUN_FILE, b'{"job": "team-b/cats", "identity": {"method": "full"}}')
    for _ in range(2):
        with pytest.raises(UserError) as caught:
            run_stage("merge", config)
        assert caught.value.reason == "OutputHoldsAnotherRun"
    assert output.stat(LEASE_FILE) is None


def test_only_the_first_rank_takes_the_lease(
    config: RunConfig, output: Storage, working: list[Callable[..., object]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    run_stage("merge", config)
    assert output.stat(LEASE_FILE) is None


def test_no_thread_is_left(config: RunConfig, working: list[Callable[..., object]]) -> None:
    run_stage("merge", config)
    assert not [thread for thread in threading.enumerate() if thread.name == "lease"]
