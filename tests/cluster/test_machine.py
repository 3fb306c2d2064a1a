"""Installing packages must not start their services, nor touch a policy the machine has of its own."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from ivft_cluster import machine
from ivft_cluster.shell import HarnessError


@pytest.fixture
def policy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "policy-rc.d"
    monkeypatch.setattr(machine, "POLICY", path)
    return path


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Stands in for apt-get; remembers what the policy answered (its exit code) while packages were installed."""
    answers: dict[str, int] = {}

    def run(argv: list[str], **_: object) -> str:
        answers[argv[1]] = os.waitstatus_to_exitcode(os.system(str(machine.POLICY)))
        return ""

    monkeypatch.setattr(machine, "run", run)
    monkeypatch.setattr(machine, "missing_packages", lambda: ["prometheus"])
    return answers


FORBIDDEN = 101  # "action not allowed", see Debian's invoke-rc.d(8)


def test_services_may_not_start_while_packages_are_installed(policy: Path, installed: dict[str, int]) -> None:
    machine.install_packages()
    assert installed["install"] == FORBIDDEN
    assert not policy.exists()


def test_the_policy_is_removed_when_the_installation_fails(policy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> str:
        raise HarnessError("no network")

    monkeypatch.setattr(machine, "run", fail)
    monkeypatch.setattr(machine, "missing_packages", lambda: ["prometheus"])
    with pytest.raises(HarnessError, match="no network"):
        machine.install_packages()
    assert not policy.exists()


def test_an_existing_policy_of_the_machine_stays(policy: Path, installed: dict[str, int]) -> None:
    policy.write_text("#!/bin/sh\nexit 104\n")
    policy.chmod(0o755)
    machine.install_packages()
    assert policy.read_text().endswith("exit 104\n")


def test_setup_without_root_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(HarnessError, match="needs root"):
        machine.setup()
