"""The real controller, driven pass by pass against an API server in memory.

`Operator` is one process: its caches lag behind until `hear`, and a pass may be cut off before any write. Only what has
threads, sockets or a clock is replaced (`controller.Parts`). Nothing here knows what should happen.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from controller.builders import Raw, custom_resource, result, terminated
from controller.fake_server import POD_GROUP, Server, clock, clone, names_of
from internvl_api.constants import KIND
from internvl_operator import metrics
from internvl_operator.controller import Controller, Parts
from internvl_operator.core.observe import LiveProgress, Pod, ProcessState, RankAnswers, Silence
from internvl_operator.core.plan import Event
from internvl_operator.core.run import Key, Run
from internvl_operator.kube.client import list_path
from internvl_operator.settings import Settings
from internvl_operator.work_queue import WorkQueue

SETTINGS = Settings.from_env(
    {"INTERNVL_OPERATOR_GANG_SCHEDULERS": "volcano", "INTERNVL_OPERATOR_NETWORK_POLICY_PEERS": "[]"}
)
CHILDREN = ("Pod", "Service", "ConfigMap", "NetworkPolicy", POD_GROUP)
STAGES = ("preflight", "train", "publish")


class Operator:
    """One process of the operator. A new one lists everything; then it knows only what it has heard."""

    def __init__(self, server: Server, settings: Settings = SETTINGS) -> None:
        self.server = server
        self.requeue: float | None = None  # seconds until the pass that the last pass asked for
        self._connection = _Connection(server)
        self._queue = _Queue()
        self.probe = _RankProbe(server, self._queue.add)
        parts = Parts(
            queue=self._queue,
            executor=_Inline(),
            events=_Events(server),  # type: ignore[arg-type]
            poller=_Poller(server, self._queue.add),  # type: ignore[arg-type]
            rank_probe=self.probe,  # type: ignore[arg-type]
            node_watch=_NodeWatch(server),  # type: ignore[arg-type]
            now=lambda: server.now,
        )
        self._controller = Controller(settings, self._connection, parts)  # type: ignore[arg-type]
        self._runs_heard = len(server.log)
        for raw in server.objects[KIND].values():
            self._controller.run_seen(clone(raw))
        self.hear()

    def hear(self, kind: str | None = None, events: int | None = None) -> None:
        """Take in the next watch events of a kind (or of all), all of them unless told how many."""
        for informer in self._controller.informers:
            if kind in (None, informer.kind):
                self._connection.limit = events
                informer.list_and_watch()
        if kind in (None, KIND):
            end = len(self.server.log) if events is None else min(len(self.server.log), self._runs_heard + events)
            for verb, of, raw in self.server.log[self._runs_heard : end]:
                if of == KIND:
                    take = self._controller.run_gone if verb == "DELETED" else self._controller.run_seen
                    take(clone(raw))
            self._runs_heard = end

    @property
    def up_to_date(self) -> bool:
        """Whether every event has been heard."""
        return {self._runs_heard, *self._connection.heard.values()} == {len(self.server.log)}

    def run_pass(self, name: str = "run") -> int:
        """One pass over the run with what is known now; the number of writes it made."""
        key, before, errors = Key("team", name), len(self.server.writes), _internal_errors()
        self._controller.request(key)
        while self._queue.taken != key:
            self._controller.step()
        self._queue.taken = None
        self.requeue = min(self._queue.delays.get(key, ()), default=None)
        assert _internal_errors() == errors, "the pass raised an error; see the log"
        return len(self.server.writes) - before

    def settle(self, name: str = "run") -> None:
        """Hear and pass until nothing changes any more."""
        for _ in range(50):
            self.hear()
            if self.run_pass(name) == 0 and self.up_to_date and self.requeue != 0:
                return
        raise AssertionError(f"it does not settle; the last writes: {self.server.writes[-6:]}")


class World:
    """A server with one run, and an operator that hears everything."""

    def __init__(self, **changes: Any) -> None:
        self.server = Server()
        self.server.create(custom_resource(**changes))
        self.operator = Operator(self.server)
        self.operator.settle()

    @property
    def status(self) -> Raw:
        return self.server.status()

    def pods(self, stage: str) -> list[str]:
        return list(names_of(self.server, stage))

    def run(self, stage: str) -> None:
        for name in self.pods(stage):
            self.server.set_pod(name, {"phase": "Running"})
        self.operator.settle()

    def end(self, stage: str, code: int = 0, message: Any = "", ranks: tuple[int, ...] | None = None) -> None:
        for rank, name in enumerate(self.pods(stage)):
            if ranks is None or rank in ranks:
                phase = "Succeeded" if code == 0 else "Failed"
                self.server.set_pod(name, {"phase": phase, **terminated(code, message, finished=self.server.now)})
        self.operator.settle()

    def pass_stage(self, stage: str) -> None:
        self.run(stage)
        self.end(stage, 0, result(stage))

    def collect(self) -> None:
        self.server.evict_deleted()
        self.operator.settle()

    def later(self, seconds: float) -> None:
        clock(self.server, seconds)
        self.operator.settle()

    def reach(self, stage: str) -> None:
        for earlier in STAGES[: STAGES.index(stage)]:
            self.pass_stage(earlier)
        self.run(stage)


class _Connection:
    """One process's API client: a watch goes on where the last one ended and brings at most `limit` events."""

    def __init__(self, server: Server) -> None:
        self.timeout = server.timeout
        self.heard: dict[tuple[str, str], int] = {}  # kind, field selector -> position in the server's log
        self.limit: int | None = None
        self._server = server
        self.patch = server.patch
        self._kinds = {list_path(kind, None): kind for kind in CHILDREN}
        self.apply, self.apply_status = server.apply, server.apply_status
        self.delete, self.find = server.delete, server.find

    def list_pages(self, path: str, *, selector: str, fields: str = "", page: int = 500) -> Iterator[Raw]:
        if path not in self._kinds:  # of one namespace: a request, not the beginning of a watch
            (kind,) = [kind for kind in CHILDREN if list_path(kind, "team") == path]
            wanted = dict(pair.split("=") for pair in selector.split(","))
            found = self._server.objects[kind].values()
            yield {"items": clone([raw for raw in found if wanted.items() <= raw["metadata"]["labels"].items()])}
            return
        kind, log = self._kinds[path], self._server.log
        self.heard[kind, fields] = len(log)
        version = log[-1][2]["metadata"]["resourceVersion"] if log else "0"
        items = [raw for raw in self._server.objects[kind].values() if _chosen(raw, fields)]
        yield {"metadata": {"resourceVersion": version}, "items": clone(items)}

    def watch(self, path: str, *, selector: str, version: str, seconds: float, fields: str = "") -> Iterator[Raw]:
        kind, end = self._kinds[path], len(self._server.log)
        start = self.heard[kind, fields]
        if self.limit is not None:
            end = min(end, start + self.limit)
        self.heard[kind, fields] = end
        for verb, of, raw in self._server.log[start:end]:
            if of == kind and _chosen(raw, fields):
                yield {"type": verb, "object": clone(raw)}


