"""Shell commands that copy from an object store, each with its vendor's own tool."""

from __future__ import annotations

from internvl_api.address import OBJECT_STORES


def copy_file(uri: str, target: str) -> list[str] | None:
    """The command that copies one object to a local file; None for what is in no object store."""
    if not uri.startswith(OBJECT_STORES):
        return None
    scheme, bucket, key = _parts(uri)
    if scheme == "az":
        where = ["--container-name", bucket, "--name", key, "--file", target]
        return ["az", "storage", "blob", "download", *where]
    return [*(["aws", "s3", "cp"] if scheme == "s3" else ["gcloud", "storage", "cp"]), uri, target]


def copy_folder(uri: str, target: str) -> tuple[list[str], str] | None:
    """The command that copies a folder, and its local path; None for what is in no object store.

    The path is `target` for S3; the other tools name the folder after the object's own path.
    """
    if not uri.startswith(OBJECT_STORES):
        return None
    scheme, bucket, key = _parts(uri.rstrip("/"))
    if scheme == "s3":
        return ["aws", "s3", "cp", "--recursive", uri.rstrip("/"), target], target
    if scheme == "gs":
        return ["gcloud", "storage", "cp", "--recursive", uri.rstrip("/"), "."], key.rpartition("/")[2] or bucket
    pattern = ["--pattern", f"{key}/*"] if key else []
    where = ["--source", bucket, *pattern, "--destination", "."]
    return ["az", "storage", "blob", "download-batch", *where], key or "."


def _parts(uri: str) -> tuple[str, str, str]:
    """Scheme, bucket and key."""
    scheme, _, rest = uri.partition("://")
    bucket, _, key = rest.partition("/")
    return scheme, bucket, key
