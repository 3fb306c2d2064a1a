"""`internvl-trainer resolve CR.yaml > run.yaml`: the file that a cluster gets, for a machine without one."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from internvl_api.constants import API_VERSION, KIND, ExitCode
from internvl_api.resolve import SpecError, parse_spec, resolve
from internvl_api.run_config import RunConfig

if TYPE_CHECKING:
    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]

_EPILOG = """\
examples:
  internvl-trainer resolve coco-lora.yaml > run.yaml && internvl-trainer run --config run.yaml

Pods, Secrets and life cycle (podTemplate, secrets, runPolicy) mean nothing here and are left out.

exit codes: 0 written   65 the spec cannot be run   78 the file holds no InternVLFineTune
"""
LOCAL_UID = "local"  # a run without a cluster has no uid, and an equal file gives an equal run.yaml


def add_resolve_command(subparsers: Subparsers) -> None:
    """`resolve`; sets `func`, which takes the parsed options and gives the exit code."""
    parser = subparsers.add_parser(
        "resolve",
        help=f"the run.yaml of an {KIND}, its recipe and defaults filled in",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("path", type=Path, metavar="CR.YAML", help=f"a file with one {KIND}")
    parser.set_defaults(func=run_resolve)


def run_resolve(options: argparse.Namespace) -> int:
    """Print run.yaml, or say on stderr what is wrong with the file."""
    try:
        config = resolve_resource(read_resource(options.path))
    except (OSError, UnicodeDecodeError, yaml.YAMLError, LookupError) as error:
        print(f"{options.path} cannot be used: {error}", file=sys.stderr)
        return ExitCode.CONFIG
    except SpecError as error:
        print(f"{options.path}: {error.reason}: {error}", file=sys.stderr)
        return ExitCode.USER_ERROR
    print(config.to_yaml(), end="")
    return ExitCode.OK


def read_resource(path: Path) -> dict[str, Any]:
    """The one InternVLFineTune of a file that may hold more.

    Raises OSError, UnicodeDecodeError, YAMLError or, when there is not exactly one, LookupError.
    """
    documents = [each for each in yaml.safe_load_all(path.read_text(encoding="utf-8")) if isinstance(each, dict)]
    ours = [each for each in documents if (each.get("apiVersion"), each.get("kind")) == (API_VERSION, KIND)]
    if len(ours) != 1:
        kinds = ", ".join(f"{each.get('apiVersion')} {each.get('kind')}" for each in documents) or "no document"
        raise LookupError(f"found {kinds}; expected one {API_VERSION} {KIND}")
    return ours[0]


def resolve_resource(resource: dict[str, Any]) -> RunConfig:
    """What the operator would make of it. Raises SpecError."""
    metadata = resource.get("metadata") or {}
    if not isinstance(metadata, dict):
        raise SpecError("InvalidSpec", "metadata", f"found {type(metadata).__name__}, expected an object")
    job = f"{metadata.get('namespace', 'default')}/{metadata.get('name', 'run')}"
    return resolve(parse_spec(resource.get("spec")), job=job, job_uid=LOCAL_UID)