def _chosen(raw: Raw, fields: str) -> bool:
    return not fields or fields == f"metadata.name={raw['metadata']['name']}"


class _Queue(WorkQueue[Key]):
    """Remembers which key was taken last, and the delays after which passes were asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.taken: Key | None = None
        self.delays: dict[Key, list[float]] = {}

    def add(self, key: Key, after: float = 0.0) -> None:
        self.delays.setdefault(key, []).append(after)
        super().add(key, after)

    def get(self) -> Key | None:
        self.taken = super().get()
        self.delays.clear()
        return self.taken


class _Poller:
    """Answers from `server.answers`, at once."""

    def __init__(self, server: Server, changed: Callable[[Key], None]) -> None:
        self._server, self._changed, self._followed = server, changed, dict[Key, str]()

    def follow(self, key: Key, pod_uid: str, address: str) -> None:
        if self._followed.get(key) != pod_uid:
            self._followed[key] = pod_uid
            if self.latest(key):
                self._changed(key)

    def forget(self, key: Key) -> None:
        self._followed.pop(key, None)

    def latest(self, key: Key) -> LiveProgress | None:
        for name, raw in self._server.pods.items():
            if raw["metadata"]["uid"] == self._followed.get(key) and name in self._server.answers:
                return LiveProgress(raw["metadata"]["uid"], self._server.answers[name])
        return None


class _RankProbe:
    """Answers from `server.answers`, at once."""

    def __init__(self, server: Server, changed: Callable[[Key], None]) -> None:
        self.answers: dict[Key, RankAnswers] = {}
        self._server, self._changed = server, changed

    def ask(self, key: Key, pods: Sequence[Pod], processes: int) -> None:
        states = tuple(ProcessState(pod.rank, 0, self._server.answers.get(pod.name)) for pod in pods)
        self.answers[key] = RankAnswers(self._server.now, frozenset(pod.uid for pod in pods), states)
        self._changed(key)

    def forget(self, key: Key) -> None:
        self.answers.pop(key, None)

    def latest(self, key: Key) -> RankAnswers | None:
        return self.answers.get(key)


class _NodeWatch:
    """Silent are the suspects on the nodes in `server.silent`."""

    def __init__(self, server: Server) -> None:
        self._server, self._suspects = server, dict[Key, Sequence[Pod]]()

    def follow(self, key: Key, pods: Sequence[Pod]) -> None:
        self._suspects[key] = pods

    def silences(self, key: Key) -> dict[str, Silence]:
        silent = self._server.silent
        return {pod.uid: Silence(silent[pod.node], 10) for pod in self._suspects.get(key, ()) if pod.node in silent}


class _Events:
    def __init__(self, server: Server) -> None:
        self._server = server

    def send(self, run: Run, event: Event, now: str) -> None:
        self._server.events.append((event.kind, event.reason, event.message))


class _Inline(ThreadPoolExecutor):
    """Runs what it is given at once: no test depends on threads."""

    def submit(self, act: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        done: Future[None] = Future()
        try:
            act(*args, **kwargs)
        except Exception as error:  # noqa: BLE001 - as of a thread
            done.set_exception(error)
        else:
            done.set_result(None)
        return done


def _internal_errors() -> float:
    (family,) = metrics.RECONCILE_ERRORS.labels("internal").collect()
    return family.samples[0].value
