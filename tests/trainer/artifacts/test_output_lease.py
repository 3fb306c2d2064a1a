"""Who may write to an output, and what the others are told. In virtual time."""

from __future__ import annotations

import os
import subprocess
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from internvl_trainer.artifacts import fenced_storage
from internvl_trainer.artifacts.fenced_storage import FencedStorage, check_epoch, kept_alive
from internvl_trainer.artifacts.lease_record import Owner, describe_process, has_ended, parse_lease
from internvl_trainer.artifacts.output_layout import LEASE_FILE
from internvl_trainer.artifacts.output_lease import OutputLease, Timing
from internvl_trainer.artifacts.storage import ConditionsUnsupported, FolderStorage
from internvl_trainer.errors import LeaseLost, Unavailable, UserError


class Time:
    """A clock that only sleeping moves; `meanwhile` is called at each sleep."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.meanwhile: Callable[[], object] = lambda: None

    def now(self) -> float:
        return self.seconds

    def sleep(self, seconds: float) -> None:
        self.seconds += seconds
        self.meanwhile()


class Away(FolderStorage):
    """A folder that does not answer while `away`, and that may lack or ignore conditions."""

    away = False
    conditions = "kept"

    def read(self, key: str) -> bytes:
        self._answer()
        return super().read(key)

    def write(self, key: str, data: bytes) -> None:
        self._answer()
        super().write(key, data)

    def replace(self, key: str, data: bytes, *, expected: str | None) -> str | None:
        self._answer()
        if self.conditions == "refused":
            raise ConditionsUnsupported("the server answers NotImplemented")
        if self.conditions == "ignored":
            found = self.read_tagged(key)
            expected = found.tag if found else None
        return super().replace(key, data, expected=expected)

    def _answer(self) -> None:
        if self.away:
            raise Unavailable("StorageUnavailable", "away")


@pytest.fixture
def storage(tmp_path: Path) -> Away:
    return Away(tmp_path / "output", field="spec.output")


@pytest.fixture
def time() -> Time:
    return Time()


def owner(run: str = "team/pets", attempt: int | None = 1, uid: str = "uid-1", stage: str = "train") -> Owner:
    return Owner(run, uid, stage, attempt, process=None)


def held(storage: Away, time: Time, who: Owner, told: list[str] | None = None) -> OutputLease:
    """A lease that was acquired."""
    lease = OutputLease(storage, who, now=time.now, sleep=time.sleep, tell=(told if told is not None else []).append)
    lease.acquire()
    return lease


def stored(storage: Away) -> str:
    found = storage.read_tagged(LEASE_FILE)
    lease = parse_lease(found.data) if found else None
    assert lease is not None
    return lease.owner.run


def test_a_run_that_writes_keeps_another_out(storage: Away, time: Time) -> None:
    first = held(storage, time, owner("team-a/pets"))
    time.meanwhile = lambda: time.seconds % 10 or first.renew()
    with pytest.raises(UserError) as caught:
        held(storage, time, owner("team-b/cats", uid="uid-2"))
    assert caught.value.reason == "OutputInUse"
    assert "stage train of run team-a/pets (attempt 1) is writing" in caught.value.message
    assert "choose another output for team-b/cats" in caught.value.message
    assert time.seconds <= 11, "a live owner is seen at its next renewal"
    first.confirm()


def test_a_run_that_was_applied_again_is_told_of_its_predecessor(storage: Away, time: Time) -> None:
    first = held(storage, time, owner())
    time.meanwhile = lambda: time.seconds % 10 or first.renew()
    with pytest.raises(UserError, match=r"an earlier run or .* continues when that one has ended") as caught:
        held(storage, time, owner(uid="uid-2"))
    assert caught.value.reason == "OutputInUse"


def test_a_run_that_died_is_taken_over_once_its_lease_is_stale(storage: Away, time: Time) -> None:
    first, told = held(storage, time, owner("team-a/pets")), list[str]()
    second = held(storage, time, owner("team-b/cats", uid="uid-2"), told)
    assert Timing().live < time.seconds <= Timing().stale + 1
    assert told == ["waiting up to 40 s: stage train of run team-a/pets (attempt 1) has not released the output"]
    with pytest.raises(LeaseLost, match=r"run team-b/cats \(attempt 1\) has taken .*output; stage train of run team-a"):
        first.confirm()
    second.confirm()


@pytest.mark.parametrize(
    ("earlier", "later"),
    [
        pytest.param(owner(attempt=1), owner(attempt=2), id="the next attempt"),
        pytest.param(owner(stage="train"), owner(stage="merge"), id="the next stage, of a first that never released"),
        pytest.param(
            owner(attempt=5), replace(owner(uid="uid-2"), adopted=("uid-0", "uid-1")), id="a run that adopted its pods"
        ),
    ],
)
def test_a_run_takes_over_from_itself_at_once(storage: Away, time: Time, earlier: Owner, later: Owner) -> None:
    first = held(storage, time, earlier)
    second = held(storage, time, later)
    assert time.seconds == 0
    assert second.epoch == first.epoch + 1
    for act in (first.confirm, first.renew, first.check):
        with pytest.raises(LeaseLost) as caught:
            act()
        assert caught.value.reason == "OutputLeaseLost"


def test_a_run_of_another_name_does_not_take_over_what_a_run_has_adopted(storage: Away, time: Time) -> None:
    first = held(storage, time, owner("team/pets"))
    time.meanwhile = lambda: time.seconds % 10 or first.renew()
    with pytest.raises(UserError):
        held(storage, time, replace(owner("team/cats", uid="uid-2"), adopted=("uid-1",)))


def test_an_attempt_that_was_replaced_does_not_come_back(storage: Away, time: Time) -> None:
    newer = held(storage, time, owner(attempt=3))
    time.meanwhile = lambda: time.seconds % 10 or newer.renew()
    with pytest.raises(LeaseLost, match=r"attempt 3\) is writing .* \(attempt 2\) has been replaced and stops"):
        held(storage, time, owner(attempt=2))
    newer.confirm()


@pytest.mark.parametrize(
    ("later", "finished", "waits"),
    [
        pytest.param(owner("team/pets", uid="uid-2"), False, 0, id="applied again"),
        pytest.param(owner("team/cats", uid="uid-2"), True, 0, id="another run, after this one published"),
        pytest.param(owner("team/cats", uid="uid-2"), False, 40, id="another run, between two stages of this one"),
        pytest.param(owner("team/pets", None, "local"), False, 0, id="on one machine"),
    ],
)
def test_a_released_output(storage: Away, time: Time, later: Owner, finished: bool, waits: float) -> None:
    held(storage, time, owner()).release(finished=finished)
    held(storage, time, later).confirm()
    assert time.seconds == waits


def test_another_run_does_not_slip_in_between_two_stages(storage: Away, time: Time) -> None:
    held(storage, time, owner(stage="train")).release()

    def next_stage() -> None:
        if time.seconds == 12:
            held(storage, Time(), owner(stage="merge"))

    time.meanwhile = next_stage
    with pytest.raises(UserError, match=r"stage merge of run team/pets \(attempt 1\) is writing"):
        held(storage, time, owner("team/cats", uid="uid-2"))


def test_an_outage_ends_writing_but_not_the_attempt(storage: Away, time: Time) -> None:
    lease = held(storage, time, owner())
    storage.away = True
    for _ in range(12):
        time.sleep(10)
        with pytest.raises(Unavailable):
            lease.confirm()
    storage.away = False
    FencedStorage(storage, lease).write("after", b"the outage")
    assert storage.read("after") == b"the outage"


def test_a_holder_that_slept_through_its_lease_renews_before_it_writes(storage: Away, time: Time) -> None:
    lease = held(storage, time, owner())
    before = storage.read_tagged(LEASE_FILE)
    time.sleep(Timing().live)
    lease.confirm()
    assert storage.read_tagged(LEASE_FILE) != before, "who watches since a while begins anew"


def test_every_change_of_the_output_needs_the_lease(storage: Away, time: Time, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x")
    earlier = FencedStorage(storage, held(storage, time, owner(attempt=1)))
    earlier.write("kept", b"x")
    held(storage, time, owner(attempt=2))
    changes: list[Callable[[], object]] = [
        lambda: earlier.write("key", b"x"),
        lambda: earlier.replace("key", b"x", expected=None),
        lambda: earlier.upload(tmp_path / "file", "key"),
        lambda: earlier.copy("kept", "key"),
        lambda: earlier.delete("kept"),
        lambda: earlier.drop_unfinished(""),
    ]
    for change in changes:
        with pytest.raises(LeaseLost):
            change()
    assert earlier.read("kept") == b"x"
    assert earlier.stat("key") is None


@pytest.mark.parametrize("conditions", ["refused", "ignored"])
def test_a_server_without_conditional_writes(
    storage: Away, time: Time, conditions: str, caplog: pytest.LogCaptureFixture
) -> None:
    storage.conditions = conditions
    first = held(storage, time, owner(attempt=1))
    assert time.seconds == Timing().settle, "waits to see whether another has written since"
    assert "Two runs that start with the same output within one slow request may still both write" in caplog.text
    first.renew()
    second = held(storage, time, owner(attempt=2))
    with pytest.raises(LeaseLost):
        first.renew()
    second.renew()
    second.confirm()


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b'{"owner": 1}', b"\xff", b'{"epoch": 1e999}'])
def test_a_file_of_another_program_is_waited_for_and_replaced(storage: Away, time: Time, content: bytes) -> None:
    storage.write(LEASE_FILE, content)
    told: list[str] = []
    held(storage, time, owner(), told).confirm()
    assert told == ["waiting up to 40 s: the output's lease.json cannot be read"]


def test_a_deleted_lease_is_written_again(storage: Away, time: Time) -> None:
    lease = held(storage, time, owner())
    storage.delete(LEASE_FILE)
    lease.confirm()
    assert stored(storage) == "team/pets"


def test_the_heartbeat_renews_releases_and_tells_a_loss(storage: Away) -> None:
    timing, lost = Timing(live=5, beat=0.01, grace=1), threading.Event()
    lease = OutputLease(storage, owner(), timing=timing)
    lease.acquire()
    with kept_alive(lease, on_loss=lost.set):
        OutputLease(storage, owner(attempt=2), timing=timing).acquire()
        assert lost.wait(5)
    again = OutputLease(storage, owner(attempt=3), timing=timing)
    again.acquire()
    with kept_alive(again, on_loss=lost.set) as finish:
        finish()
    found = storage.read_tagged(LEASE_FILE)
    kept = parse_lease(found.data) if found else None
    assert kept is not None
    assert (kept.released, kept.finished, kept.owner.attempt) == (True, True, 3)


def test_a_slow_renewal_of_an_ended_stage_does_not_stop_the_next_one(
    storage: Away, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`internvl-trainer run` does the next stage in the same process, while the last stage's request is under way."""
    renewing, answered, lost = threading.Event(), threading.Event(), threading.Event()
    timing = Timing(live=5, beat=0.01, grace=1)

    class Slow(OutputLease):
        def renew(self) -> None:
            renewing.set()
            assert answered.wait(5)
            super().renew()

    monkeypatch.setattr(fenced_storage, "_RELEASE_SECONDS", 0.0)
    ended = Slow(storage, owner(), timing=timing)
    ended.acquire()
    with kept_alive(ended, on_loss=lost.set):
        assert renewing.wait(5)
    (thread,) = [each for each in threading.enumerate() if each.name == "lease"]
    OutputLease(storage, owner(), timing=timing).acquire()
    answered.set()
    thread.join(5)
    assert not thread.is_alive()
    assert not lost.is_set()


