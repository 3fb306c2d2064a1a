"""The chart's release on two real nodes: upgraded and rolled back under a run, and tested by `helm test`."""

from __future__ import annotations

from typing import Any

import pytest
import yaml
from e2e.harness import CHECKPOINT, NAMESPACE, STEPS, Finished, Platform, assert_same_losses, trains
from ivft_cluster import helm
from ivft_demo.data import BUCKET, EXAMPLES
from ivft_demo.install import Images, chart_values
from ivft_demo.results import losses, verify_manifest

pytestmark = pytest.mark.e2e


def values(images: Images, **settings: Any) -> dict[str, Any]:
    return chart_values(images, retryCapSeconds=5, **settings)


def test_an_upgrade_and_a_rollback_under_a_run_lose_nothing(
    platform: Platform, images: Images, undisturbed: Finished
) -> None:
    kubeconfig = platform.cluster.kubeconfig
    before = helm.revision(kubeconfig)
    output = platform.apply("quickstart", "upgraded", training=STEPS, checkpoint=CHECKPOINT)
    platform.wait("upgraded", "training", trains)
    helm.upgrade(kubeconfig, values(images, workerThreads=3))
    helm.rollback(kubeconfig, before)
    status = platform.follow("upgraded")
    assert (status.attempt, status.restarts.user, status.restarts.infrastructure) == (1, 0, 0)
    assert_same_losses(losses(platform.s3, output), undisturbed.curve)


def test_helm_test_carries_out_a_run(platform: Platform, images: Images) -> None:
    kubeconfig = platform.cluster.kubeconfig
    spec = yaml.safe_load((EXAMPLES / "quickstart.yaml").read_text())["spec"]
    output = f"s3://{BUCKET}/runs/helm-test"
    spec |= {"output": output, "workers": 1, "training": spec["training"] | {"maxSteps": 2}}
    before = helm.revision(kubeconfig)
    helm.upgrade(kubeconfig, values(images) | {"test": {"namespace": NAMESPACE, "run": spec}})
    try:
        said = helm.run_tests(kubeconfig)
    finally:
        helm.rollback(kubeconfig, before)
    assert "ok: the operator takes in a run" in said
    assert "ok: the run is complete" in said
    assert said.rstrip().endswith("ok: the run is deleted")
    assert verify_manifest(platform.s3, f"{output}/artifacts")
