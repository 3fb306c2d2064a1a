"""Connect watches, queue and reconcile: every change of a run queues its key, and a thread makes the pass."""

import logging
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from internvl_api.status import InternVLFineTuneStatus
from internvl_api.validation.defaults import RunDefaults

from internvl_operator import metrics
from internvl_operator.clock import utc_now
from internvl_operator.core.notices import is_open
from internvl_operator.core.observe import Observed, Pod, owner, read_pod
from internvl_operator.core.plan import Event, Plan
from internvl_operator.core.policies.defaults_in_force import in_force
from internvl_operator.core.reconcile import child_refused, reconcile, rejected
from internvl_operator.core.resources.gang import GROUPS
from internvl_operator.core.run import Key, Run, read_run, read_status
from internvl_operator.core.timestamps import to_text
from internvl_operator.kube.applier import Applier
from internvl_operator.kube.cache import Collection, RawCollection, RunCache, key_of
from internvl_operator.kube.client import Api, ApiError
from internvl_operator.kube.event_recorder import EventRecorder
from internvl_operator.kube.informer import Informer
from internvl_operator.kube.name_conflicts import Adopted, Refused
from internvl_operator.kube.namespace_defaults import CHOICE, NamespaceDefaults
from internvl_operator.kube.node_lease import read_renewal
from internvl_operator.kube.resync import Resync
from internvl_operator.notifier import Notifier, read_targets
from internvl_operator.polling.node_watch import NodeWatch
from internvl_operator.polling.progress_poller import ProgressPoller
from internvl_operator.polling.rank_probe import RankProbe
from internvl_operator.resolved_specs import ResolvedSpecs
from internvl_operator.settings import Settings
from internvl_operator.work_queue import WorkQueue, doubling

_FIRST_RETRY, _LONGEST_RETRY = 0.2, 60.0  # seconds before a failed pass is tried again
_PATIENCE = 3  # failed passes in a row before the status shows the error of the API server
_LONGEST_PASS = 10  # times the request time-out; a longer pass hangs
# Seconds to collect further events of a run's children for the same pass: a group's pods start and end together, and
# a pass for each would write a status for each.
_GATHER = 0.1
_OFFER_AGAIN = 60.0  # seconds until a notice is offered again, for which there was no room
_LONGEST_GOODBYE = 5.0  # seconds to wait at the end of the process for passes in progress

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Parts:
    """The parts of a controller that have threads, sockets or a clock; the simulator in the tests replaces them."""

    queue: WorkQueue[Key]
    executor: Executor
    events: EventRecorder
    poller: ProgressPoller
    rank_probe: RankProbe
    node_watch: NodeWatch
    notifier: Notifier = field(default_factory=lambda: Notifier([]))
    now: Callable[[], datetime] = utc_now

    @classmethod
    def make(cls, settings: Settings, api: Api) -> "Parts":
        """The parts of a real operator; none of them is started."""
        queue: WorkQueue[Key] = WorkQueue()
        interval, threads = settings.progress_interval_seconds, settings.progress_threads
        return cls(
            queue=queue,
            executor=ThreadPoolExecutor(settings.worker_threads, thread_name_prefix="write"),
            events=EventRecorder(api),
            poller=ProgressPoller(queue.add, interval=interval, threads=threads),
            rank_probe=RankProbe(queue.add, threads=threads),
            node_watch=NodeWatch(queue.add, lambda node: read_renewal(api, node), threads=threads),
            notifier=Notifier(read_targets(settings.notifications) if settings.notifications else []),
        )


