"""Who leads: two candidates and one Lease, with clocks, failures and pauses as a test says."""

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
from controller.builders import Raw
from internvl_operator.health import Health
from internvl_operator.kube.client import Api, ApiError
from internvl_operator.kube.lease import LeaseClient, Record
from internvl_operator.leader_election import Leadership
from kubernetes import client

SECONDS = 15.0


@dataclass
class Store:
    """One Lease. `failing`: no request is answered."""

    record: Record | None = None
    failing: bool = False
    writes: list[str] = field(default_factory=list)
    before_write: Callable[[], None] = lambda: None

    def get(self, timeout: float) -> Record | None:
        if self.failing:
            raise ApiError(0, "Unreachable", "no route to host")
        return self.record

    def write(self, before: Record | None, holder: str, seconds: float, timeout: float) -> Record:
        self.before_write()
        if self.failing:
            raise ApiError(500, "InternalError", "etcd")
        if before != self.record:
            raise ApiError(409, "Conflict", "the object has been modified")
        self.writes.append(holder)
        self.record = Record(holder, seconds, str(len(self.writes)), {})
        return self.record


@dataclass
class Clock:
    now: float = 0.0

    def __call__(self) -> float:
        return self.now


def candidate(store: Store, name: str, clock: Clock) -> Leadership:
    return Leadership(store, name, SECONDS, lost=pytest.fail, clock=clock)


@pytest.fixture
def store() -> Store:
    return Store()


def test_the_first_takes_it_and_keeps_it_by_renewing(store: Store) -> None:
    clock = Clock()
    first, second = candidate(store, "a", clock), candidate(store, "b", clock)
    for _ in range(20):
        assert first.attempt()
        assert not second.attempt()
        clock.now += 2
    assert set(store.writes) == {"a"}
    assert first.time_left() == pytest.approx(SECONDS * 2 / 3 - 2)


@pytest.mark.parametrize("skew", [pytest.param(shift, id=f"{shift:+}s") for shift in (0, 86400, -86400)])
def test_the_holder_has_stopped_before_another_begins_whatever_the_clocks_say(store: Store, skew: float) -> None:
    here, there = Clock(1000), Clock(1000 + skew)
    first, second = candidate(store, "a", here), candidate(store, "b", there)
    assert first.attempt()
    moments = 0
    while not second.attempt():  # the first says nothing more, as if it were stopped
        moments += 1
        here.now += 0.5
        there.now += 0.5
    assert first.time_left() < 0
    assert moments * 0.5 == SECONDS
    assert second.time_left() > 0


def test_a_candidate_waits_anew_after_every_change(store: Store) -> None:
    clock = Clock()
    first, second = candidate(store, "a", clock), candidate(store, "b", clock)
    first.attempt()
    second.attempt()
    clock.now += SECONDS - 1
    first.attempt()
    clock.now += SECONDS - 1
    assert not second.attempt()
    clock.now += 2
    assert not second.attempt()  # it saw the last change a moment ago only
    clock.now += SECONDS
    assert second.attempt()


def test_a_slow_answer_counts_from_when_it_was_asked(store: Store) -> None:
    clock = Clock()
    first = candidate(store, "a", clock)

    def wait() -> None:
        clock.now += 8

    store.before_write = wait
    assert first.attempt()
    assert first.time_left() == pytest.approx(SECONDS * 2 / 3 - 8)
    clock.now += 1
    store.before_write = lambda: setattr(clock, "now", clock.now + 11)
    assert not first.attempt()  # it was renewed, but too late to be of use


def test_of_two_that_write_at_once_one_has_it(store: Store) -> None:
    clock = Clock()
    first, second = candidate(store, "a", clock), candidate(store, "b", clock)

    def faster() -> None:
        store.before_write = lambda: None
        assert second.attempt()

    store.before_write = faster
    assert not first.attempt()
    assert store.writes == ["b"]


def test_one_that_was_stopped_for_too_long_finds_it_taken(store: Store) -> None:
    clock = Clock()
    first, second = candidate(store, "a", clock), candidate(store, "b", clock)
    first.attempt()
    second.attempt()
    clock.now += SECONDS + 1
    assert second.attempt()
    assert first.time_left() < 0
    assert not first.attempt()
    assert store.writes == ["a", "b"]


def test_the_same_replica_started_again_goes_on_at_once(store: Store) -> None:
    assert candidate(store, "pod-1", Clock()).attempt()
    assert candidate(store, "pod-1", Clock()).attempt()


