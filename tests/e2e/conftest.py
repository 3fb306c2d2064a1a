"""The whole product on two real nodes: images built, chart installed, demo data in object storage."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from e2e.harness import CHECKPOINT, LONG_STEPS, STEPS, ChildLog, Finished, Platform
from e2e.holds import Holds
from ivft_cluster import helm
from ivft_cluster.cluster import Cluster
from ivft_demo.data import upload_demo_data, write_secret
from ivft_demo.install import Images, build_images, install_operator
from ivft_demo.results import Loss, losses


@pytest.fixture(scope="session")
def images(cluster: Cluster) -> Images:
    """Operator and trainer images built from the checkout, on every node."""
    images = build_images()
    cluster.load(*images)
    return images


@pytest.fixture(scope="session")
def platform(cluster: Cluster, images: Images) -> Iterator[Platform]:
    """These images, the chart installed by Helm, the demo's data uploaded."""
    upload_demo_data(cluster.s3)
    write_secret(cluster)
    install_operator(cluster, images, retryCapSeconds=5)  # these tests make a stage stall on purpose
    try:
        yield Platform(cluster)
    finally:
        Platform(cluster).delete_all()
        helm.uninstall(cluster.kubeconfig)


@pytest.fixture(scope="session")
def child_log(platform: Platform) -> Iterator[ChildLog]:
    """Recorder of every child of every run in the session."""
    log = ChildLog(platform)
    yield log
    log.stop()


@pytest.fixture(scope="session")
def holds(platform: Platform, pytestconfig: pytest.Config) -> Iterator[Holds]:
    """Recorder of how long training workers hold places without a step; prints its table when all tests are done."""
    recorder = Holds(platform)
    yield recorder
    recorder.stop()
    with pytestconfig.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():  # type: ignore[union-attr]
        print(f"\n{recorder.table()}")


@pytest.fixture(scope="session")
def undisturbed(platform: Platform, child_log: ChildLog) -> Finished:
    """An undisturbed LoRA run."""
    output = platform.apply("quickstart", "undisturbed", training=STEPS, checkpoint=CHECKPOINT)
    status = platform.follow("undisturbed")
    return Finished(status, output, losses(platform.s3, output))


@pytest.fixture(scope="session")
def long_curve(platform: Platform) -> list[Loss]:
    """Losses of an undisturbed run of LONG_STEPS."""
    output = platform.apply("quickstart", "long-undisturbed", training=LONG_STEPS, checkpoint=CHECKPOINT)
    platform.follow("long-undisturbed")
    return losses(platform.s3, output)
