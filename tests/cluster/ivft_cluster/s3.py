"""Object storage: SeaweedFS with one S3 identity; its keys are generated at start."""

from __future__ import annotations

import json
import secrets
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import boto3
from botocore.client import Config

from ivft_cluster import daemons
from ivft_cluster.ports import free_ports
from ivft_cluster.releases import binary
from ivft_cluster.shell import tail, wait_for

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

REGION = "us-east-1"


@dataclass(frozen=True)
class Credentials:
    """The only identity of an S3 server, with all rights."""

    access_key: str
    secret_key: str

    @classmethod
    def make(cls) -> Credentials:
        return cls(f"TEST{secrets.token_hex(8).upper()}", secrets.token_urlsafe(30))


@dataclass(frozen=True)
class S3Server:
    """`weed server -s3` in `state` on `address`:`port`; `endpoint` is where this process reaches it."""

    member: str
    state: Path
    credentials: Credentials
    address: str
    port: int
    endpoint: str
    inner_ports: tuple[int, ...] = (9333, 8080, 8888, 19333, 18080, 18888, 18333)
    netns: tuple[str, ...] = ()
    die_with_parent: bool = False

    @classmethod
    def on_loopback(cls, state: Path) -> S3Server:
        """A server for this process alone, on free ports; it dies with the process (start it from the main thread)."""
        member = f"s3-{secrets.token_hex(4)}/s3"
        port, *inner = free_ports(8)
        endpoint = f"http://127.0.0.1:{port}"
        return cls(member, state, Credentials.make(), "127.0.0.1", port, endpoint, tuple(inner), die_with_parent=True)

    @property
    def env(self) -> dict[str, str]:
        """Environment variables for boto3, the AWS tools and the trainer."""
        return {
            "AWS_ACCESS_KEY_ID": self.credentials.access_key,
            "AWS_SECRET_ACCESS_KEY": self.credentials.secret_key,
            "AWS_DEFAULT_REGION": REGION,
            "AWS_ENDPOINT_URL_S3": self.endpoint,
        }

    def client(self, *, endpoint: str | None = None, secret_key: str | None = None, **options: Any) -> S3Client:
        """A boto3 client; `options` are botocore's Config. `endpoint` is another way to reach the same server."""
        return boto3.client(
            "s3",
            endpoint_url=endpoint or self.endpoint,
            aws_access_key_id=self.credentials.access_key,
            aws_secret_access_key=secret_key or self.credentials.secret_key,
            region_name=REGION,
            config=Config(signature_version="s3v4", s3={"addressing_style": "path"}, **options),
        )

    def start(self) -> None:
        data = self.state / "data"
        data.mkdir(parents=True, exist_ok=True)
        identity = {
            "name": "test",
            "credentials": [{"accessKey": self.credentials.access_key, "secretKey": self.credentials.secret_key}],
            "actions": ["Admin", "Read", "Write", "List", "Tagging"],
        }
        config = self.state / "identities.json"
        config.touch(mode=0o600)
        config.write_text(json.dumps({"identities": [identity]}))
        master, volume, filer, *grpc = self.inner_ports
        daemons.start(
            self.member,
            [
                *self.netns,
                binary("weed"),
                "-logtostderr=true",
                "server",
                f"-dir={data}",
                f"-ip={self.address}",
                f"-ip.bind={self.address}",
                f"-master.port={master}",
                f"-master.port.grpc={grpc[0]}",
                "-master.telemetry=false",
                "-master.electionTimeout=1s",  # there is no other master to wait for after a restart
                "-master.volumeSizeLimitMB=1024",
                f"-volume.port={volume}",
                f"-volume.port.grpc={grpc[1]}",
                "-volume.max=200",
                f"-filer.port={filer}",
                f"-filer.port.grpc={grpc[2]}",
                f"-filer.localSocket={self.state / 'filer.sock'}",
                "-s3",
                f"-s3.port={self.port}",
                f"-s3.port.grpc={grpc[3]}",
                "-s3.port.iceberg=0",
                "-s3.port.lance=0",
                f"-s3.localSocket={self.state / 's3.sock'}",
                f"-s3.config={config}",
            ],
            self.state / "s3.log",
            die_with_parent=self.die_with_parent,
        )

    def wait_ready(self) -> None:
        """Ready when a bucket can be listed and an object written: the gateway answers before its volumes do."""

        def works() -> bool:
            client = self.client(retries={"max_attempts": 1}, connect_timeout=2, read_timeout=10)
            if "ready-probe" not in {bucket["Name"] for bucket in client.list_buckets()["Buckets"]}:
                client.create_bucket(Bucket="ready-probe")
            client.put_object(Bucket="ready-probe", Key="probe", Body=b"ready")
            client.delete_object(Bucket="ready-probe", Key="probe")
            client.delete_bucket(Bucket="ready-probe")
            return True

        wait_for(
            "object storage is ready", works, timeout=60, every=0.2, on_timeout=lambda: tail(self.state / "s3.log")
        )

    def pause(self) -> None:
        """Stop answering but keep every connection open (SIGSTOP)."""
        for process in daemons.find(self.member):
            process.suspend()

    def resume(self) -> None:
        for process in daemons.find(self.member):
            process.resume()

    def stop(self) -> None:
        """Kill the server and keep its data. (SeaweedFS handles SIGTERM slowly.)"""
        daemons.kill(daemons.find(self.member))

    def delete(self) -> None:
        self.stop()
        shutil.rmtree(self.state, ignore_errors=True)
