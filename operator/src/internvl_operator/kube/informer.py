"""Keep a cache up to date: one thread for each kind and namespace lists, watches, and relists periodically.

A watch may miss a change when a proxy or a server's cache loses an event; the next list finds it. Lists run between two
watches, so that no event arrives during a comparison.
"""

import logging
import random
import threading
import time
from collections.abc import Callable
from typing import Any, NamedTuple

from internvl_api.constants import LABEL_MANAGED_BY, MANAGED_BY

from internvl_operator import metrics
from internvl_operator.core.run import Key
from internvl_operator.kube.cache import Collection, number, pack, slim, unpack
from internvl_operator.kube.client import WATCH_MARGIN, Api, ApiError, list_path

SELECTOR = f"{LABEL_MANAGED_BY}={MANAGED_BY}"
_PAGES = {"ConfigMap": 50}  # objects of one answer: each may hold several hundred KB
_FIRST_PAUSE, _LONGEST_PAUSE = 0.2, 15.0  # seconds between attempts while the API server does not answer

logger = logging.getLogger(__name__)


class Choice(NamedTuple):
    """Which objects of a kind, by selectors of labels and fields.

    `keep` makes the smaller copy that is held until all pages of a list are read.
    """

    labels: str = ""
    fields: str = ""
    keep: Callable[[dict[str, Any]], dict[str, Any]] = slim


CHILDREN = Choice(labels=SELECTOR)


class Informer:
    """Keeps `collection` up to date with the children of one kind, and calls `changed` with the run each belongs to."""

    def __init__(
        self,
        api: Api,
        kind: str,
        namespace: str | None,
        collection: Collection[Any],
        changed: Callable[[Key], None],
        seconds: float,
        resync: float,
        choice: Choice = CHILDREN,
    ) -> None:
        """`seconds`: length of a watch; `resync`: longest time between two lists, whatever the watches reported."""
        self.kind, self.synced = kind, threading.Event()
        self._api, self._path, self._namespace = api, list_path(kind, namespace), namespace
        self._collection, self._changed, self._seconds, self._choice = collection, changed, seconds, choice
        self._stopping = threading.Event()
        self._version: str | None = None
        self._reached = 0  # the newest version that a list or a watch has reported
        self._resync, self._next_list = resync, 0.0
        self._heard = self._tried = time.monotonic()
        self._thread = threading.Thread(target=self._run, name=f"watch-{kind}-{namespace or 'all'}", daemon=True)

    def start(self) -> None:
        """Start; `synced` is set after the first list."""
        self._thread.start()

    def stop(self) -> None:
        """Stop at the next event or time-out. The thread is a daemon; nobody waits for it."""
        self._stopping.set()

    def silent_for(self) -> float:
        """Seconds since the API server last answered; a bookmark and the regular end of a watch count as answers."""
        return time.monotonic() - self._heard

    def problem(self) -> str | None:
        """Why the process should be restarted: the thread has neither succeeded nor failed for too long; else None."""
        idle = time.monotonic() - self._tried
        longest = 2 * (self._seconds + WATCH_MARGIN + self._api.timeout) + _LONGEST_PAUSE
        return f"the watch of {self.kind} has hung for {idle:.0f} s" if idle > longest else None

    def list_and_watch(self) -> None:
        """List when due, then watch once, until the server ends the stream. Raises ApiError."""
        left = self._next_list - time.monotonic()
        if self._version is None or left <= 0:
            self._list()
            left = self._next_list - time.monotonic()
        version, seconds = self._version or "", min(self._seconds, max(left, 1.0))
        labels, fields, _ = self._choice
        for event in self._api.watch(self._path, selector=labels, fields=fields, version=version, seconds=seconds):
            self._take(event["type"], event["object"])
            self._alive()
            if self._stopping.is_set():
                return
        self._alive()

    def _run(self) -> None:
        pause = _FIRST_PAUSE
        while not self._stopping.is_set():
            try:
                self.list_and_watch()
                pause = _FIRST_PAUSE
            except ApiError as error:
                if self._stopping.is_set():
                    return
                self._forget_if_expired(error)
                logger.warning("watch of %s: %s; retrying in %.1f s", self._path, error, pause)
                self._tried = time.monotonic()
                self._stopping.wait(pause * random.uniform(0.5, 1.0))
                pause = min(_LONGEST_PAUSE, pause * 2)
            except Exception:
                logger.exception("watch of %s failed; listing again in %.1f s", self._path, _LONGEST_PAUSE)
                self._version, self._tried = None, time.monotonic()
                self._stopping.wait(_LONGEST_PAUSE)

    def _list(self) -> None:
        passed, packed = number(self._version), []
        labels, fields, keep = self._choice
        pages = self._api.list_pages(self._path, selector=labels, fields=fields, page=_PAGES.get(self.kind, 500))
        for page in pages:  # one in memory at a time
            self._version = page["metadata"]["resourceVersion"]
            packed += [pack(keep(raw)) for raw in page["items"] or ()]
        raws, position = (unpack(each) for each in packed), number(self._version)
        restored = position < self._reached
        if restored:
            logger.warning("%s is older than before: the server was restored; forgetting what is cached", self._path)
            passed = 0
        self._reached = position
        changed, missed = self._collection.replaced(
            raws, position, within=self._namespace, passed=passed, restored=restored
        )
        for run in changed:
            self._changed(run)
        if missed:
            metrics.RESYNC_MISSED.labels(self.kind).inc(missed)
            logger.warning("relisting %s found %d changes that the watch had missed", self._path, missed)
        self._alive()
        # The first relist comes early by a random part, so that the lists of all kinds and replicas spread out.
        early = random.uniform(0, 0.5) if not self.synced.is_set() else 0.0
        self._next_list = time.monotonic() + self._resync * (1 - early)
        self.synced.set()

    def _take(self, kind: str, raw: dict[str, Any]) -> None:
        if kind == "ERROR":
            raise ApiError(raw.get("code", 0), raw.get("reason", ""), raw.get("message", ""))
        self._version = raw["metadata"]["resourceVersion"]
        self._reached = max(self._reached, number(self._version))
        if kind in ("ADDED", "MODIFIED"):
            run = self._collection.seen(raw)
        elif kind == "DELETED":
            run = self._collection.gone(raw)
        else:
            return  # BOOKMARK
        if run is not None:
            self._changed(run)

    def _forget_if_expired(self, error: ApiError) -> None:
        """Relist after a refusal, such as 410 Gone for an expired version; a lost connection needs no list."""
        if error.status:
            self._version = None

    def _alive(self) -> None:
        self._heard = self._tried = time.monotonic()
        metrics.WATCH_AGE.labels(self.kind).set_function(self.silent_for)
