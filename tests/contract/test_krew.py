"""The plugin's archive and manifest as krew takes them; krew itself checks and installs them."""

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
from ivft_cluster import contexts
from ivft_cluster.paths import CHECKOUT
from ivft_cluster.releases import binary

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


@pytest.mark.integration
def test_krew_accepts_the_manifest_and_installs_a_plugin_that_runs(
    pack: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")  # the wheels of the operator's image have all that the plugin needs
    monkeypatch.setenv("PIP_FIND_LINKS", str(contexts.wheelhouse("operator")))
    (tmp_path / "out").mkdir()
    pack.install(tmp_path / "packages")
    archive = pack.archive(tmp_path / "packages", tmp_path / "out")
    manifest = tmp_path / "out/ivft.yaml"
    manifest.write_text(pack.manifest(archive, url=URL, homepage="https://example.org/operator"))
    check = [binary("validate-krew-manifest"), "-manifest", manifest, "-skip-install"]
    subprocess.run(check, capture_output=True, check=True, timeout=60)

    root, programs = tmp_path / "krew", tmp_path / "bin"
    programs.mkdir()
    (programs / "kubectl-krew").symlink_to(binary("krew"))
    (programs / "kubectl").symlink_to(binary("kubectl"))
    (programs / pack.python_name()).symlink_to(Path(sys.executable).resolve())
    path = f"{programs}:{root}/bin:/usr/bin:/bin"
    clean = {"HOME": str(tmp_path), "PATH": path, "KREW_ROOT": str(root), "KREW_NO_UPGRADE_CHECK": "1"}

    def kubectl(*arguments: str | Path) -> str:
        ended = subprocess.run(
            ["kubectl", *arguments], env=clean, capture_output=True, text=True, check=False, timeout=120
        )
        assert ended.returncode == 0, ended.stderr
        return ended.stdout

    kubectl("krew", "install", f"--manifest={manifest}", f"--archive={archive}")
    assert (root / "store/ivft" / f"v{pack.version()}" / "kubectl-ivft").is_file()
    helped = kubectl("ivft", "--help")
    assert all(command in helped for command in ("list", "why", "wait"))
