"""Real Kueue: its controller built from its module, installed with its own chart."""

from __future__ import annotations

import shutil
import tarfile
import tempfile
from pathlib import Path
from typing import Any

import yaml

from ivft_cluster import helm
from ivft_cluster.cluster import Cluster
from ivft_cluster.oci import Image, add_image
from ivft_cluster.paths import cache_dir, content_hash, locked
from ivft_cluster.releases import KUEUE

NAMESPACE = "kueue-system"
CONFIGURATION = {
    "apiVersion": "config.kueue.x-k8s.io/v1beta2",
    "kind": "Configuration",
    "health": {"healthProbeBindAddress": ":8081"},
    "metrics": {"bindAddress": ":8443"},
    "webhook": {"port": 9443},
    "leaderElection": {"leaderElect": False},
    "internalCertManagement": {"enable": True},
    "integrations": {"frameworks": ["pod"]},  # only pods that name a queue
    "managedJobsNamespaceSelector": {
        "matchExpressions": [
            {"key": "kubernetes.io/metadata.name", "operator": "NotIn", "values": ["kube-system", NAMESPACE]}
        ]
    },
}


def image() -> Image:
    """The image with Kueue's static binary."""
    manager = KUEUE.build() / "manager"
    found = Image(f"localhost/kueue:{content_hash([KUEUE.folder.name])}")
    with locked("kueue-image"):
        if not found.exists():
            with tempfile.TemporaryDirectory(dir=cache_dir()) as scratch:
                layer = Path(scratch) / "manager.tar"
                with tarfile.open(layer, "w") as tar:
                    tar.add(manager, "manager")
                add_image(found.name, [layer], {"Entrypoint": ["/manager"], "User": "65532:65532"})
    return found


def install(cluster: Cluster) -> None:
    """Load the image, install the chart, and return when the controller is ready. Raises HelmReleaseError."""
    controller = image()
    cluster.load(controller)
    with tempfile.TemporaryDirectory() as scratch:
        chart = Path(scratch) / "kueue"
        shutil.copytree(KUEUE.module_folder() / "charts/kueue", chart)
        helm.install(cluster.kubeconfig, values(controller), chart=chart, release="kueue", namespace=NAMESPACE)


def uninstall(cluster: Cluster) -> None:
    helm.uninstall(cluster.kubeconfig, release="kueue", namespace=NAMESPACE)


def values(controller: Image) -> dict[str, Any]:
    repository, _, tag = controller.name.rpartition(":")
    manager = {
        "image": {"repository": repository, "tag": tag, "pullPolicy": "IfNotPresent"},
        "resources": {"requests": {"cpu": "100m", "memory": "128Mi"}, "limits": {"memory": "512Mi"}},
    }
    return {
        "controllerManager": {"manager": manager},
        "managerConfig": {"controllerManagerConfigYaml": yaml.safe_dump(CONFIGURATION)},
    }
