"""Serve GET /metrics; with a Secret's folder over TLS, to clients that send its token.

A token of its own needs no right to review tokens and access, which are cluster-wide rights that an operator of single
namespaces does not have.
"""

import hmac
import logging
from pathlib import Path

from prometheus_client import REGISTRY
from prometheus_client.exposition import choose_encoder

from internvl_operator.http_server import Handler, Server, TlsFolder

TOKEN = "token"  # name of the file
logger = logging.getLogger(__name__)


def serve(port: int, secret: Path | None = None) -> Server:
    """Start answering; `secret`: a folder with tls.crt, tls.key and token. Raises OSError when a part is unusable."""
    if secret is not None and not _token(secret):
        raise OSError(f"{secret / TOKEN}: found an empty file, expected the token that Prometheus sends")

    class _Metrics(Handler):
        def do_GET(self) -> None:
            if self.path.partition("?")[0] not in ("/", "/metrics"):
                return self.answer(404, b"GET /metrics\n")
            if secret is not None and not _authorized(self.headers.get("Authorization"), secret):
                return self.answer(401, b"send Authorization: Bearer with the token of the metrics Secret\n")
            encoder, content_type = choose_encoder(self.headers.get("Accept", ""))
            return self.answer(200, encoder(REGISTRY), content_type)

    return Server(port, _Metrics, name="metrics", tls=TlsFolder(secret).context if secret else None).start()


def _authorized(header: str | None, secret: Path) -> bool:
    scheme, _, given = (header or "").partition(" ")
    try:
        wanted = _token(secret)  # read anew: the kubelet renews the file when the Secret changes
    except OSError as error:
        logger.warning("cannot read the token of /metrics: %s; refusing the request", error)
        return False
    given_bytes = given.strip().encode("utf-8", "surrogateescape")
    return bool(wanted) and scheme.lower() == "bearer" and hmac.compare_digest(given_bytes, wanted)


def _token(secret: Path) -> bytes:
    return (secret / TOKEN).read_bytes().strip()
