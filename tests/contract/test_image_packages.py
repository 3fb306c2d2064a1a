"""The trainer image installs exactly what its requirement files name, and every file of them can be had."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from ivft_cluster.paths import CHECKOUT
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from tools import build_images, lock_requirements

FOLDER = CHECKOUT / "trainer_image"
DOCKERFILE = (FOLDER / "Dockerfile").read_text(encoding="utf-8")
# glibc and Python of each variant's base: Debian 12 with 3.11, Ubuntu 24.04 with 3.12.
TARGETS = {"cu13": ("3.11", "x86_64-manylinux_2_36"), "cu12": ("3.12", "x86_64-manylinux_2_39")}


def blocks(name: str) -> dict[Requirement, list[str]]:
    """Each requirement of a file, with its hashes."""
    text = (FOLDER / name).read_text(encoding="utf-8").replace("\\\n", " ")
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    return {
        Requirement(line.partition("--hash")[0]): re.findall(r"--hash=sha256:([0-9a-f]{64})", line) for line in lines
    }


def pins() -> dict[str, str]:
    lines = (CHECKOUT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return {canonicalize_name(name): version for name, _, version in (line.partition("==") for line in lines)}


@pytest.mark.parametrize("name", lock_requirements.FILES)
def test_every_package_has_one_version_that_constraints_agree_with_and_hashes(name: str) -> None:
    found = blocks(name)
    assert found
    for requirement, hashes in found.items():
        (only,) = requirement.specifier
        assert only.operator == "=="
        assert hashes, f"{requirement} has no hash"
        assert pins().get(canonicalize_name(requirement.name), only.version) == only.version


def test_what_is_installed_here_and_asked_for_by_the_trainer_is_in_the_files() -> None:
    locked = {canonicalize_name(each.name) for name in lock_requirements.FILES for each in blocks(name)}
    project = tomllib.loads((FOLDER / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = [
        *project["dependencies"],
        *(each for extra in project["optional-dependencies"].values() for each in extra),
    ]
    assert {canonicalize_name(Requirement(each).name) for each in wanted} - locked == {"internvl-api"}
    # A file for each name that EXTRAS accepts; eval is always installed.
    assert {f"requirements-{extra}.txt" for extra in project["optional-dependencies"]} - set(
        lock_requirements.FILES
    ) == {"requirements-eval.txt"}


def test_the_image_takes_no_package_without_a_hash_and_runs_as_nobody() -> None:
    (base,) = re.findall(r"^ARG BASE_IMAGE=(.+)$", DOCKERFILE, re.M)
    assert re.fullmatch(r"\S+:\S+@sha256:[0-9a-f]{64}", base)
    assert "devel" not in base
    assert build_images.BASES["cu12"] in DOCKERFILE
    installs = [line for line in DOCKERFILE.splitlines() if "pip install" in line and not line.startswith("#")]
    assert [line for line in installs if "--require-hashes" not in line and "/tmp/packages/" not in line] == []
    assert [line for line in DOCKERFILE.splitlines() if line.startswith("USER ")][-1] == "USER 10001:10001"


APT_STEP = re.search(r"^RUN (packages=.*?[^\\\\])\n", DOCKERFILE, re.M | re.S)


@pytest.mark.parametrize(
    ("has_ensurepip", "asked", "installed"),
    [
        (True, "", ""),
        (True, "default-jre-headless", "default-jre-headless"),
        (False, "", "python3-venv"),
        (False, "default-jre-headless ibverbs-providers", "default-jre-headless ibverbs-providers python3-venv"),
    ],
)
def test_a_base_without_ensurepip_gets_the_package_that_makes_a_venv(
    has_ensurepip: bool, asked: str, installed: str, tmp_path: Path
) -> None:
    """PyTorch's bases are Ubuntu with python3 and python3-pip alone."""
    log = tmp_path / "log"
    programs = {"python3": f"exit {int(not has_ensurepip)}", "apt-get": f'echo "$@" >> {log}', "rm": "exit 0"}
    for name, line in programs.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{line}\n", encoding="utf-8")
        (tmp_path / name).chmod(0o755)
    assert APT_STEP
    done = subprocess.run(["/bin/sh", "-c", APT_STEP[1]], env={"PATH": str(tmp_path), "APT_PACKAGES": asked})
    assert done.returncode == 0
    calls = log.read_text(encoding="utf-8").splitlines() if log.exists() else []
    wanted = ["update -qq", f"install -y -qq --no-install-recommends {installed}"] if installed else []
    assert calls == wanted


@pytest.mark.parametrize("component", build_images.DOCKERFILES)
def test_an_image_has_its_source_revision_and_version_as_labels(component: str) -> None:
    text = (CHECKOUT / build_images.DOCKERFILES[component]).read_text(encoding="utf-8")
    _, _, last = text.rpartition("\nFROM ")
    for name in ("source", "revision", "version"):
        assert re.search(rf'^ARG {name.upper()}=""$', last, re.M)
        assert f'org.opencontainers.image.{name}="${{{name.upper()}}}"' in last


