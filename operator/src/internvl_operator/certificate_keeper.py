"""Keep the webhook's certificate: the leader makes and renews it in a Secret, and every replica serves that Secret.

API servers must trust a CA before a replica serves its certificate. So the leader first adds the new CA to the
webhook's configuration, waits `_PROPAGATION`, and only then writes the Secret. The old CA stays trusted until it
expires, because other replicas read the Secret later; this is safe, because its key no longer exists.
"""

import logging
import ssl
import tempfile
import threading
import time
from collections.abc import Callable
from datetime import datetime, timedelta
from pathlib import Path
from typing import NamedTuple, Protocol

from internvl_operator import metrics
from internvl_operator.certificates import Served, expiry, issue, renewal_due, trusted, unusable
from internvl_operator.clock import utc_now
from internvl_operator.kube.client import ApiError
from internvl_operator.kube.webhook_objects import Stored

_PROPAGATION = timedelta(seconds=60)  # until every API server has seen a changed configuration
_CHECK_EVERY = 30.0  # seconds between two reads of the Secret
_RETRY_EVERY = 2.0  # seconds between two reads while there is no certificate

logger = logging.getLogger(__name__)


class Objects(Protocol):
    """What the keeper needs of `kube.webhook_objects.WebhookObjects`."""

    def may_write(self) -> bool: ...
    def read(self) -> Stored: ...
    def write(self, before: Stored, served: Served) -> Stored: ...
    def trust(self, authorities: bytes) -> str | None: ...


class _Successor(NamedTuple):
    """The next certificate; `since`: when its CA was added to the webhook's configuration."""

    served: Served
    since: datetime


class CertificateKeeper:
    """Gives the TLS context for each connection, once `start` has been called."""

    def __init__(self, objects: Objects, host: str, now: Callable[[], datetime] = utc_now) -> None:
        self._objects, self._host, self._now = objects, host, now
        self._loaded: Served | None = None
        self._context: ssl.SSLContext | None = None
        self._successor: _Successor | None = None
        self._problems: list[str] = []  # of the last pass
        self._thread = threading.Thread(target=self._run, name="certificate", daemon=True)

    def start(self) -> None:
        """Start the thread that checks the certificate."""
        self._thread.start()

    def context(self) -> ssl.SSLContext:
        """The TLS context to serve. Raises OSError while there is no certificate."""
        if self._context is None:
            raise OSError("the webhook has no certificate yet")
        return self._context

    def not_ready(self) -> str | None:
        """Why this replica cannot answer the API server; None when it can."""
        return None if self._context else "; ".join(["the webhook has no certificate yet", *self._problems])

    def problem(self) -> str | None:
        """Why the process should be restarted; else None."""
        return None if self._thread.is_alive() else "the thread that renews the webhook's certificate has ended"

    def check(self) -> list[str]:
        """Serve the Secret's certificate, renewed first if this replica leads and it is due; returns the problems."""
        problems: list[str] = []
        try:
            stored = self._objects.read()
            wrong = self._serve(stored.served)
            if self._objects.may_write():
                wrong = self._serve(self._maintain(stored, problems).served)
            else:
                self._successor = None
            problems += [wrong] if wrong else []
        except (ApiError, OSError) as error:
            problems.append(str(error))
        for problem in set(problems) - set(self._problems):  # once while it lasts
            logger.warning("the webhook's certificate: %s; trying again every %.0f s", problem, self._pause())
        self._problems = problems
        return problems

    def _maintain(self, stored: Stored, problems: list[str]) -> Stored:
        """What the Secret holds after a renewal, if one was due; adds to `problems`."""
        served, now = stored.served, self._now()
        why, new = unusable(served, self._host, now), None
        if why:
            logger.info("making a new certificate for the webhook: %s", why)
            new = _Successor(issue(self._host, now), now)
        elif renewal_due(served, now):
            new = self._successor or _Successor(issue(self._host, now), now)
        authorities = trusted(now, new.served.authorities if new else b"", served.authorities)
        if problem := self._objects.trust(authorities):
            problems.append(problem)
        self._successor = new
        if new is None or not (why or now >= new.since + _PROPAGATION):
            return stored
        written = self._objects.write(stored, new.served._replace(authorities=authorities))
        self._successor = None
        return written

    def _serve(self, served: Served) -> str | None:
        """Load the certificate unless it is loaded; returns why it cannot be used, or None."""
        if self._loaded and served[1:] == self._loaded[1:]:
            return None
        if why := unusable(served, self._host, self._now()):
            return why
        self._context, self._loaded = _load(served), served
        metrics.CERTIFICATE_EXPIRY.set(expiry(served.certificate).timestamp())
        logger.info("serving the webhook with a certificate that expires on %s", expiry(served.certificate).date())
        return None

    def _run(self) -> None:
        while True:
            self.check()
            time.sleep(self._pause())

    def _pause(self) -> float:
        return _CHECK_EVERY if self._context else _RETRY_EVERY


def _load(served: Served) -> ssl.SSLContext:
    """A TLS context with this certificate. Raises OSError."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    with tempfile.TemporaryDirectory() as folder:  # the ssl module reads keys only from files
        file = Path(folder, "tls.pem")
        file.touch(mode=0o600)
        file.write_bytes(served.key + served.certificate)
        context.load_cert_chain(file)
    return context
