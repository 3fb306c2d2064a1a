"""Compare the cached runs with a fresh list periodically, over a connection of its own.

kopf's watch may miss changes (a deletion during a reconnect, a stream that ended silently). Resync adds them; when the
watch keeps missing changes, the liveness probe fails.
"""

import logging
import threading
import time
from collections.abc import Callable
from typing import Any

from internvl_api.constants import KIND

from internvl_operator import metrics
from internvl_operator.core.run import Key
from internvl_operator.kube.cache import RunCache, number
from internvl_operator.kube.client import Api, ApiError, list_path

_TOO_OFTEN = 3  # comparisons in a row with a missed change; a single one may just be earlier than the watch

logger = logging.getLogger(__name__)


class Resync:
    """A thread that compares all runs every `interval` seconds."""

    def __init__(
        self,
        api: Api,
        runs: RunCache,
        namespace: str | None,
        *,
        seen: Callable[[dict[str, Any]], bool],
        gone: Callable[[Key, str], None],
        interval: float,
    ) -> None:
        self._api, self._runs, self._namespace = api, runs, namespace
        self._seen, self._gone, self._interval = seen, gone, interval
        self._stopping = threading.Event()
        self._finds_in_a_row = self._reached = 0
        self._thread = threading.Thread(target=self._run, name=f"resync-{namespace or 'all'}", daemon=True)

    def start(self) -> None:
        """Start; the first comparison comes after one interval, because kopf lists at start."""
        self._thread.start()

    def stop(self) -> None:
        """Stop comparing."""
        self._stopping.set()

    def problem(self) -> str | None:
        """Why the process should be restarted; else None."""
        if self._finds_in_a_row < _TOO_OFTEN:
            return None
        return f"the watch of {KIND} has missed changes {self._finds_in_a_row} times in a row"

    def compare(self) -> int:
        """Compare once; the number of runs that were out of date. Raises ApiError."""
        known = self._runs.uids()
        found, missed = set(), 0
        for page in self._api.list_pages(list_path(KIND, self._namespace)):
            self._notice_restore(page["metadata"].get("resourceVersion", ""))
            for raw in page["items"]:
                found.add(raw["metadata"]["uid"])
                missed += self._seen(raw)
        for key, uid in known.items():
            if uid not in found and self._namespace in (None, key.namespace):
                self._gone(key, uid)
                missed += 1
        return missed

    def _notice_restore(self, version: str) -> None:
        """Forget all runs when a list is older than an earlier one."""
        position = number(version)
        if position < self._reached:
            logger.warning("the list of runs is older than before: the server was restored; forgetting what is cached")
            self._runs.restored(self._namespace)
        self._reached = position

    def _run(self) -> None:
        while not self._stopping.wait(self._interval):
            began = time.monotonic()
            try:
                missed = self.compare()
            except ApiError as error:
                logger.warning("cannot list runs: %s; retrying at the next interval", error)
                continue
            self._finds_in_a_row = self._finds_in_a_row + 1 if missed else 0
            metrics.RESYNC_MISSED.labels(KIND).inc(missed)
            if missed:
                logger.warning("resync found %d runs out of date (in %.1f s)", missed, time.monotonic() - began)
