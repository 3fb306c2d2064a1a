"""Where a run's report is, and how to fetch it with the reader's own keys."""

import importlib.util
import os
from pathlib import Path
from urllib.parse import urlsplit

from internvl_api.status import InternVLFineTuneStatus

from internvl_operator.kubectl_ivft.client import UserError

_NAME = "report"


def location(name: str, status: InternVLFineTuneStatus) -> str:
    """The URI of the report. Raises UserError while there is none."""
    if uri := status.artifacts.get(_NAME):
        return uri
    if status.phase == "Succeeded":
        have = ", ".join(status.artifacts) or "nothing"
        raise UserError(f"the run {name!r} has published no report; there is: {have}")
    phase = (status.phase or "Pending").lower()
    raise UserError(f"the run {name!r} has no report yet: it is {phase}\nTry `kubectl ivft status {name}`.")


def download(uri: str, target: Path) -> None:
    """Copy an s3:// object into a file, with AWS_* of the environment. Raises UserError."""
    parts = urlsplit(uri)
    if parts.scheme != "s3":
        raise UserError(f"--out can only fetch s3://, and the report is {uri}: copy it from there")
    if importlib.util.find_spec("boto3") is None:
        raise UserError("--out needs boto3: pip install boto3, or fetch it yourself, as `aws s3 cp " + uri + " .`")
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
        raise UserError(f"cannot fetch {uri}: {error}\nThe keys are read from {keys}.") from error
