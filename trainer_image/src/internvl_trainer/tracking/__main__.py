"""The reporting process: reads records from its standard input until its end, and sends them.

Its standard output has one line for each new problem. It alone waits for the tracker: the stage that started it writes
into a pipe, and kills it when it takes too long at the end.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from itertools import groupby
from typing import Any, TextIO

from internvl_trainer.errors import first_line
from internvl_trainer.signals import die_with_parent, ignore_stops
from internvl_trainer.tracking.clients import Client, open_client
from internvl_trainer.tracking.records import Metrics, Settings

MOST_RECORDS = 20_000  # kept while the tracker cannot be reached; of more, the oldest go
_GATHER_SECONDS = 1.0  # records of this time are sent together
_RETRY_SECONDS = 30.0


class Sender:
    """Keeps records until the tracker has taken them."""

    def __init__(self, settings: Settings, tell: Callable[[str], None], make: Callable[[Settings], Client]) -> None:
        self._settings, self._tell, self._make = settings, tell, make
        self._client: Client | None = None
        self._waiting: deque[dict[str, Any]] = deque(maxlen=MOST_RECORDS)
        self._not_before = 0.0

    def take(self, record: dict[str, Any]) -> None:
        """Keep a record; of too many, the oldest goes."""
        if len(self._waiting) == MOST_RECORDS:
            self._tell(f"more than {MOST_RECORDS} reports wait; the oldest are left out")
        self._waiting.append(record)

    def send(self, *, last: bool = False) -> bool:
        """Send everything that waits, unless that failed shortly before; False when it fails. `last`: try anyway."""
        if not self._waiting or (not last and time.monotonic() < self._not_before):
            return not self._waiting
        try:
            self._client = self._client or self._make(self._settings)
            while self._waiting:
                kind, records = next(iter(_in_groups(self._waiting)))
                _deliver(self._client, kind, records)
                for _ in records:
                    self._waiting.popleft()
        except Exception as error:  # noqa: BLE001  whatever a package raises
            self._not_before = time.monotonic() + _RETRY_SECONDS
            self._tell(first_line(error))
            return False
        return True


def _in_groups(records: deque[dict[str, Any]]) -> list[tuple[str, list[dict[str, Any]]]]:
    return [(kind, list(group)) for kind, group in groupby(records, key=lambda record: str(record["kind"]))]


def _deliver(client: Client, kind: str, records: list[dict[str, Any]]) -> None:
    if kind == "metrics":
        client.add([Metrics(each["step"], each["at"], each["values"]) for each in records])
    for each in records if kind != "metrics" else ():
        if kind == "about":
            client.describe(each["parameters"], each["tags"])
        elif kind == "result":
            client.conclude(each["scores"], each["addresses"])
        elif kind == "end":
            client.close(each["status"])


def run(source: TextIO, tell: Callable[[str], None], make: Callable[[Settings], Client] = open_client) -> int:
    """Send the records of `source`, whose first line has the settings; 1 when the last ones could not be sent."""
    sender = Sender(Settings.model_validate_json(source.readline()), tell, make)
    arrived: deque[str] = deque()
    ended = threading.Event()

    def read() -> None:
        for line in source:
            arrived.append(line)
            while len(arrived) > MOST_RECORDS:
                tell(f"more than {MOST_RECORDS} reports wait; the oldest are left out")
                arrived.popleft()
        ended.set()

    threading.Thread(target=read, name="records", daemon=True).start()
    while True:
        over = ended.wait(_GATHER_SECONDS)
        while arrived:
            sender.take(json.loads(arrived.popleft()))
        sent = sender.send(last=over)
        if over:
            return 0 if sent else 1


def main() -> int:
    """The exit code."""
    die_with_parent()
    ignore_stops()  # the stage decides when to end
    channel = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what a package prints is no message to the stage

    def tell(text: str) -> None:
        channel.write(text + "\n")
        channel.flush()

    return run(sys.stdin, tell)


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    os._exit(code)  # a package's threads and exit handlers may wait for its server
