"""The plugin's archive and manifest as krew takes them."""

from __future__ import annotations

import hashlib
import importlib.util
import re
import subprocess
import sys
import tarfile
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from ivft_cluster.paths import CHECKOUT

URL = "https://downloads.example.org/ivft/"


@pytest.fixture(scope="module")
def pack() -> ModuleType:
    spec = importlib.util.spec_from_file_location("pack", CHECKOUT / "operator/krew/pack.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def packed(pack: ModuleType, tmp_path: Path) -> Path:
    """An archive whose plugin prints its arguments."""
    module = tmp_path / "packages/internvl_operator/kubectl_ivft"
    module.mkdir(parents=True)
    (module / "__main__.py").write_text("import sys; print(sys.argv[1:])")
    (tmp_path / "out").mkdir()
    archive: Path = pack.archive(tmp_path / "packages", tmp_path / "out")
    return archive


def test_the_manifest_has_what_krew_asks_for(pack: ModuleType, packed: Path) -> None:
    text = pack.manifest(packed, url=URL, homepage="https://example.org/operator")
    assert "${" not in text
    manifest: Any = yaml.safe_load(text)
    assert (manifest["apiVersion"], manifest["kind"]) == ("krew.googlecontainertools.github.com/v1alpha2", "Plugin")
    assert manifest["metadata"]["name"] == "ivft"
    spec = manifest["spec"]
    assert re.fullmatch(r"v[0-9]+\.[0-9]+\.[0-9]+", spec["version"])
    assert spec["homepage"] == "https://example.org/operator"
    assert len(spec["shortDescription"]) <= 50
    assert not spec["shortDescription"].endswith(".")
    assert spec["description"]
    assert 'exec kubectl ivft __complete "$@"' in spec["caveats"]
    (platform,) = spec["platforms"]
    assert platform["selector"]["matchLabels"] == {"os": sys.platform, "arch": pack.machine()[1]}
    assert platform["uri"] == URL + packed.name
    assert platform["sha256"] == hashlib.sha256(packed.read_bytes()).hexdigest()
    assert platform["bin"] == "kubectl-ivft"


def test_the_archive_runs_through_the_link_that_krew_makes(packed: Path, tmp_path: Path) -> None:
    with tarfile.open(packed) as tar:
        assert {"kubectl-ivft", "LICENSE"} <= set(tar.getnames())
        tar.extractall(tmp_path / "store", filter="data")
    link = tmp_path / "kubectl-ivft"
    link.symlink_to(tmp_path / "store/kubectl-ivft")
    python = {"PATH": f"{Path(sys.executable).resolve().parent}:/usr/bin:/bin"}
    told = subprocess.run([link, "why", "a b"], env=python, capture_output=True, text=True, check=True, timeout=20)
    assert told.stdout == "['why', 'a b']\n"
