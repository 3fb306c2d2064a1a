"""Object storage on loopback, as the trainer's tests use it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import boto3
import psutil
import pytest
from ivft_cluster.s3 import S3Server
from ivft_cluster.shell import wait_for

pytestmark = pytest.mark.integration

START_AND_DIE = """
import os, sys
from pathlib import Path
from ivft_cluster import daemons
from ivft_cluster.s3 import S3Server
from ivft_cluster.shell import wait_for
server = S3Server.on_loopback(Path(sys.argv[1]))
server.start()
print(wait_for("its process", lambda: daemons.find(server.member))[0].pid, flush=True)
os.kill(os.getpid(), 9)
"""


def test_objects_can_be_read_with_only_the_environment(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in s3_server.env.items():
        monkeypatch.setenv(name, value)
    s3 = boto3.Session().client("s3")
    s3.create_bucket(Bucket="round-trip")
    s3.put_object(Bucket="round-trip", Key="a/b", Body=b"hello", ChecksumAlgorithm="SHA256")
    assert s3.get_object(Bucket="round-trip", Key="a/b")["Body"].read() == b"hello"


def test_unknown_credentials_are_refused(s3_server: S3Server) -> None:
    s3 = s3_server.client(secret_key="wrong")
    with pytest.raises(s3.exceptions.ClientError, match="SignatureDoesNotMatch"):
        s3.list_buckets()


def test_objects_survive_a_restart(s3_server: S3Server) -> None:
    s3 = s3_server.client()
    s3.create_bucket(Bucket="restart")
    s3.put_object(Bucket="restart", Key="kept", Body=b"x" * 100_000)
    s3_server.stop()
    s3_server.start()
    s3_server.wait_ready()
    assert s3.head_object(Bucket="restart", Key="kept")["ContentLength"] == 100_000


def test_the_server_dies_with_a_killed_test_run(tmp_path: Path) -> None:
    package = Path(__file__).parent
    done = subprocess.run(
        [sys.executable, "-c", START_AND_DIE, tmp_path], cwd=package, stdout=subprocess.PIPE, text=True
    )
    server = int(done.stdout)
    wait_for("the server is gone", lambda: not psutil.pid_exists(server), timeout=20)
