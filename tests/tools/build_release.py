"""Write the files of a release: wheels, chart, CRD, kustomize folder, kubectl plugin, package lists, checksums.

Usage: build_release.py VERSION [--target dist] [--url https://…/releases/v0.1.0]
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import helm_python
import yaml

HERE = Path(__file__).resolve().parent
CHECKOUT = HERE.parents[1]
sys.path[:0] = [str(HERE), str(CHECKOUT / "tests/cluster")]
import build_images  # noqa: E402

CHART = CHECKOUT / "charts/internvl-operator"
PACKAGES = ("crds", "operator", "trainer_image")
_PYPROJECTS = ("pyproject.toml", *(f"{name}/pyproject.toml" for name in PACKAGES))


class ReleaseError(Exception):
    """The checkout is not one of this version; the message says what to change."""


def main(arguments: list[str] | None = None) -> int:
    """Write the release; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("version", help="as in every pyproject.toml and in Chart.yaml")
    parser.add_argument("--target", type=Path, default=CHECKOUT / "dist", help="a folder to replace (default: dist)")
    parser.add_argument("--url", help="folder from which users will download the files")
    options = parser.parse_args(arguments)
    try:
        check_versions(options.version, versions())
    except ReleaseError as error:
        print(error, file=sys.stderr)
        return 1
    target: Path = options.target.resolve()
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    for say, write in (
        ("wheels", write_wheels),
        ("chart", write_chart),
        ("CRD", write_crd),
        ("kustomize folder", write_kustomize),
        ("package lists", write_package_lists),
        (
            "kubectl plugin",
            lambda folder: write_plugin(folder, options.url or f"https://example.org/{options.version}"),
        ),
    ):
        print(f"… {say}", flush=True)
        write(target)
    write_provenance(target)
    write_checksums(target)
    for path in sorted(target.iterdir()):
        print(f"{path.stat().st_size:>12,}  {path.name}")
    if not options.url:
        print("the plugin's manifest names example.org; give --url to publish it", file=sys.stderr)
    return 0


def versions() -> dict[str, str]:
    """The version that each file of the checkout names."""
    found = {
        name: str(tomllib.loads((CHECKOUT / name).read_text(encoding="utf-8"))["project"]["version"])
        for name in _PYPROJECTS
    }
    about = yaml.safe_load((CHART / "Chart.yaml").read_text(encoding="utf-8"))
    place = str((CHART / "Chart.yaml").relative_to(CHECKOUT))
    return found | {f"{place}: {key}": str(about[key]) for key in ("version", "appVersion")}


def check_versions(version: str, found: Mapping[str, str]) -> None:
    """Raises ReleaseError when the version is not a semantic one, or when a file names another."""
    if not re.fullmatch(r"\d+\.\d+\.\d+(-[0-9A-Za-z.]+)?", version):
        raise ReleaseError(f"found version {version}; expected a semantic one such as 1.2.0, without v")
    if wrong := [f"  {place}: {other}" for place, other in found.items() if other != version]:
        raise ReleaseError("\n".join([f"these files name another version than {version}; change them first:", *wrong]))


def write_wheels(target: Path) -> None:
    """A wheel of each package."""
    pip = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--wheel-dir", str(target)]
    subprocess.run([*pip, *(str(CHECKOUT / name) for name in PACKAGES)], check=True)


def write_chart(target: Path) -> None:
    """The chart's archive."""
    helm_python.package(CHART, destination=target)


def write_crd(target: Path) -> None:
    """The CRD alone, for those who install it apart from the chart."""
    shutil.copy(CHECKOUT / "crds/internvlfinetunes.yaml", target / "internvlfinetunes.yaml")


def write_kustomize(target: Path) -> None:
    """An archive of config/ and the CRD beside it, as in the checkout."""
    with tarfile.open(target / "kustomize.tar.gz", "w:gz") as archive:
        archive.add(CHECKOUT / "config", "config")
        for name in ("kustomization.yaml", "internvlfinetunes.yaml"):
            archive.add(CHECKOUT / "crds" / name, f"crds/{name}")


def write_package_lists(target: Path) -> None:
    """The trainer image's Python packages as CycloneDX, for each variant."""
    for variant in build_images.BASES:
        build_images.write_sbom(target / f"internvl-trainer-{variant}.cdx.json", variant)


def write_plugin(target: Path, url: str) -> None:
    """kubectl-ivft for this system and krew's manifest for it."""
    packed = target / "krew"
    subprocess.run([sys.executable, str(CHECKOUT / "operator/krew/pack.py"), str(packed), "--url", url], check=True)
    for path in packed.iterdir():
        path.rename(target / path.name)
    packed.rmdir()


def write_provenance(target: Path) -> None:
    """An in-toto statement (SLSA provenance v1) about every file: the revision and the command that made it.

    It is not signed; whoever publishes the release signs it.
    """
    statement: dict[str, Any] = {
        "_type": "https://in-toto.io/Statement/v1",
        "subject": [{"name": path.name, "digest": {"sha256": _digest(path)}} for path in sorted(target.iterdir())],
        "predicateType": "https://slsa.dev/provenance/v1",
        "predicate": {
            "buildDefinition": {
                "buildType": "make release",
                "externalParameters": {"version": build_images.version("operator")},
                "resolvedDependencies": [
                    {"uri": build_images.source(), "digest": {"gitCommit": build_images.revision()}},
                    *(
                        {"uri": path.name, "digest": {"sha256": _digest(path)}}
                        for path in [CHECKOUT / "constraints.txt", *build_images.locked_files("cu13")]
                    ),
                ],
            },
            "runDetails": {"builder": {"id": f"python{sys.version_info.major}.{sys.version_info.minor}"}},
        },
    }
    (target / "provenance.intoto.json").write_text(json.dumps(statement, indent=1) + "\n", encoding="utf-8")


def write_checksums(target: Path) -> None:
    """SHA256SUMS, as `sha256sum --check` reads it."""
    lines = [f"{_digest(path)}  {path.name}\n" for path in sorted(target.iterdir())]
    (target / "SHA256SUMS").write_text("".join(lines), encoding="utf-8")


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


if __name__ == "__main__":
    sys.exit(main())
