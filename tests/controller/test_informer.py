"""The threads around the caches: lists and watches that break, runs that kopf's watch missed, liveness."""

import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from controller.builders import Raw, raw_pod
from internvl_operator import metrics
from internvl_operator.controller import Controller
from internvl_operator.core.observe import read_pod
from internvl_operator.core.run import Key
from internvl_operator.kube.cache import Collection, RunCache
from internvl_operator.kube.client import ApiError
from internvl_operator.kube.informer import SELECTOR, Informer
from internvl_operator.kube.resync import Resync
from internvl_operator.settings import Settings

RUN = Key("team", "run")


def pod(version: int, rank: int = 0) -> Raw:
    raw = raw_pod(rank)
    raw["metadata"]["resourceVersion"] = str(version)
    return raw


class Script:
    """An API whose lists and watches are told in advance; when nothing is left, it waits for the test to end."""

    timeout = 30.0

    def __init__(self, *answers: Any) -> None:
        self._answers = iter(answers)
        self.asked: list[tuple[str, str]] = []
        self.exhausted, self.release = threading.Event(), threading.Event()

    def list_pages(self, path: str, *, selector: str = "", fields: str = "", page: int = 500) -> Iterator[Raw]:
        self.asked.append(("list", selector))
        yield from self._next([])

    def watch(self, path: str, *, selector: str, version: str, seconds: float, fields: str = "") -> Iterator[Raw]:
        self.asked.append(("watch", version))
        for event in self._next([]):
            if isinstance(event, Exception):
                raise event
            yield event

    def _next(self, end: Any) -> Any:
        answer = next(self._answers, None)
        if answer is None:
            self.exhausted.set()
            self.release.wait(timeout=30)
            raise ApiError(0, "TheEnd", "of the test")
        if isinstance(answer, Exception):
            raise answer
        return answer


def listed(version: int, *pods: Raw) -> list[Raw]:
    return [{"metadata": {"resourceVersion": str(version)}, "items": list(pods)}]


def event(kind: str, raw: Raw) -> Raw:
    return {"type": kind, "object": raw}


BOOKMARK = {"type": "BOOKMARK", "object": {"metadata": {"resourceVersion": "77"}}}
EXPIRED = {"type": "ERROR", "object": {"code": 410, "reason": "Expired", "message": "too old resource version"}}