class Controller:
    """Everything that runs beside kopf's event loop; kopf's watch calls `run_seen` and `run_gone`."""

    def __init__(self, settings: Settings, api: Api, parts: Parts | None = None) -> None:
        parts = parts or Parts.make(settings, api)
        self._settings, self._config, self._now = settings, settings.operator_config(), parts.now
        self._queue, self._events, self._notifier = parts.queue, parts.events, parts.notifier
        self._poller, self._rank_probe, self._node_watch = parts.poller, parts.rank_probe, parts.node_watch
        self._runs, self._resolved = RunCache(), ResolvedSpecs()
        self._pods: Collection[Pod] = Collection(read_pod, _owner_name)
        self._services, self._config_maps = RawCollection(_owner_name), RawCollection(_owner_name)
        self._network_policies = RawCollection(_owner_name)
        self._defaults, self._of_cluster = NamespaceDefaults(), self._config.defaults.to_yaml()
        self._pod_groups = {GROUPS[scheduler]: RawCollection(_owner_name) for scheduler in settings.gang_schedulers}
        self._failures: dict[Key, int] = {}
        self._warned: set[Key] = set()  # runs with an Event about their failures in a row
        self._started: dict[int, float] = {}  # thread -> when its pass began
        self._applier = Applier(api, self._runs, dict(self._collections()), parts.executor)
        self.informers = [
            Informer(
                api,
                kind,
                namespace,
                collection,
                self._child_changed,
                settings.watch_timeout_seconds,
                settings.resync_seconds,
            )
            for namespace in settings.namespaces or (None,)
            for kind, collection in self._collections()
        ] + [
            Informer(
                api,
                "ConfigMap",
                namespace,
                self._defaults,
                self._defaults_changed,
                settings.watch_timeout_seconds,
                settings.resync_seconds,
                CHOICE,
            )
            for namespace in settings.namespaces or (None,)
        ]
        self._resyncs = [
            Resync(
                api,
                self._runs,
                namespace,
                seen=self.run_seen,
                gone=self._forget,
                interval=settings.resync_seconds,
            )
            for namespace in settings.namespaces or (None,)
        ]
        self._workers = [
            threading.Thread(target=self._work, name=f"reconcile-{n}", daemon=True)
            for n in range(settings.worker_threads)
        ]

    def start(self) -> None:
        """Start, and return once all children are known: an earlier pass would take them for lost."""
        for informer in self.informers:
            informer.start()
        for informer in self.informers:
            if informer.kind not in self._pod_groups:  # applying an existing PodGroup again is harmless
                informer.synced.wait()
        metrics.QUEUE_DEPTH.set_function(lambda: len(self._queue))
        metrics.publish_runs(self._statuses)
        self._events.start()
        self._notifier.start(self._queue.add)
        self._poller.start()
        self._rank_probe.start()
        self._node_watch.start()
        for resync in self._resyncs:
            resync.start()
        for worker in self._workers:
            worker.start()
        logger.info("caches are filled: %d pods", len(self._pods))

    def stop(self) -> bool:
        """Start no more passes; True when those in progress have ended. Cutting one off is harmless."""
        self._queue.close()
        self._poller.stop()
        self._notifier.stop()
        self._rank_probe.stop()
        self._node_watch.stop()
        for informer in self.informers:
            informer.stop()
        for resync in self._resyncs:
            resync.stop()
        deadline = time.monotonic() + _LONGEST_GOODBYE
        for worker in self._workers:
            worker.join(timeout=max(0.0, deadline - time.monotonic()))
        return not any(worker.is_alive() for worker in self._workers)

    def run_seen(self, raw: dict[str, Any]) -> bool:
        """Take in a listed, created or changed custom resource; True when it was newer than the cached one."""
        news = self._runs.seen(raw)
        if news:
            self.request(key_of(raw))
        return news

    def run_gone(self, raw: dict[str, Any]) -> None:
        """Forget a deleted custom resource; Kubernetes deletes its children."""
        self._forget(key_of(raw), raw["metadata"]["uid"])

    def request(self, key: Key) -> None:
        """Make a pass over the run as soon as a thread is free."""
        self._queue.add(key)

    def _child_changed(self, key: Key) -> None:
        self._queue.add(key, after=_GATHER)

    def _defaults_changed(self, of: Key) -> None:
        for key in self._runs.uids():
            if key.namespace == of.namespace:
                self._queue.add(key, after=_GATHER)

    def problems(self) -> list[str]:
        """Problems that a restart would fix; empty in normal operation."""
        threads = [informer.problem() for informer in self.informers] + [resync.problem() for resync in self._resyncs]
        now, longest = time.monotonic(), _LONGEST_PASS * self._settings.request_timeout_seconds
        passes = [now - began for began in list(self._started.values())]
        ended = [worker.name for worker in self._workers if worker.ident is not None and not worker.is_alive()]
        return [
            *(problem for problem in threads if problem),
            *(f"a pass has taken {taken:.0f} s" for taken in passes if taken > longest),
            *(f"the thread {name} has ended" for name in ended),
        ]

    def step(self) -> bool:
        """Wait for the next key and make its pass; False once stopped."""
        key = self._queue.get()
        if key is None:
            return False
        self._started[threading.get_ident()] = time.monotonic()
        try:
            with metrics.RECONCILE_SECONDS.time():
                self._pass(key)
            self._succeeded(key)
        except (ApiError, Refused) as error:
            self._again(key, "refused" if isinstance(error, Refused) else "api", str(error))
        except Exception:
            logger.exception("%s/%s: unexpected error in a pass", *key)
            self._again(key, "internal", "unexpected error, logged above")
        finally:
            self._started.pop(threading.get_ident(), None)
            self._queue.done(key)
        return True

    def _work(self) -> None:
        while self.step():
            pass

    def _pass(self, key: Key) -> None:
        raw = self._runs.get(key)
        if raw is None:
            return
        config, now, observed = self._config, self._now(), self._observe(key)
        defaults = self._defaults_of(key, raw["metadata"]["uid"], observed)
        run = read_run(raw, self._resolved.get, config.policy, config.gpu_memory, defaults, config.profile_gpus)
        plan = reconcile(run, observed, now, self._config)
        try:
            made = self._applier.carry_out(run, plan)
        except Adopted as adopted:
            self._events.send(run, Event("Normal", "Adopted", str(adopted)), to_text(now))
            self._queue.add(key)
            return
        except Refused as error:
            problem = error.reason, error.message
            self._explain(run, problem, child_refused(run, plan, self._observe(key), problem, now, self._config), now)
            raise
        except ApiError as error:
            if error.gone and not run.deleting:
                return self._vanished(key, run, error)
            text = f"the API server refuses a write: {error}"
            if error.refused:  # only a change of the run or of its CRD can help
                self._warn(run, "ApiServerError", text, now)
            if error.status and self._failures.get(key, 0) >= _PATIENCE:
                problem = "ApiServerError", text
                self._explain(run, problem, rejected(run, *problem, now, self._config), now)
            raise
        self._tell(run, plan, now, made)
        self._follow(key, run, plan, observed)
        if plan.probe:
            self._rank_probe.ask(key, plan.probe, run.spec.processes_per_worker)
        if plan.requeue_after is not None:
            self._queue.add(key, after=plan.requeue_after)

    def _explain(self, run: Run, problem: tuple[str, str], answer: Plan, now: datetime) -> None:
        """Write into status why the run does not proceed; `problem`: reason and message."""
        try:
            self._applier.carry_out(run, answer)
        except ApiError:
            self._warn(run, *problem, now)
            raise
        self._tell(run, answer, now, made=0)

    def _warn(self, run: Run, reason: str, message: str, now: datetime) -> None:
        """Send one Event for failures in a row, where no status can be written."""
        key = Key(run.namespace, run.name)
        if key not in self._warned:
            self._warned.add(key)
            mistake = f"{run.mistake}; " if run.mistake else ""
            self._events.send(run, Event("Warning", reason, mistake + message), to_text(now))

    def _defaults_of(self, key: Key, uid: str, observed: Observed) -> Callable[[InternVLFineTuneStatus], RunDefaults]:
        today = RunDefaults(self._defaults.text(key.namespace), self._of_cluster, run=f"{key.namespace}/{key.name}")
        own = [pod for pod in observed.pods if pod.owner_uid == uid]
        return lambda status: in_force(today, status, own)

    def _observe(self, key: Key) -> Observed:
        return Observed(
            pods=tuple(sorted(self._pods.of(key), key=lambda pod: (pod.stage, pod.rank, pod.uid))),
            services={raw["metadata"]["name"]: raw for raw in self._services.of(key)},
            config_maps={raw["metadata"]["name"]: raw for raw in self._config_maps.of(key)},
            network_policies={raw["metadata"]["name"]: raw for raw in self._network_policies.of(key)},
            pod_groups={raw["metadata"]["name"]: raw for groups in self._pod_groups.values() for raw in groups.of(key)},
            live=self._poller.latest(key),
            rank_answers=self._rank_probe.latest(key),
            silences=self._node_watch.silences(key),
            delivered_notice=self._notifier.delivered(key),
        )

    def _tell(self, run: Run, plan: Plan, now: datetime, made: int) -> None:
        """Send the Events of this pass and count its metrics."""
        if plan.status is None:
            return
        before = run.status
        if is_open(plan.status.notice, now):
            self._notify(run, plan.status)
        for event in plan.events:
            logger.info("%s/%s: %s: %s", run.namespace, run.name, event.reason, event.message)
            self._events.send(run, event, to_text(now))
        for cause in ("user", "infrastructure"):
            more = getattr(plan.status.restarts, cause) - getattr(before.restarts, cause)
            metrics.RESTARTS.labels(cause).inc(max(0, more))
        if made and before.observed_generation is None and run.created:  # else the first pod waited for a user
            metrics.FIRST_POD_SECONDS.observe(max(0.0, (self._now() - run.created).total_seconds()))

    def _notify(self, run: Run, status: InternVLFineTuneStatus) -> None:
        if not self._notifier.offer(run, status):
            self._queue.add(Key(run.namespace, run.name), after=_OFFER_AGAIN)

    def _follow(self, key: Key, run: Run, plan: Plan, observed: Observed) -> None:
        self._node_watch.follow(key, plan.suspects)
        current = (plan.status.stage, plan.status.attempt, 0) if plan.status else None
        for pod in observed.pods:
            mine = pod.owner_uid == run.uid and (pod.stage, pod.attempt, pod.rank) == current
            if mine and pod.running and pod.ip:
                return self._poller.follow(key, pod.uid, pod.ip)
        self._poller.forget(key)
        self._rank_probe.forget(key)

    def _again(self, key: Key, cause: str, message: str) -> None:
        metrics.RECONCILE_ERRORS.labels(cause).inc()
        failures = self._failures[key] = self._failures.get(key, 0) + 1
        delay = doubling(_FIRST_RETRY, _LONGEST_RETRY, failures)
        logger.warning("%s/%s: %s; retrying in %.1f s", key.namespace, key.name, message, delay)
        self._queue.add(key, after=delay)

    def _vanished(self, key: Key, run: Run, error: ApiError) -> None:
        logger.info("%s/%s was deleted: %s", key.namespace, key.name, error.message)
        self._forget(key, run.uid)

    def _forget(self, key: Key, uid: str) -> None:
        self._runs.gone(key, uid)
        self._applier.forget(uid)
        self._poller.forget(key)
        self._rank_probe.forget(key)
        self._notifier.forget(key)
        self._node_watch.follow(key, ())
        self._succeeded(key)

    def _succeeded(self, key: Key) -> None:
        self._failures.pop(key, None)
        self._warned.discard(key)

    def _statuses(self) -> Iterator[tuple[str, str, InternVLFineTuneStatus]]:
        for raw in self._runs.all():
            yield raw["metadata"]["namespace"], raw["metadata"]["name"], read_status(raw.get("status") or {})

    def _collections(self) -> tuple[tuple[str, Collection[Any]], ...]:
        always = ("Pod", self._pods), ("Service", self._services), ("ConfigMap", self._config_maps)
        policies = [("NetworkPolicy", self._network_policies)] if self._config.network_policy_peers is not None else []
        return *always, *policies, *self._pod_groups.items()


def _owner_name(raw: dict[str, Any]) -> str | None:
    found = owner(raw)
    return found[0] if found else None
