"""Which addresses the trainer connects to."""

from __future__ import annotations

import socket
from typing import Any

import pytest
from internvl_trainer.artifacts import https
from internvl_trainer.artifacts.checked_connection import ENV_ALLOW_PRIVATE, CheckedConnection, refusal
from internvl_trainer.errors import UserError

ALWAYS = [
    "169.254.169.254", "fe80::1", "::ffff:169.254.169.254", "64:ff9b::a9fe:a9fe", "2002:a9fe:a9fe::", "0.0.0.0", "::",
]  # fmt: skip
PRIVATE = [
    "127.0.0.1", "::1", "10.96.0.1", "192.168.1.1", "172.16.0.1", "100.64.0.1", "fd00:ec2::254", "::ffff:10.0.0.1",
]  # fmt: skip


@pytest.mark.parametrize("address", [*ALWAYS, *PRIVATE])
def test_refused_by_default(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(ENV_ALLOW_PRIVATE, raising=False)
    assert refusal(address) is not None


@pytest.mark.parametrize("address", ALWAYS)
def test_link_local_is_refused_whatever_is_permitted(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ENV_ALLOW_PRIVATE, "true")
    assert refusal(address) is not None


@pytest.mark.parametrize("address", ["1.1.1.1", "2606:4700::1111", *PRIVATE])
def test_private_addresses_are_a_setting(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ENV_ALLOW_PRIVATE, "true")
    assert refusal(address) is None


def test_the_name_is_looked_up_once_and_the_checked_address_connected_to(monkeypatch: pytest.MonkeyPatch) -> None:
    """A name server that answers with a public address first and a private one next gains nothing."""
    asked: list[str] = []
    connected: list[str] = []

    def look_up(name: str, port: int, **_: Any) -> list[Any]:
        asked.append(name)
        answer = "1.1.1.1" if len(asked) == 1 else "127.0.0.1"
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (answer, port))]

    def connect(address: tuple[str, int], *_: Any, **__: Any) -> socket.socket:
        connected.append(address[0])
        return socket.socket()

    monkeypatch.delenv(ENV_ALLOW_PRIVATE, raising=False)
    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    monkeypatch.setattr("urllib3.util.connection.create_connection", connect)
    connection = CheckedConnection("rebinding.example", 443)
    connection._new_conn().close()
    assert (asked, connected, connection.host) == (["rebinding.example"], ["1.1.1.1"], "rebinding.example")
    with pytest.raises(UserError, match=r"rebinding\.example \(127\.0\.0\.1\) is a loopback address"):
        connection._new_conn()


def test_a_password_in_an_address_is_refused_and_not_shown() -> None:
    with pytest.raises(UserError, match="found a user name or a password") as caught:
        https.HttpsSource("https://me:hunter22@data.example/rows.jsonl", field="spec.data.meta")
    assert "hunter22" not in str(caught.value)
