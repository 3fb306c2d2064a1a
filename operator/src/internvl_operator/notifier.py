"""Send notices to webhooks, from threads of their own: a receiver that is slow or gone delays no pass."""

import logging
import re
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from internvl_api.status import InternVLFineTuneStatus

from internvl_operator import metrics
from internvl_operator.core.notices import FORMS, GIVE_UP_AFTER, Form, body
from internvl_operator.core.run import Key, Run
from internvl_operator.work_queue import WorkQueue, doubling

_TIMEOUT = 10.0  # seconds of one request
_FIRST_RETRY, _LONGEST_RETRY = 1.0, 300.0  # seconds
_MOST = 1000  # notices in memory; more are offered again later
_MOST_TARGETS = 10
_REMEMBERED = 10_000  # runs whose delivery is not in status yet, or which are gone
_URL = re.compile(r"https?://[^\s/@]+(/\S*)?")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Target:
    """A receiver. Its URL is a secret: no log and no message shows it."""

    name: str
    form: Form
    url: str = field(repr=False)


class _Delivery(NamedTuple):
    key: Key
    notice: str
    target: Target


class TargetsError(ValueError):
    """A file of receivers cannot be used; the message shows no URL."""


def read_targets(folder: Path) -> list[Target]:
    """The receivers in a folder with the files `cloudevents` and `slack`, one URL a line. Raises TargetsError."""
    found: list[Target] = []
    for form in FORMS:
        path = folder / form
        try:
            lines = path.read_text(encoding="utf-8").split() if path.exists() else []
        except (OSError, UnicodeDecodeError) as error:
            raise TargetsError(f"{path}: {type(error).__name__}; expected text with one URL a line") from None
        for number, line in enumerate(lines, 1):
            if len(line) > 2048 or _URL.fullmatch(line) is None:
                raise TargetsError(f"{path}:{number}: found no http:// or https:// URL (not shown: it is a secret)")
            found.append(Target(f"{form} {number}", form, line))
    if not 0 < len(found) <= _MOST_TARGETS:
        names = " or ".join(FORMS)
        raise TargetsError(f"{folder}: found {len(found)} URLs, expected 1 to {_MOST_TARGETS} in {names}")
    return found


class Notifier:
    """Accepts the open notices of runs and sends each to every target until it is taken."""

    def __init__(self, targets: Sequence[Target], *, threads: int = 4) -> None:
        self._targets = targets
        self._queue: WorkQueue[_Delivery] = WorkQueue()
        self._lock = threading.Lock()
        self._bodies: dict[_Delivery, tuple[str, bytes, float, int]] = {}  # type, body, end of patience, tries
        self._delivered: dict[Key, str] = {}
        self._done: Callable[[Key], object] = lambda _: None
        self._threads = [
            threading.Thread(target=self._queue.serve, args=(self._send,), name=f"notices-{n}", daemon=True)
            for n in range(threads if targets else 0)
        ]

    def start(self, done: Callable[[Key], object]) -> None:
        """Start sending; `done` is told of a run whose notice every receiver has taken."""
        self._done = done
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Start no more requests."""
        self._queue.close()

    def delivered(self, key: Key) -> str | None:
        """The id of the run's notice that every receiver has taken, if any."""
        return self._delivered.get(key)

    def offer(self, run: Run, status: InternVLFineTuneStatus) -> bool:
        """Send the open notice of a status, unless that is under way. Never blocks; False when the memory is full."""
        notice, key = status.notice, Key(run.namespace, run.name)
        if notice is None or self._delivered.get(key) == notice.id:
            return True
        patience = time.monotonic() + GIVE_UP_AFTER.total_seconds()
        with self._lock:
            wanted = [_Delivery(key, notice.id, target) for target in self._targets]
            if any(each in self._bodies for each in wanted):
                return True
            for each in [each for each in self._bodies if each.key == key]:  # a newer end replaces an open one
                del self._bodies[each]
            if len(self._bodies) + len(wanted) > _MOST:
                metrics.NOTICES.labels("dropped").inc()
                text = "%s/%s: its notice is offered again later: %d deliveries are pending, near the most allowed"
                logger.warning(text, *key, len(self._bodies))
                return False
            for each in wanted:
                content = body(each.target.form, run.namespace, run.name, run.uid, status)
                self._bodies[each] = (*content, patience, 0)
        for each in wanted:
            self._queue.add(each)
        return True

    def forget(self, key: Key) -> None:
        """Forget that the notice of a deleted run was delivered; open deliveries are still sent."""
        self._delivered.pop(key, None)

    def _send(self, delivery: _Delivery) -> None:
        with self._lock:
            kept = self._bodies.get(delivery)
        if kept is None:  # replaced by a newer one
            return
        content_type, data, patience, tries = kept
        problem = post(delivery.target.url, content_type, data)
        if problem is not None and time.monotonic() < patience:
            self._again(delivery, (content_type, data, patience, tries + 1), problem)
            return
        metrics.NOTICES.labels("given up" if problem else "sent").inc()
        if problem is not None:
            hours = GIVE_UP_AFTER.total_seconds() / 3600
            logger.error(
                "%s/%s: the webhook %s has accepted nothing for %.0f hours, so this notice is given up: %s",
                *delivery.key, delivery.target.name, hours, problem,
            )  # fmt: skip
        if self._is_last(delivery, given_up=problem is not None):
            self._done(delivery.key)

    def _is_last(self, delivery: _Delivery, *, given_up: bool) -> bool:
        """Drop what was sent or given up; True when every receiver has taken the notice now."""
        with self._lock:
            was_wanted = self._bodies.pop(delivery, None) is not None
            left = [each for each in self._bodies if each[:2] == delivery[:2]]
            for each in left if given_up else ():
                del self._bodies[each]
            if given_up or left or not was_wanted:
                return False
            self._delivered[delivery.key] = delivery.notice
            while len(self._delivered) > _REMEMBERED:
                del self._delivered[next(iter(self._delivered))]
            return True

    def _again(self, delivery: _Delivery, kept: tuple[str, bytes, float, int], problem: str) -> None:
        metrics.NOTICES.labels("failed").inc()
        tries = kept[-1]
        if tries == 1:
            logger.warning(
                "%s/%s: the webhook %s did not accept a notice: %s; trying again",
                *delivery.key, delivery.target.name, problem,
            )  # fmt: skip
        with self._lock:
            if delivery in self._bodies:
                self._bodies[delivery] = kept
        self._queue.add(delivery, after=doubling(_FIRST_RETRY, _LONGEST_RETRY, tries))


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: Any, **__: Any) -> None:
        return None  # a redirected POST would lose its body, and may lead into the cluster


_opener = urllib.request.build_opener(_NoRedirect)


def post(url: str, content_type: str, data: bytes) -> str | None:
    """None when the receiver answers 2xx; else what happened, without the URL."""
    request = urllib.request.Request(url, data, {"Content-Type": content_type, "User-Agent": "internvl-operator"})
    try:
        with _opener.open(request, timeout=_TIMEOUT) as answer:
            return None if 200 <= answer.status < 300 else f"HTTP {answer.status}"
    except urllib.error.HTTPError as error:
        error.close()
        return f"HTTP {error.code}"
    except Exception as error:  # noqa: BLE001  whatever a server's answer causes; the text may hold the URL
        reason = getattr(error, "reason", None)
        return type(reason if isinstance(reason, Exception) else error).__name__
