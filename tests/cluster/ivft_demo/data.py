"""Uploads the data of the example runs to the bucket `demo`, and creates the Secret with its keys."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import NamedTuple

import yaml
from ivft_cluster.cluster import Cluster
from ivft_cluster.paths import CHECKOUT
from ivft_cluster.s3 import REGION, S3Server
from ivft_cluster.shell import HarnessError
from kubernetes import client

from ivft_demo.checkpoint import write_checkpoint, write_retrieval_checkpoint
from ivft_demo.photographs import write_dataset

BUCKET = "demo"
DATA_KEY, MODEL_KEY, RETRIEVAL_MODEL_KEY = "data", "models/tiny-internvl2", "models/tiny-internvl-14b"
SECRET = "s3-credentials"
EXAMPLES = CHECKOUT / "examples"


class Run(NamedTuple):
    """The run of an example file."""

    name: str
    output: str
    manifest: Path


def load_example(name: str) -> Run:
    """The run of examples/<name>.yaml. Raises HarnessError with the list of examples."""
    path = EXAMPLES / f"{name}.yaml"
    if not path.exists():
        known = ", ".join(sorted(each.stem for each in EXAMPLES.glob("*.yaml")))
        raise HarnessError(f"no example {name!r}: there are {known}")
    resource = yaml.safe_load(path.read_text(encoding="utf-8"))
    return Run(resource["metadata"]["name"], resource["spec"]["output"], path)


def upload_demo_data(s3: S3Server) -> int:
    """Create the bucket if missing, upload the tiny checkpoints and the photographs, return the number of objects."""
    storage = s3.client()
    if BUCKET not in {each["Name"] for each in storage.list_buckets()["Buckets"]}:
        storage.create_bucket(Bucket=BUCKET)
    with tempfile.TemporaryDirectory() as scratch:
        model, retrieval, data = (Path(scratch) / name for name in ("model", "retrieval", "data"))
        write_checkpoint(model)
        write_retrieval_checkpoint(retrieval)
        write_dataset(data)
        folders = {model: MODEL_KEY, retrieval: RETRIEVAL_MODEL_KEY, data: DATA_KEY}
        keys = {
            path: f"{key}/{path.relative_to(folder)}"
            for folder, key in folders.items()
            for path in folder.rglob("*")
            if path.is_file()
        }
        for path, key in keys.items():
            storage.upload_file(str(path), BUCKET, key)
    return len(keys)


def write_secret(cluster: Cluster, namespace: str = "default", name: str = SECRET) -> None:
    """Create or replace the Secret that the examples name (spec.secrets.objectStorage)."""
    credentials = cluster.s3.credentials
    secret = client.V1Secret(
        metadata=client.V1ObjectMeta(name=name),
        string_data={
            "AWS_ACCESS_KEY_ID": credentials.access_key,
            "AWS_SECRET_ACCESS_KEY": credentials.secret_key,
            "AWS_ENDPOINT_URL": cluster.s3_endpoint_inside,
            "AWS_REGION": REGION,
        },
    )
    try:
        cluster.core.create_namespaced_secret(namespace, secret)
    except client.ApiException as error:
        if error.status != 409:
            raise
        cluster.core.replace_namespaced_secret(name, namespace, secret)