@pytest.mark.parametrize(
    ("answers", "asked", "ranks"),
    [
        pytest.param(
            [listed(10, pod(5)), [event("ADDED", pod(11, 1)), event("DELETED", pod(12))]],
            ["list", "watch 10", "watch 12"],
            [1],
            id="list-then-watch-from-there",
        ),
        pytest.param([listed(10), [BOOKMARK]], ["list", "watch 10", "watch 77"], [], id="a-bookmark-moves-on"),
        pytest.param(
            [listed(10, pod(5)), [EXPIRED], listed(90, pod(60, 1))],
            ["list", "watch 10", "list", "watch 90"],
            [1],
            id="expired-version-lists-again",
        ),
        pytest.param(
            [listed(90, pod(60), pod(61, 1)), [EXPIRED], listed(50, pod(40, 2)), [event("MODIFIED", pod(51, 2))]],
            ["list", "watch 90", "list", "watch 50", "watch 51"],
            [2],
            id="a-server-restored-from-a-backup",
        ),
        pytest.param(
            [listed(10), [event("ADDED", pod(11)), ApiError(0, "Disconnected", "silence")], []],
            ["list", "watch 10", "watch 11", "watch 11"],
            [0],
            id="a-broken-stream-goes-on-from-the-last-event",
        ),
        pytest.param(
            [ApiError(500, "InternalError", "etcd"), listed(10, pod(5))],
            ["list", "list", "watch 10"],
            [0],
            id="a-failed-list-is-tried-again",
        ),
        pytest.param([listed(10), [{"nonsense": 1}], listed(20, pod(15))], None, [0], id="nonsense-lists-again"),
    ],
)
def test_a_watch_goes_on_whatever_happens(
    answers: list[Any], asked: list[str] | None, ranks: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("internvl_operator.kube.informer._FIRST_PAUSE", 0.001)
    monkeypatch.setattr("internvl_operator.kube.informer._LONGEST_PAUSE", 0.001)
    api, told = Script(*answers), []
    pods = Collection(read_pod, lambda raw: raw["metadata"]["ownerReferences"][0]["name"])
    watch = Informer(api, "Pod", None, pods, told.append, seconds=60, resync=600)  # type: ignore[arg-type]
    watch.start()
    assert api.exhausted.wait(timeout=30)
    watch.stop()
    api.release.set()
    watch._thread.join(timeout=30)
    assert watch.synced.is_set()
    if asked is not None:
        assert [" ".join([verb, what]) if verb == "watch" else verb for verb, what in api.asked] == asked
    assert ("list", SELECTOR) in api.asked
    assert sorted(found.rank for found in pods.of(RUN)) == ranks
    assert set(told) <= {RUN}


def test_what_a_watch_leaves_out_is_found_by_the_next_list() -> None:
    """Two pods ended at versions 12 and 14; the watch told of 13 only, and of no other until it was over."""
    missed = metrics.RESYNC_MISSED.labels("Pod")._value.get()
    first = pod(5, 0), pod(6, 1), pod(7, 2)
    api, told = Script(listed(10, *first), [event("MODIFIED", pod(13, 1))], listed(20, pod(12, 0), pod(14, 2)), []), []
    pods = Collection(read_pod, lambda raw: raw["metadata"]["ownerReferences"][0]["name"])
    watch = Informer(api, "Pod", None, pods, told.append, seconds=60, resync=1e-9)  # type: ignore[arg-type]
    watch.start()
    assert api.exhausted.wait(timeout=30)
    watch.stop()
    api.release.set()
    watch._thread.join(timeout=30)
    assert [verb for verb, _ in api.asked][:4] == ["list", "watch", "list", "watch"]
    assert sorted(found.rank for found in pods.of(RUN)) == [0, 2], "also that the second went"
    assert len(told) == 3
    assert metrics.RESYNC_MISSED.labels("Pod")._value.get() - missed == 1, "the last may have been under way"


class Listing:
    """An API that has these runs."""

    def __init__(self, *runs: Raw) -> None:
        self.runs = runs

    version = 99

    def list_pages(self, path: str) -> Iterator[Raw]:
        yield {"metadata": {"resourceVersion": str(self.version)}, "items": list(self.runs)}


def custom(name: str, version: int, uid: str = "1") -> Raw:
    return {"metadata": {"namespace": "team", "name": name, "uid": uid, "resourceVersion": str(version)}}


@pytest.mark.parametrize(
    ("known", "there", "seen", "gone"),
    [
        pytest.param([custom("a", 1)], [custom("a", 1)], [], [], id="nothing-missed"),
        pytest.param([custom("a", 1)], [custom("a", 5)], ["a"], [], id="a-change-was-missed"),
        pytest.param([], [custom("a", 5)], ["a"], [], id="a-creation-was-missed"),
        pytest.param([custom("a", 1)], [], [], ["a"], id="a-deletion-was-missed"),
        pytest.param([custom("a", 1)], [custom("a", 5, uid="2")], ["a"], ["a"], id="made-again-meanwhile"),
    ],
)
def test_what_kopfs_watch_has_missed_is_found(
    known: list[Raw], there: list[Raw], seen: list[str], gone: list[str]
) -> None:
    runs, told_seen, told_gone = RunCache(), [], []
    for raw in known:
        runs.seen(raw)

    def take(raw: Raw) -> bool:
        news = runs.seen(raw)
        if news:
            told_seen.append(raw["metadata"]["name"])
        return news

    def drop(key: Key, uid: str) -> None:
        told_gone.append(key.name)
        runs.gone(key, uid)

    resync = Resync(Listing(*there), runs, None, seen=take, gone=drop, interval=1)  # type: ignore[arg-type]
    assert resync.compare() == len(seen) + len(gone)
    assert (told_seen, told_gone) == (seen, gone)
    assert resync.compare() == 0
    assert {raw["metadata"]["uid"] for raw in runs.all()} == {raw["metadata"]["uid"] for raw in there}


def test_runs_of_a_server_that_was_restored_from_a_backup_replace_the_cached_ones() -> None:
    runs, api = RunCache(), Listing(custom("a", 80), custom("b", 90))
    resync = Resync(api, runs, None, seen=runs.seen, gone=runs.gone, interval=1)  # type: ignore[arg-type]
    resync.compare()
    api.runs, api.version = (custom("a", 40),), 50
    resync.compare()
    assert {raw["metadata"]["name"]: raw["metadata"]["resourceVersion"] for raw in runs.all()} == {"a": "40"}
    assert runs.seen(custom("a", 51)), "what changes from then on is news"


def test_a_watch_that_misses_something_every_time_is_a_reason_to_restart() -> None:
    version, enough = iter(range(1, 100)), threading.Event()
    runs = RunCache()

    class Growing(Listing):
        def list_pages(self, path: str) -> Iterator[Raw]:
            number = next(version)
            if number > 4:
                enough.set()
            yield {"metadata": {"resourceVersion": "1"}, "items": [custom("a", number)]}

    resync = Resync(Growing(), runs, None, seen=runs.seen, gone=runs.gone, interval=0.001)  # type: ignore[arg-type]
    assert resync.problem() is None
    resync.start()
    assert enough.wait(timeout=30)
    resync.stop()
    resync._thread.join(timeout=30)
    assert "missed changes" in (resync.problem() or "")


@pytest.mark.parametrize(
    ("break_it", "words"),
    [
        pytest.param(lambda controller: None, "", id="all-is-well"),
        pytest.param(
            lambda controller: _age_watch(controller, 1000), "the watch of Pod has hung for", id="a-watch-hangs"
        ),
        pytest.param(lambda controller: _age_pass(controller, 1000), "a pass has taken", id="a-pass-hangs"),
        pytest.param(lambda controller: _age_watch(controller, 100), "", id="a-quiet-watch-is-no-hang"),
        pytest.param(lambda controller: _end_thread(controller), "thread reconcile-0 has ended", id="a-thread-ends"),
    ],
)
def test_liveness_reports_what_a_restart_would_fix(break_it: Callable[[Controller], None], words: str) -> None:
    controller = Controller(Settings.from_env({}), Script())  # type: ignore[arg-type]
    break_it(controller)
    problems = controller.problems()
    assert bool(problems) == bool(words)
    assert words in " ".join(problems)


def _age_watch(controller: Controller, seconds: float) -> None:
    informer = controller.informers[0]
    informer._tried -= seconds


def _age_pass(controller: Controller, seconds: float) -> None:
    controller._started[1] = time.monotonic() - seconds


def _end_thread(controller: Controller) -> None:
    controller._queue.close()  # ends the thread, as an error outside of a pass would
    controller._workers[0].start()
    controller._workers[0].join(timeout=30)
