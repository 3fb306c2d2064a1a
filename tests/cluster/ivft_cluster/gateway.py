"""Ports on this machine's loopback that lead into a cluster's network.

Run as `python -m ivft_cluster.gateway <pid> <port>=<host>:<port> …`: listens on 127.0.0.1, then moves into the network
namespace of process `pid` and connects from there. A listening socket stays in the network it was opened in.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import socket
import sys
from functools import partial

CLONE_NEWNET = 0x40000000
_running: set[asyncio.Task[None]] = set()


def enter_network(pid: int) -> None:
    """Move this thread into the network namespace of a process (setns(2)). Raises OSError."""
    handle = os.open(f"/proc/{pid}/ns/net", os.O_RDONLY)
    try:
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.setns(handle, CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), f"setns into the network of process {pid}")
    finally:
        os.close(handle)


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        while chunk := await reader.read(1 << 18):
            writer.write(chunk)
            await writer.drain()
        if writer.can_write_eof():
            writer.write_eof()


async def _forward(host: str, port: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    # asyncio itself holds tasks weakly: without this, a connection may be collected as garbage while it waits.
    task = asyncio.current_task()
    assert task
    _running.add(task)
    task.add_done_callback(_running.discard)
    try:
        far_reader, far_writer = await asyncio.open_connection(host, port)
    except OSError:
        writer.transport.abort()  # the caller sees a reset, as from a server that is not there
        return
    try:
        await asyncio.gather(_copy(reader, far_writer), _copy(far_reader, writer))
    finally:
        far_writer.close()
        writer.close()


async def serve(listeners: list[tuple[socket.socket, str, int]]) -> None:
    servers = [
        await asyncio.start_server(partial(_forward, host, port), sock=listener) for listener, host, port in listeners
    ]
    await asyncio.gather(*(server.serve_forever() for server in servers))


def main(pid: str, *routes: str) -> None:
    listeners = []
    for route in routes:
        near, far = route.split("=")
        host, port = far.rsplit(":", 1)
        listeners.append((socket.create_server(("127.0.0.1", int(near)), backlog=256), host, int(port)))
    enter_network(int(pid))
    asyncio.run(serve(listeners))


if __name__ == "__main__":
    main(*sys.argv[1:])
