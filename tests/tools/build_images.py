"""Build the images of this checkout with the builder of this machine; print the size and the time of each.

Usage: build_images.py [--variant cu13|cu12] [--extras qlora] [--registry registry.example.org/team] [--builder docker]
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterable
from pathlib import Path

from packaging.utils import canonicalize_name

CHECKOUT = Path(__file__).resolve().parents[2]
BUILDERS = ("docker", "podman", "buildah")
# Digests are those that public repositories pin for these tags.
BASES = {
    "cu13": None,  # the Dockerfile's default
    "cu12": "docker.io/pytorch/pytorch:2.13.0-cuda12.6-cudnn9-runtime"
    "@sha256:6acf597eeb8e376a96580dde4952f37cc017fef732bb40bfc73f28f25e3f64b4",
}
EXTRAS = ("mlflow", "wandb", "swanlab", "qlora", "cuda")
DOCKERFILES = {"operator": "operator/Dockerfile", "trainer": "trainer_image/Dockerfile"}
_BLOCK = re.compile(r"^[\w.-]+==.*\n(?:[ ].*\n)*", re.M)  # a requirement with its hashes


def main(arguments: list[str] | None = None) -> int:
    """Build both images and write the trainer's list of packages; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variant", choices=BASES, default="cu13", help="CUDA of the trainer's image (default: cu13)")
    parser.add_argument(
        "--extras", default="", metavar="NAMES", help=f"the trainer's optional packages, by comma: {', '.join(EXTRAS)}"
    )
    parser.add_argument("--registry", default="", metavar="HOST/PATH", help="put before the images' names")
    parser.add_argument("--builder", default=os.environ.get("BUILDER"), help=f"one of {', '.join(BUILDERS)}")
    options = parser.parse_args(arguments)
    builder = options.builder or next((name for name in BUILDERS if shutil.which(name)), None)
    if builder is None:
        print(f"no builder found: install one of {', '.join(BUILDERS)}, or name yours in BUILDER", file=sys.stderr)
        return 1
    try:
        extras = extras_of(options.extras)
    except ValueError as error:
        print(f"--extras: {error}", file=sys.stderr)
        return 1
    sbom = write_sbom(CHECKOUT / "build" / f"internvl-trainer-{options.variant}.cdx.json", options.variant, extras)
    print(f"{'packages':<10}{sbom.relative_to(CHECKOUT)}")
    for component in DOCKERFILES:
        started = time.monotonic()
        name = image_name(component, options.variant, options.registry)
        command = build_command(component, name, options.variant, ",".join(extras))
        if subprocess.run([builder, *command], cwd=CHECKOUT).returncode:
            print(f"{component}: {builder} failed; its output is above", file=sys.stderr)
            return 1
        size = _size(builder, name)
        print(f"{component:<10}{name}  {size / 1e9:.2f} GB  {time.monotonic() - started:.0f} s")
    return 0


def image_name(component: str, variant: str, registry: str) -> str:
    """The name with its tag, as `internvl-trainer:0.1.0-cu13`."""
    suffix = f"-{variant}" if component == "trainer" else ""
    return f"{registry.rstrip('/')}{'/' if registry else ''}internvl-{component}:{version(component)}{suffix}"


def build_command(component: str, name: str, variant: str, extras: str) -> list[str]:
    """The builder's arguments."""
    arguments = {"SOURCE": source(), "REVISION": revision(), "VERSION": version(component)}
    if component == "trainer":
        arguments |= {"EXTRAS": extras, "BASE_IMAGE": BASES[variant] or ""}
    pairs = [word for key, value in arguments.items() if value for word in ("--build-arg", f"{key}={value}")]
    return ["build", "--file", DOCKERFILES[component], "--tag", name, *pairs, "."]


def version(component: str) -> str:
    """The version of the component's package."""
    folder = Path(DOCKERFILES[component]).parent
    version: str = tomllib.loads((CHECKOUT / folder / "pyproject.toml").read_text())["project"]["version"]
    return version


def extras_of(text: str) -> list[str]:
    """The names in EXTRAS, by comma. Raises ValueError naming one that the image does not have."""
    names = list(dict.fromkeys(text.replace(",", " ").split()))
    if unknown := [name for name in names if name not in EXTRAS]:
        raise ValueError(f"found {', '.join(unknown)}; expected some of {', '.join(EXTRAS)}")
    return names


def locked_files(variant: str, extras: Iterable[str] = ()) -> list[Path]:
    """The requirement files that a variant with these optional packages installs."""
    names = ["requirements.txt", "requirements-source.txt", *(["requirements-torch.txt"] if variant == "cu13" else [])]
    names += [f"requirements-{extra}.txt" for extra in extras]
    return [CHECKOUT / "trainer_image" / name for name in names]


def write_sbom(path: Path, variant: str, extras: Iterable[str] = ()) -> Path:
    """Write the trainer's Python packages as CycloneDX JSON, with the hashes that the build accepts."""
    path.parent.mkdir(parents=True, exist_ok=True)
    texts = [file.read_text(encoding="utf-8") for file in locked_files(variant, extras)]
    # Two extras may need the same package, at the same version.
    text = "".join(dict.fromkeys(block for each in texts for block in _BLOCK.findall(each)))
    command = [sys.executable, "-m", "cyclonedx_py", "requirements", "-", "--output-reproducible"]
    made = subprocess.run(command, input=text, capture_output=True, text=True, check=True).stdout
    document = json.loads(made)
    document["metadata"]["component"] = {
        "type": "container",
        "bom-ref": "image",
        "name": f"internvl-trainer-{variant}",
        "version": version("trainer"),
    }
    document["components"].sort(key=lambda each: canonicalize_name(each["name"]))
    path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    return path


def _size(builder: str, name: str) -> int:
    """Bytes of the image; 0 when the builder does not tell."""
    inspect = ["inspect", "--type", "image"] if builder == "buildah" else ["image", "inspect"]
    found = json.loads(subprocess.run([builder, *inspect, name], capture_output=True, text=True, check=True).stdout)
    first = found[0] if isinstance(found, list) else found
    return int(first.get("Size") or 0)


def source() -> str:
    """The address of the checkout's origin; empty without one."""
    return _git("remote", "get-url", "origin")


def revision() -> str:
    """The commit of the checkout, with `-dirty` where files differ from it."""
    return _git("rev-parse", "HEAD") + ("-dirty" if _git("status", "--porcelain") else "")


def _git(*arguments: str) -> str:
    """What git prints, or nothing where it fails."""
    return subprocess.run(["git", *arguments], cwd=CHECKOUT, capture_output=True, text=True).stdout.strip()


if __name__ == "__main__":
    sys.exit(main())
