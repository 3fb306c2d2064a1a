"""Install CustomResourceDefinitions on a test's API server."""

from __future__ import annotations

import copy
from typing import Any

import yaml
from kubernetes import client
from kubernetes.client.exceptions import ApiException

from ivft_cluster.api_server import ApiServer
from ivft_cluster.paths import CHECKOUT
from ivft_cluster.shell import wait_for

CRD_FILE = CHECKOUT / "crds/internvlfinetunes.yaml"


def load_crd() -> dict[str, Any]:
    """The CRD of this checkout."""
    loaded: dict[str, Any] = yaml.safe_load(CRD_FILE.read_text(encoding="utf-8"))
    return loaded


def install_crd(server: ApiServer, crd: dict[str, Any] | None = None) -> None:
    """Create or replace a CRD (by default this checkout's) and wait until its objects can be listed."""
    body = copy.deepcopy(crd) if crd is not None else load_crd()
    name, spec = body["metadata"]["name"], body["spec"]
    extensions: Any = client.ApiextensionsV1Api(server.api)
    try:
        found = extensions.read_custom_resource_definition(name)
    except ApiException as error:
        if error.status != 404:
            raise
        extensions.create_custom_resource_definition(body)
    else:
        body["metadata"]["resourceVersion"] = found.metadata.resource_version
        extensions.replace_custom_resource_definition(name, body)
    listing: Any = client.CustomObjectsApi(server.api).list_cluster_custom_object
    version, plural = spec["versions"][0]["name"], spec["names"]["plural"]
    wait_for(f"{name} is served", lambda: listing(spec["group"], version, plural))
