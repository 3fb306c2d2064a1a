"""A real API server refuses every status: what a user asked to end ends all the same."""

from collections.abc import Iterator
from typing import Any

import pytest
from controller.operator_process import Cluster, OperatorProcess
from controller.story import Story
from internvl_api.constants import GROUP, PLURAL, VERSION
from ivft_cluster.ports import free_ports
from ivft_cluster.shell import tail, wait_for
from kubernetes import client
from kubernetes.client.exceptions import ApiException

pytestmark = pytest.mark.integration


@pytest.fixture
def refuse(cluster_of_test: Cluster) -> Iterator[Any]:
    """Make the server answer 500 to each status of the namespace: it has to ask a webhook that nobody serves."""
    cluster, (port,) = cluster_of_test, free_ports(1)
    name = f"refuse-{cluster.namespace}"
    hooks: Any = client.AdmissionregistrationV1Api(cluster.server.api)

    def begin() -> None:
        cluster.core.patch_namespace(cluster.namespace, {"metadata": {"labels": {"refused": cluster.namespace}}})
        hook = {
            "name": f"status.{GROUP}",
            "clientConfig": {"url": f"https://127.0.0.1:{port}/"},
            "rules": [
                {
                    "apiGroups": [GROUP],
                    "apiVersions": [VERSION],
                    "resources": [f"{PLURAL}/status"],
                    "operations": ["UPDATE"],
                }
            ],
            "namespaceSelector": {"matchLabels": {"refused": cluster.namespace}},
            "failurePolicy": "Fail",
            "sideEffects": "None",
            "admissionReviewVersions": ["v1"],
            "timeoutSeconds": 2,
        }
        hooks.create_validating_webhook_configuration({"metadata": {"name": name}, "webhooks": [hook]})
        wait_for("the server refuses a status", refused)

    def refused() -> bool:
        try:
            cluster.patch_status({"progressText": "refused?"})
        except ApiException as error:
            return bool(error.status == 500)
        return False

    yield begin
    hooks.delete_validating_webhook_configuration(name)


@pytest.mark.parametrize(
    "policy",
    [pytest.param({"suspend": True}, id="suspend"), pytest.param({"activeDeadlineSeconds": 1}, id="deadline")],
)
def test_pods_go_though_no_status_can_be_written(
    cluster_of_test: Cluster, operator: OperatorProcess, run: Story, refuse: Any, policy: dict[str, Any]
) -> None:
    cluster_of_test.create()
    run.to_training()
    refuse()
    cluster_of_test.edit({"runPolicy": policy})
    wait_for(
        "the workers are gone",
        lambda: not any("train" in pod for pod in cluster_of_test.pods()),
        on_timeout=lambda: tail(operator.log),
    )
    assert cluster_of_test.get()["status"]["phase"] == "Running"
    assert operator.ready()
