"""`internvl-trainer resolve CR.yaml > run.yaml`: the run.yaml of an InternVLFineTune, without a cluster."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import yaml
from internvl_api.constants import API_VERSION, KIND, LOCAL_UID, ExitCode
from internvl_api.recipes.resolve import parse_spec, resolve
from internvl_api.run_config import RunConfig
from internvl_api.validation.violations import SpecError, Violation

from internvl_trainer.cli.local_paths import with_absolute_paths
from internvl_trainer.cli.options import CommandError

DESCRIPTION = """\
Print the run.yaml that a cluster would get for an InternVLFineTune: the spec with its recipe and all defaults filled
in. `internvl-trainer run` takes it on a machine without Kubernetes. Relative paths start at the folder of the file.
"""
EXAMPLES = """\
examples:
  internvl-trainer resolve coco-lora.yaml > run.yaml && internvl-trainer run --config run.yaml

podTemplate, secrets and runPolicy need a cluster; they are left out.

exit codes: 0 written   65 the spec cannot be run   78 the file holds no InternVLFineTune
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.add_argument("path", type=Path, metavar="CR.YAML", help=f"a file with one {KIND}")


def run(options: argparse.Namespace) -> int:
    """Print run.yaml."""
    try:
        resource = read_resource(options.path)
        with_absolute_paths(resource.get("spec"), options.path.parent)
        config = resolve_resource(resource)
    except SpecError as error:
        raise CommandError(f"{options.path}: {error.reason}: {error}", ExitCode.USER_ERROR) from error
    except (OSError, ValueError, yaml.YAMLError, LookupError, RecursionError) as error:
        raise CommandError(f"{options.path} cannot be used: {error}", ExitCode.CONFIG) from error
    print(config.to_yaml(reveal=True), end="")
    return ExitCode.OK


def read_resource(path: Path) -> dict[str, Any]:
    """The one InternVLFineTune of a file that may hold more.

    Raises OSError, ValueError, RecursionError, YAMLError or, when there is not exactly one, LookupError.
    """
    documents = [each for each in yaml.safe_load_all(path.read_text(encoding="utf-8")) if isinstance(each, dict)]
    ours = [each for each in documents if (each.get("apiVersion"), each.get("kind")) == (API_VERSION, KIND)]
    if len(ours) != 1:
        kinds = ", ".join(f"{each.get('apiVersion')} {each.get('kind')}" for each in documents) or "no document"
        raise LookupError(f"found {kinds}; expected one {API_VERSION} {KIND}")
    return ours[0]


def resolve_resource(resource: dict[str, Any]) -> RunConfig:
    """The RunConfig that the operator would make. Raises SpecError."""
    metadata = resource.get("metadata") or {}
    if not isinstance(metadata, dict):
        raise SpecError(Violation("metadata", f"found {type(metadata).__name__}, expected an object"))
    job = f"{metadata.get('namespace', 'default')}/{metadata.get('name', 'run')}"
    return resolve(parse_spec(resource.get("spec")), job=job, job_uid=LOCAL_UID)
