"""Build contexts for the project's Dockerfiles, assembled outside the checkout.

A context holds `crds/`, the component's own folder, `constraints.txt` for the operator, and `wheelhouse/` with every
package it needs, so that a build needs no network. Times and modes are made equal everywhere: only content decides what
is built anew.
"""

from __future__ import annotations

import os
import shutil
import sys
import tomllib
from pathlib import Path

from ivft_cluster.paths import CHECKOUT, cache_dir, content_hash, locked
from ivft_cluster.shell import HarnessError, run

COMPONENTS = {"operator": "operator", "trainer": "trainer_image"}
LOCKED = ("requirements.txt", "requirements-source.txt", "requirements-torch.txt")  # all that the trainer installs
LONG_AGO = 946684800  # 2000-01-01, the time of every staged file


def stage_context(component: str) -> Path:
    """The context folder of `operator` or `trainer`, equal to the checkout as it is now (also uncommitted files)."""
    if component not in COMPONENTS:
        raise HarnessError(f"no component {component!r}: expected one of {', '.join(COMPONENTS)}")
    context = cache_dir() / "contexts" / component
    sources = source_files(component)
    with locked(f"context-{component}"):
        shutil.rmtree(context, ignore_errors=True)
        for source in sources:
            _place(source, context / source.relative_to(CHECKOUT))
        for wheel in sorted(wheelhouse(component).iterdir()):
            target = context / "wheelhouse" / wheel.name
            target.parent.mkdir(exist_ok=True)
            os.link(wheel, target)
    return context


def source_files(component: str) -> list[Path]:
    """Tracked and untracked files that git does not ignore."""
    folders = ["crds", COMPONENTS[component], *(["constraints.txt"] if component == "operator" else [])]
    listing = run(["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", *folders], cwd=CHECKOUT)
    paths = [CHECKOUT / name for name in sorted(set(listing.split("\0"))) if name]
    return [path for path in paths if path.is_file()]


def context_hash(component: str) -> str:
    """Hash of everything that a build of `component` reads."""
    return content_hash([*source_files(component), wheelhouse_key(component)], CHECKOUT)


def requirements(component: str) -> list[str]:
    """pip's arguments for the component's third-party packages, with what it needs to build ours."""
    if component == "trainer":
        return ["--require-hashes", "--no-deps", *(word for name in LOCKED for word in ("-r", f"trainer_image/{name}"))]
    found = set()
    for folder in ("crds", COMPONENTS[component]):
        project = tomllib.loads((CHECKOUT / folder / "pyproject.toml").read_text())
        found |= {*project["project"]["dependencies"], *project["build-system"]["requires"]}
    return ["-c", "constraints.txt", *sorted(found - {"internvl-api"})]


def wheelhouse_key(component: str) -> str:
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    arguments = requirements(component)
    files = [CHECKOUT / name for name in arguments if name.endswith(".txt")]
    return content_hash([python, *arguments, *(path.read_text() for path in files)])


def wheelhouse(component: str) -> Path:
    """A cached folder with a file for each package that the component needs, from this virtualenv's pip."""
    folder = cache_dir() / "wheelhouses" / f"{component}-{wheelhouse_key(component)}"
    with locked(f"wheelhouse-{component}"):
        if not folder.is_dir():
            partial = folder.with_suffix(".partial")
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            fetch = ["download", "--dest"] if component == "trainer" else ["wheel", "--wheel-dir"]
            pip = [sys.executable, "-m", "pip", *fetch, partial, *requirements(component)]
            run(pip, cwd=CHECKOUT, log=folder.with_suffix(".log"))
            for wheel in partial.iterdir():
                os.utime(wheel, (LONG_AGO, LONG_AGO))
            partial.rename(folder)
    return folder


def _place(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)
    target.chmod(0o755 if os.access(source, os.X_OK) else 0o644)
    os.utime(target, (LONG_AGO, LONG_AGO))