@pytest.fixture
def quick_store(store: Store) -> Iterator[Store]:
    yield store
    store.failing = False


def test_a_holder_that_cannot_renew_gives_up_before_anybody_else_may_begin(quick_store: Store) -> None:
    lost, why = threading.Event(), list[str]()

    def give_up(reason: str) -> None:
        why.append(reason)
        lost.set()

    leading = Leadership(quick_store, "a", 1.0, lost=give_up)
    assert leading.acquire(threading.Event())
    quick_store.failing = True
    assert lost.wait(timeout=30)
    assert leading.time_left() <= 0
    assert "no route to host" in why[0]


def test_who_is_told_to_stop_while_standing_by_takes_nothing(store: Store) -> None:
    candidate(store, "a", Clock()).attempt()
    stop = threading.Event()
    stop.set()
    assert not candidate(store, "b", Clock()).acquire(stop)
    assert store.writes == ["a"]


def test_a_released_lease_is_taken_at_once(store: Store) -> None:
    leading = Leadership(store, "a", SECONDS, lost=pytest.fail)
    assert leading.acquire(threading.Event())
    leading.release()
    assert leading.time_left() < 0
    assert store.record is not None
    assert store.record.holder == ""
    assert candidate(store, "b", Clock()).attempt()


def test_a_thread_that_no_longer_looks_at_the_lease_is_a_reason_to_restart(store: Store) -> None:
    clock = Clock()
    leading = candidate(store, "a", clock)
    leading.attempt()
    clock.now += 2 * SECONDS
    assert leading.problem() is None
    clock.now += 3 * SECONDS
    assert "was not checked" in (leading.problem() or "")


class Recorder(Api):
    """An Api that sends nothing."""

    def __init__(self) -> None:
        super().__init__(client.Configuration(), timeout=30, connections=1)
        self.sent: list[tuple[str, str, float]] = []

    def _send(self, method: str, path: str, query: Any, body: Any, *, timeout: Any, **_: Any) -> Any:
        self.sent.append((method, path, timeout.total))

        class Answer:
            data = b'{"metadata": {"resourceVersion": "7"}}'

        return Answer()


POD: Raw = {"apiVersion": "v1", "kind": "Pod", "metadata": {"namespace": "team", "name": "p"}}
WRITES: dict[str, Callable[[Api], object]] = {
    "apply": lambda api: api.apply(POD, force=False),
    "status": lambda api: api.apply_status(POD),
    "delete": lambda api: api.delete("Pod", "team", "p", uid="1", force=False),
    "event": lambda api: api.create({**POD, "kind": "Event"}),
}


@pytest.mark.parametrize("write", [pytest.param(write, id=name) for name, write in WRITES.items()])
def test_no_write_leaves_without_the_lead(write: Callable[[Api], object]) -> None:
    api = Recorder()
    api.time_left = lambda: 3.0
    write(api)
    assert [timeout for _, _, timeout in api.sent] == [3.0]  # and none may still be under way when it is over
    api.time_left = lambda: -0.1
    with pytest.raises(ApiError, match="NotLeading"):
        write(api)
    assert len(api.sent) == 1


def test_the_lease_itself_may_always_be_written() -> None:
    api = Recorder()
    api.time_left = lambda: -1.0
    written = LeaseClient(api, "ops", "lease").write(None, "a", SECONDS, timeout=5)
    assert written.version == "7"
    assert api.sent == [("POST", "/apis/coordination.k8s.io/v1/namespaces/ops/leases", 5)]


@pytest.mark.parametrize(
    ("lag", "part", "not_ready", "live", "ready"),
    [
        pytest.param(0, [], None, 200, 200, id="all-is-well"),
        pytest.param(0, [], "starting", 200, 503, id="not-ready-is-no-reason-to-restart"),
        pytest.param(0, ["the watch of Pod hangs"], None, 503, 503, id="a-part-hangs"),
        pytest.param(100, [], None, 503, 503, id="the-event-loop-hangs"),
        pytest.param(10, [], None, 200, 200, id="the-event-loop-is-late"),
    ],
)
def test_probes(lag: float, part: list[str], not_ready: str | None, live: int, ready: int) -> None:
    health = Health()
    health.not_ready = not_ready
    health.watch(lambda: part)
    health._lag = lambda: lag  # type: ignore[method-assign]
    assert (health.answer("/healthz")[0], health.answer("/readyz?verbose")[0]) == (live, ready)
    assert health.answer("/")[0] == 404
    for problem in part:
        assert problem in health.answer("/healthz")[1]
