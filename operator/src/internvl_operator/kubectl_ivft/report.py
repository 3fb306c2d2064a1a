"""Locate a run's report, and download it with the user's own keys."""

import importlib.util
import os
from pathlib import Path
from shlex import join
from urllib.parse import SplitResult, urlsplit

from internvl_api.status import InternVLFineTuneStatus

from internvl_operator.kubectl_ivft.client import UserError

_NAME = "report"


def location(name: str, status: InternVLFineTuneStatus) -> str:
    """The URI of the report. Raises UserError when the run has none."""
    if uri := status.artifacts.get(_NAME):
        return uri
    if status.phase == "Succeeded":
        have = ", ".join(status.artifacts) or "none"
        raise UserError(f"the run {name!r} has published no report; its artifacts: {have}")
    phase = (status.phase or "Pending").lower()
    raise UserError(f"the run {name!r} has no report yet: it is {phase}\nTry `kubectl ivft status {name}`.")


def download(uri: str, target: Path) -> None:
    """Download an s3:// object to a file, with AWS_* of the environment. Raises UserError."""
    parts = urlsplit(uri)
    if parts.scheme != "s3":
        raise UserError(f"--out supports only s3://, but the report is at {uri}; {_other_way(parts, target)}")
    if importlib.util.find_spec("boto3") is None:
        raise UserError(f"--out needs boto3: pip install boto3, or run `aws s3 cp {uri} .`")
    import boto3
    from botocore.exceptions import BotoCoreError, ClientError

    partial = target.with_name(f".{target.name}.partial")
    try:
        client = boto3.client("s3", endpoint_url=os.environ.get("AWS_ENDPOINT_URL"))
        client.download_file(parts.netloc, parts.path.lstrip("/"), str(partial))
        partial.replace(target)
    except (BotoCoreError, ClientError, OSError, ValueError) as error:
        partial.unlink(missing_ok=True)
        keys = "AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and, where needed, AWS_ENDPOINT_URL"
        raise UserError(f"cannot download {uri}: {error}\nThe keys come from {keys}.") from error


def _other_way(parts: SplitResult, target: Path) -> str:
    """How to fetch a file that is not in S3."""
    if parts.scheme == "gs":
        return f"run `{join(['gcloud', 'storage', 'cp', parts.geturl(), str(target)])}`"
    if parts.scheme == "az":
        where = ["--container-name", parts.netloc, "--name", parts.path.lstrip("/"), "--file", str(target)]
        return f"run `{join(['az', 'storage', 'blob', 'download', *where])}`"
    return "copy it from there"
