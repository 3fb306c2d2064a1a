"""volcano's PodGroups on a test's API server; no scheduler runs."""

from pathlib import Path

import yaml
from controller.operator_process import POD_GROUPS
from ivft_cluster.api_server import ApiServer
from ivft_cluster.crds import install_crd

_SPEC = Path(__file__).parents[1] / "data/crds/volcano-podgroup.yaml"


def install_pod_groups(server: ApiServer) -> None:
    """Install the CRD with volcano's own schema."""
    spec = yaml.safe_load(_SPEC.read_text())
    del spec["properties"]["minResources"]  # not ours, and its int-or-string is not in the excerpt
    group, version, plural = POD_GROUPS
    properties = {"spec": spec, "status": {"type": "object"}}
    schema = {"openAPIV3Schema": {"type": "object", "properties": properties}}
    install_crd(
        server,
        {
            "apiVersion": "apiextensions.k8s.io/v1",
            "kind": "CustomResourceDefinition",
            "metadata": {"name": f"{plural}.{group}"},
            "spec": {
                "group": group,
                "scope": "Namespaced",
                "names": {"kind": "PodGroup", "plural": plural, "singular": "podgroup"},
                "versions": [{"name": version, "served": True, "storage": True, "schema": schema}],
            },
        },
    )
