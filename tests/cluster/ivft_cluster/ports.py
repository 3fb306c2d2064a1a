"""Free ports on loopback."""

from __future__ import annotations

import contextlib
import random
import socket


def free_ports(count: int) -> list[int]:
    """`count` different unused TCP ports below 32768, so that no outgoing connection takes one."""
    found: list[int] = []
    with contextlib.ExitStack() as stack:
        for port in _candidates():
            probe = stack.enter_context(socket.socket())
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            found.append(port)
            if len(found) == count:
                break
    return found


def _candidates() -> list[int]:
    return random.SystemRandom().sample(range(20000, 32000), 2000)
