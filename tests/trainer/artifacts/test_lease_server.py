"""Two processes want one output in an object store; one of them is killed while it holds it."""

from __future__ import annotations

import subprocess
import sys

import pytest
from internvl_trainer.artifacts.storage import open_storage

pytestmark = [pytest.mark.integration, pytest.mark.slow]

TURNS = 4
# Counts without any lock but the lease: two writers at once would lose turns.
WRITER = f"""
import sys, time
from internvl_trainer.artifacts.fenced_storage import FencedStorage, kept_alive
from internvl_trainer.artifacts.lease_record import Owner
from internvl_trainer.artifacts.output_lease import OutputLease, Timing
from internvl_trainer.artifacts.storage import open_storage
from internvl_trainer.errors import UserError

uri, name = sys.argv[1:]
storage = open_storage(uri, field="spec.output")
timing = Timing(live=1.5, beat=0.2, grace=0.5, poll=0.05)
done = 0
while done < {TURNS}:
    lease = OutputLease(storage, Owner(name, name, "train", None, None), timing=timing, tell=lambda _: None)
    try:
        lease.acquire()
    except UserError as error:
        assert error.reason == "OutputInUse", error
        print("refused", flush=True)
        continue
    with kept_alive(lease, on_loss=lambda: None) as finish:
        fenced = FencedStorage(storage, lease)
        print("holds", flush=True)
        if name == "killed":
            time.sleep(60)
        count = int(fenced.read("count"))
        time.sleep(0.1)
        fenced.write("count", str(count + 1).encode())
        done += 1
        finish()
    time.sleep(0.05)
"""


def start(uri: str, name: str) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", WRITER, uri, name], stdout=subprocess.PIPE, text=True)


def test_two_processes_never_write_at_once(store: str) -> None:
    uri = f"{store}/run"
    storage = open_storage(uri, field="spec.output")
    storage.write("count", b"0")
    killed = start(uri, "killed")
    assert killed.stdout is not None
    assert killed.stdout.readline() == "holds\n"
    writers = [start(uri, name) for name in ("a", "b")]
    try:
        for writer in writers:
            assert writer.stdout is not None
            assert writer.stdout.readline() == "refused\n"
        killed.kill()
        for writer in writers:
            assert writer.communicate(timeout=60)[0].count("holds") == TURNS
            assert writer.returncode == 0
    finally:
        for process in (killed, *writers):
            process.kill()
            process.communicate()
    assert storage.read("count") == str(2 * TURNS).encode()
