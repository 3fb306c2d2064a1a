"""Pack kubectl-ivft for krew: an archive with everything it needs except Python, and krew's manifest for it.

The archive holds compiled packages, so it is for the operating system, processor and Python version that built it.
"""

import argparse
import hashlib
import platform
import shutil
import subprocess
import sys
import tarfile
import tomllib
from pathlib import Path
from string import Template

HERE = Path(__file__).resolve().parent
CHECKOUT = HERE.parents[1]
_ARCHES = {"x86_64": "amd64", "aarch64": "arm64"}  # as Go, and so krew, names them
_LAUNCHER = """\
#!/bin/sh
# krew links to this file; the packages are beside the file itself
here=$(dirname "$(readlink -f "$0")")
PYTHONPATH="$here/lib" exec {python} -m internvl_operator.kubectl_ivft "$@"
"""


def python_name() -> str:
    """The interpreter that the archive needs: `python3.11`."""
    return f"python{sys.version_info.major}.{sys.version_info.minor}"


def machine() -> tuple[str, str]:
    """Operating system and processor as krew's selectors name them."""
    name = platform.machine()
    return platform.system().lower(), _ARCHES.get(name, name)


def version() -> str:
    """The operator's version."""
    return str(tomllib.loads((HERE.parent / "pyproject.toml").read_text())["project"]["version"])


def install(target: Path) -> None:
    """Install the operator and everything that it imports below `target`."""
    packages = [str(CHECKOUT / "crds"), str(CHECKOUT / "operator")]
    pip = [sys.executable, "-m", "pip", "install", "-q", "-c", str(CHECKOUT / "constraints.txt"), "--target"]
    subprocess.run([*pip, str(target), *packages], check=True)
    for cache in target.rglob("__pycache__"):
        shutil.rmtree(cache)


def archive(packages: Path, target: Path) -> Path:
    """The path of a new tar.gz in the folder `target`, with launcher, license and the installed `packages`."""
    system, arch = machine()
    path = target / f"kubectl-ivft-{system}-{arch}.tar.gz"
    launcher = target / "kubectl-ivft"
    launcher.write_text(_LAUNCHER.format(python=python_name()))
    launcher.chmod(0o755)
    with tarfile.open(path, "w:gz") as tar:
        tar.add(launcher, "kubectl-ivft")
        tar.add(CHECKOUT / "LICENSE", "LICENSE")
        tar.add(packages, "lib")
    launcher.unlink()
    return path


def manifest(packed: Path, *, url: str, homepage: str) -> str:
    """krew's manifest for an archive that users download from the folder `url`."""
    system, arch = machine()
    return Template((HERE / "ivft.yaml").read_text()).substitute(
        version=version(),
        homepage=homepage,
        python=python_name(),
        os=system,
        arch=arch,
        uri=f"{url.rstrip('/')}/{packed.name}",
        sha256=hashlib.sha256(packed.read_bytes()).hexdigest(),
    )


def main() -> None:
    """Write archive and manifest."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("target", type=Path, help="folder for the two files")
    parser.add_argument("--url", required=True, help="folder from which users will download the archive")
    parser.add_argument("--homepage", help="default: the URL")
    options = parser.parse_args()
    packages = options.target / "lib"
    shutil.rmtree(options.target, ignore_errors=True)
    options.target.mkdir(parents=True)
    install(packages)
    packed = archive(packages, options.target)
    shutil.rmtree(packages)
    text = manifest(packed, url=options.url, homepage=options.homepage or options.url)
    (options.target / "ivft.yaml").write_text(text)
    print(f"{packed}\n{options.target / 'ivft.yaml'}")


if __name__ == "__main__":
    main()
