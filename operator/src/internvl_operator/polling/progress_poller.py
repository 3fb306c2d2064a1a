"""Poll /progress of node rank 0 of every running group, at a bounded rate; missing answers are tolerated."""

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import urllib3
from internvl_api.constants import METRICS_PORT
from internvl_api.status import CheckpointStatus, Heartbeat, Progress
from pydantic import BaseModel, ConfigDict, ValidationError

from internvl_operator.core.observe import LiveProgress
from internvl_operator.core.run import Key
from internvl_operator.work_queue import WorkQueue

_TIMEOUT = urllib3.Timeout(connect=1.0, read=2.0)
_BODY_LIMIT = 64 * 1024
_LONGEST_INTERVAL = 60.0  # seconds between two requests to a pod that does not answer

logger = logging.getLogger(__name__)


class Answer(NamedTuple):
    """One training process's answer."""

    progress: Progress
    checkpoint: CheckpointStatus | None
    heartbeat: Heartbeat | None


class _Beside(BaseModel):
    """The fields beside those of Progress in the same body."""

    model_config = ConfigDict(extra="ignore")
    checkpoint: CheckpointStatus | None = None
    heartbeat: Heartbeat | None = None


@dataclass
class _Target:
    pod_uid: str
    address: str
    interval: float


class ProgressPoller:
    """Call `follow` or `forget` after every pass; `changed` is called when a run's progress changes."""

    def __init__(self, changed: Callable[[Key], None], *, interval: float, threads: int) -> None:
        self._changed, self._interval = changed, interval
        self._lock = threading.Lock()
        self._targets: dict[Key, _Target] = {}
        self._latest: dict[Key, LiveProgress] = {}
        self._queue: WorkQueue[Key] = WorkQueue()
        self._http = urllib3.PoolManager(num_pools=threads * 4, maxsize=1, retries=False)
        self._threads = [threading.Thread(target=self._run, name=f"progress-{n}", daemon=True) for n in range(threads)]

    def start(self) -> None:
        """Start polling."""
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Stop polling."""
        self._queue.close()

    def latest(self, key: Key) -> LiveProgress | None:
        """The run's last answer; None before the first."""
        with self._lock:
            return self._latest.get(key)

    def follow(self, key: Key, pod_uid: str, address: str) -> None:
        """Poll this pod from now on."""
        with self._lock:
            known = self._targets.get(key)
            if known and known.pod_uid == pod_uid:
                return
            self._targets[key] = _Target(pod_uid, address, self._interval)
        self._queue.add(key, after=self._interval)

    def forget(self, key: Key) -> None:
        """Stop polling for a run without a running pod."""
        with self._lock:
            self._targets.pop(key, None)
            self._latest.pop(key, None)

    def _run(self) -> None:
        while (key := self._queue.get()) is not None:
            try:
                self._ask(key)
            finally:
                self._queue.done(key)

    def _ask(self, key: Key) -> None:
        with self._lock:
            target = self._targets.get(key)
        if target is None:
            return
        answer = ask(self._http, target.address)
        found = LiveProgress(target.pod_uid, answer.progress, answer.checkpoint) if answer else None
        target.interval = self._interval if found else min(_LONGEST_INTERVAL, target.interval * 2)
        self._queue.add(key, after=target.interval)
        with self._lock:
            if found is None or self._targets.get(key) is not target or self._latest.get(key) == found:
                return
            self._latest[key] = found
        self._changed(key)


def ask(http: urllib3.PoolManager, address: str, local_rank: int = 0) -> Answer | None:
    """The answer of one process of a pod; None without a readable answer in time."""
    host = f"[{address}]" if ":" in address else address
    url = f"http://{host}:{METRICS_PORT + local_rank}/progress"
    body = _fetch(http, url)
    if body is None:
        return None
    try:
        progress, beside = Progress.model_validate_json(body), _Beside.model_validate_json(body)
    except ValidationError as error:
        logger.debug("no progress from %s: %s", url, error)
        return None
    return Answer(progress, beside.checkpoint, beside.heartbeat)


def _fetch(http: urllib3.PoolManager, url: str) -> bytes | None:
    """The body of an answer, cut at 64 KiB; None without a 200 answer in time."""
    try:
        response = http.request("GET", url, timeout=_TIMEOUT, redirect=False, preload_content=False)
        try:
            body: bytes = response.read(_BODY_LIMIT)
        finally:
            response.release_conn()
    except urllib3.exceptions.HTTPError as error:
        logger.debug("no answer from %s: %s", url, error)
        return None
    return body if response.status == 200 else None