def resolve(variant: str, files: list[Path], folder: Path) -> subprocess.CompletedProcess[str]:
    """Find a wheel of the variant's platform for every package, without downloading any."""
    python, platform = TARGETS[variant]
    command = [sys.executable, "-m", "uv", "pip", "install", "--dry-run", "--require-hashes", "--no-deps"]
    command += ["--only-binary", ":all:", "--python-version", python, "--python-platform", platform]
    command += [word for file in files for word in ("-r", str(file))]
    environment = {**os.environ, "UV_CACHE_DIR": str(folder / "cache")}
    return subprocess.run([*command, "--target", str(folder)], capture_output=True, text=True, env=environment)


@pytest.mark.index
@pytest.mark.slow
@pytest.mark.parametrize("variant", TARGETS)
def test_every_package_has_a_wheel_for_the_platform(variant: str, tmp_path: Path) -> None:
    with_wheels = [name for name in build_images.EXTRAS if name != "cuda"]
    files = build_images.locked_files(variant, with_wheels)
    done = resolve(variant, [file for file in files if file.name != "requirements-source.txt"], tmp_path)
    assert done.returncode == 0, done.stderr
    count = len([line for line in done.stderr.splitlines() if line.startswith(" + ")])
    assert count >= len(blocks("requirements.txt"))


@pytest.mark.index
@pytest.mark.slow
def test_a_package_without_a_wheel_is_found(tmp_path: Path) -> None:
    done = resolve("cu13", [FOLDER / "requirements-source.txt"], tmp_path)
    assert done.returncode != 0
    assert "deepspeed" in done.stderr


@pytest.mark.index
@pytest.mark.slow
def test_the_files_are_what_make_lock_writes() -> None:
    assert lock_requirements.main(["--check"]) == 0


@pytest.mark.parametrize("extras", [(), ("qlora",), ("mlflow", "wandb", "swanlab", "qlora", "cuda")])
def test_the_list_of_packages_names_every_locked_package_with_its_hashes(
    extras: tuple[str, ...], tmp_path: Path
) -> None:
    document = json.loads(build_images.write_sbom(tmp_path / "sbom.json", "cu13", extras).read_text(encoding="utf-8"))
    assert len({each["name"] for each in document["components"]}) == len(document["components"])
    listed = {
        (canonicalize_name(each["name"]), each["version"]): {
            entry["content"] for reference in each["externalReferences"] for entry in reference["hashes"]
        }
        for each in document["components"]
    }
    expected = {
        (canonicalize_name(requirement.name), next(iter(requirement.specifier)).version): set(hashes)
        for name in (
            "requirements.txt",
            "requirements-source.txt",
            "requirements-torch.txt",
            *(f"requirements-{extra}.txt" for extra in extras),
        )
        for requirement, hashes in blocks(name).items()
    }
    assert listed == expected


FAKE_BUILDER = """#!/bin/sh
echo "$@" >> "$0.log"
case "$*" in *inspect*) echo '[{"Size": 6190000000}]' ;; esac
case "$*" in *fail*) exit 1 ;; esac
"""


def test_images_are_built_with_labels_and_their_size_and_time_are_printed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    listed = []
    monkeypatch.setattr(
        build_images, "write_sbom", lambda path, variant, extras: (listed.append((variant, extras)), path)[1]
    )
    builder = tmp_path / "builder"
    builder.write_text(FAKE_BUILDER, encoding="utf-8")
    builder.chmod(0o755)
    arguments = ["--builder", str(builder), "--variant", "cu12", "--extras", "qlora", "--registry", "example.org/team"]
    assert build_images.main(arguments) == 0
    assert listed == [("cu12", ["qlora"])]
    calls = (tmp_path / "builder.log").read_text(encoding="utf-8").splitlines()
    (trainer,) = [call for call in calls if "trainer_image/Dockerfile" in call]
    assert "--tag example.org/team/internvl-trainer:0.1.0-cu12" in trainer
    assert f"BASE_IMAGE={build_images.BASES['cu12']}" in trainer
    assert "EXTRAS=qlora" in trainer
    assert re.search(r"REVISION=[0-9a-f]{40}", trainer)
    assert re.search(r"internvl-trainer:0\.1\.0-cu12  6\.19 GB  \d+ s", capsys.readouterr().out)
    assert build_images.main([*arguments, "--registry", "fail"]) == 1
    assert "operator: " in capsys.readouterr().err
    assert build_images.main([*arguments, "--extras", "qlora,lora"]) == 1
    assert "--extras: found lora; expected some of mlflow, " in capsys.readouterr().err
