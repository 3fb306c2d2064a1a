"""The whole product on two real nodes: images built, chart installed, demo data in object storage."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from e2e.harness import ChildLog, Platform
from ivft_cluster import helm
from ivft_cluster.cluster import Cluster
from ivft_cluster.images import component_image
from ivft_demo.data import upload_demo_data, write_secret


@pytest.fixture(scope="session")
def platform(cluster: Cluster) -> Iterator[Platform]:
    """Operator and trainer images built from the checkout, the chart installed by Helm, the demo's data uploaded."""
    operator, trainer = component_image("operator"), component_image("trainer")
    cluster.load(operator, trainer)
    upload_demo_data(cluster.s3)
    write_secret(cluster)
    repository, _, tag = operator.name.rpartition(":")
    # short waits: these tests make a stage stall on purpose and then correct the cause
    settings = {"retryBaseSeconds": 2, "retryCapSeconds": 5, "progressIntervalSeconds": 1}
    values = {
        "image": {"repository": repository, "tag": tag},
        "trainer": {"image": trainer.name},
        "settings": settings,
    }
    helm.install(cluster.kubeconfig, values)
    try:
        yield Platform(cluster)
    finally:
        Platform(cluster).delete_all()
        helm.uninstall(cluster.kubeconfig)


@pytest.fixture(scope="session")
def child_log(platform: Platform) -> Iterator[ChildLog]:
    """Every child of every run of the session."""
    log = ChildLog(platform)
    yield log
    log.stop()
