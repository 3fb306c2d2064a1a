"""Send one GET to a pod. The deadline covers the whole exchange, whatever pace the pod answers at."""

import ipaddress
import logging
import socket
import time

DEADLINE = 2.0  # seconds from the first packet to the last byte
BODY_LIMIT = 64 * 1024  # bytes
_HEAD_LIMIT = 8 * 1024

logger = logging.getLogger(__name__)


def get(address: str, port: int, path: str, *, deadline: float = DEADLINE) -> bytes | None:
    """The body of a 200 answer; None without a whole one of at most 64 KiB within `deadline` seconds.

    Each request has its own connection: a pod keeps none open. HTTP/1.0 keeps servers from sending chunks.
    """
    ends = time.monotonic() + deadline
    try:
        host = str(ipaddress.ip_address(address))
        with socket.create_connection((host, port), timeout=deadline) as connection:
            shown = f"[{host}]" if ":" in host else host
            connection.sendall(f"GET {path} HTTP/1.0\r\nHost: {shown}:{port}\r\nAccept: */*\r\n\r\n".encode())
            answer = _read(connection, ends)
    except (OSError, ValueError) as error:
        logger.debug("no answer from http://%s:%d%s: %s", address, port, path, error)
        return None
    head, found, body = answer.partition(b"\r\n\r\n")
    return body if found and _is_ok(head) and len(body) <= BODY_LIMIT else None


def _read(connection: socket.socket, ends: float) -> bytes:
    """Everything until the pod closes. Raises TimeoutError at the deadline, ValueError above the limit."""
    parts: list[bytes] = []
    size = 0
    while True:
        left = ends - time.monotonic()
        if left <= 0:
            raise TimeoutError("the answer is not complete at the deadline")
        connection.settimeout(left)
        part = connection.recv(16 * 1024)
        if not part:
            return b"".join(parts)
        parts.append(part)
        size += len(part)
        if size > _HEAD_LIMIT + BODY_LIMIT:
            raise ValueError(f"the answer is longer than {BODY_LIMIT} bytes")


def _is_ok(head: bytes) -> bool:
    version, _, status = head.split(b"\r\n", 1)[0].partition(b" ")
    return version.startswith(b"HTTP/1.") and status[:3] == b"200"