def test_a_process_of_this_machine_is_known_to_have_ended(storage: Away, time: Time) -> None:
    with subprocess.Popen(["sleep", "60"]) as child:
        process = describe_process(child.pid)
        assert not has_ended(process)
        held(storage, time, Owner("default/run", "local", "train", None, process))
        child.kill()
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        assert has_ended(process), "a zombie has ended"
    assert has_ended(process)
    held(storage, time, Owner("default/run", "local", "train", None, describe_process(os.getpid())))
    assert time.seconds == 0


@pytest.mark.parametrize("process", [None, "", "a b c", "boot pid:[1] 1 2", "boot pid:[1] x 2"])
def test_of_other_machines_nothing_is_known(process: str | None) -> None:
    assert not has_ended(process)


def test_a_rank_without_the_lease_sees_when_another_attempt_has_taken_it(tmp_path: Path) -> None:
    storage = FolderStorage(tmp_path, field="spec.output")
    check_epoch(storage, None)
    with pytest.raises(LeaseLost):
        check_epoch(storage, 1)
    first = OutputLease(storage, Owner("run", "uid", "train", 1, process=None))
    first.acquire()
    check_epoch(storage, first.epoch)
    later = OutputLease(storage, Owner("run", "uid", "train", 2, process=None))
    later.acquire()
    check_epoch(storage, later.epoch)
    with pytest.raises(LeaseLost, match="has taken"):
        check_epoch(storage, first.epoch)
