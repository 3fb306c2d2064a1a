"""`make release`: what its checks refuse, what it writes, and workflows that GitHub would accept."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import yaml
from ivft_cluster.paths import CHECKOUT
from tools import build_release

WORKFLOWS = sorted((CHECKOUT / ".github/workflows").glob("*.yml"))


@pytest.mark.parametrize(
    ("version", "other", "message"),
    [
        ("v1.2.0", {}, "found version v1.2.0; expected a semantic one such as 1.2.0, without v"),
        ("1.2", {}, "found version 1.2; expected a semantic one"),
        ("1.2.0", {"Chart.yaml: appVersion": "1.1.0"}, "change them first:\n  Chart.yaml: appVersion: 1.1.0"),
    ],
)
def test_a_release_needs_one_version(version: str, other: dict[str, str], message: str) -> None:
    with pytest.raises(build_release.ReleaseError) as caught:
        build_release.check_versions(version, {"pyproject.toml": version} | other)
    assert message in str(caught.value)


def test_the_checkout_has_one_version() -> None:
    found = build_release.versions()
    build_release.check_versions(found["operator/pyproject.toml"], found)
    assert len(found) == 6


def test_a_wrong_version_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kept = tmp_path / "kept"
    kept.touch()
    assert build_release.main(["99.0.0", "--target", str(tmp_path)]) == 1
    assert kept.exists()
    assert "these files name another version than 99.0.0" in capsys.readouterr().err


def test_archives_statement_and_checksums(tmp_path: Path) -> None:
    build_release.write_chart(tmp_path)
    build_release.write_crd(tmp_path)
    build_release.write_kustomize(tmp_path)
    build_release.write_provenance(tmp_path)
    build_release.write_checksums(tmp_path)
    made = {path.name for path in tmp_path.iterdir()}
    version = build_release.versions()["operator/pyproject.toml"]
    assert made == {
        f"internvl-operator-{version}.tgz", "internvlfinetunes.yaml", "kustomize.tar.gz", "provenance.intoto.json",
        "SHA256SUMS",
    }  # fmt: skip
    check = subprocess.run(["sha256sum", "--check", "--strict", "SHA256SUMS"], cwd=tmp_path, capture_output=True)
    assert check.returncode == 0
    statement = json.loads((tmp_path / "provenance.intoto.json").read_text())
    digests = {each["name"]: each["digest"]["sha256"] for each in statement["subject"]}
    assert digests["kustomize.tar.gz"] == hashlib.sha256((tmp_path / "kustomize.tar.gz").read_bytes()).hexdigest()
    with tarfile.open(tmp_path / "kustomize.tar.gz") as archive:
        archive.extractall(tmp_path / "out", filter="data")
    base = yaml.safe_load((tmp_path / "out/config/base/kustomization.yaml").read_text())
    assert all((tmp_path / "out/config/base" / name).exists() for name in base["resources"])


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.name)
def test_workflows_follow_githubs_schema(workflow: Path) -> None:
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.github-workflows", str(workflow)]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout


def test_workflows_run_targets_that_exist() -> None:
    makefile = (CHECKOUT / "Makefile").read_text()
    assert len(WORKFLOWS) == 2
    for workflow in WORKFLOWS:
        for job in yaml.safe_load(workflow.read_text())["jobs"].values():
            for step in job["steps"]:
                words = step.get("run", "").split()
                if words[:1] == ["make"]:
                    assert f"\n{words[1]}:" in makefile
