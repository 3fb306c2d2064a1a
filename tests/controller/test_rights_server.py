"""The chart's rules are what the operator uses: no right is missing, none is unused.

The operator runs with the chart's service account through a story with everything in it. Every other test with an
operator process has the same account, and tests/conftest.py fails the session for a right that was missing there.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from controller.operator_account import account_objects
from controller.operator_process import Cluster, OperatorProcess
from controller.pod_groups import install_pod_groups
from controller.story import Story
from ivft_cluster import audit
from ivft_cluster.api_server import ApiServer
from ivft_cluster.audit import Right
from ivft_cluster.crds import install_crd
from ivft_cluster.fake_kubelet import FakeKubelet
from ivft_cluster.ports import free_ports
from ivft_cluster.shell import tail, wait_for
from kubernetes import client

pytestmark = pytest.mark.integration

HOOK = "internvl-operator-webhook"
LEASE_RENEWED = Right("coordination.k8s.io", "leases", "update", True)


@pytest.fixture
def audited(tmp_path: Path) -> Iterator[ApiServer]:
    """A server of its own: its log has one operator."""
    with ApiServer(tmp_path / "server") as server:
        install_crd(server)
        install_pod_groups(server)
        yield server


def settings_of(home: str, watched: str) -> dict[str, str]:
    return {
        "NAMESPACES": watched,
        "GANG_SCHEDULERS": "volcano",
        "NODE_LEASES": "false" if watched else "true",
        "SETTLE_SECONDS": "3",  # in which the operator looks at the Leases of the nodes
        "NETWORK_POLICY_PEERS": "[]",
        "LEADER_ELECTION": "true",
        "LEASE_NAMESPACE": home,
        "LEASE_SECONDS": "3",
        "WEBHOOK_PORT": str(free_ports(1)[0]),
        "WEBHOOK_SERVICE": HOOK,
        "WEBHOOK_SECRET": f"{HOOK}-certificate",
        "WEBHOOK_CONFIGURATION": f"{HOOK}-{home}",
    }


def granted(home: str, settings: dict[str, str]) -> set[Right]:
    """The rules of the roles that are bound to the operator's account."""
    return {
        Right(group, resource, verb, each["kind"] == "Role")
        for each in account_objects(home, settings)
        for rule in each.get("rules", ())
        for group in rule["apiGroups"]
        for resource in rule["resources"]
        for verb in rule["verbs"]
    }


def story(cluster: Cluster, kubelet: FakeKubelet) -> None:
    """A run whose name is taken; a run that is suspended, resumed, finished, and deleted by its TTL."""
    foreign = {"metadata": {"name": "taken-preflight-0"}, "spec": {"containers": [{"name": "a", "image": "b"}]}}
    cluster.core.create_namespaced_pod(cluster.namespace, foreign)
    cluster.create("taken")
    cluster.wait_condition("Stalled", "NameTaken", "taken")
    cluster.delete("taken")
    run = Story(cluster, kubelet)
    cluster.create(scheduling={"gang": "volcano"}, runPolicy={"ttlSecondsAfterFinished": 0})
    run.to_training()
    cluster.edit({"runPolicy": {"suspend": True}})
    wait_for("the workers are gone", lambda: not any("train" in pod for pod in cluster.pods()))
    cluster.edit({"runPolicy": {"suspend": False}})
    run.training(attempt=2)
    run.finish("run-train-0", "train", 1, reason="PeerLost")  # is the node of the other one still there?
    run.training(attempt=3)
    for rank in (0, 1):
        run.finish(f"run-train-{rank}", "train")
    run.finish("run-publish-0", "publish")
    wait_for("its TTL deletes the run", lambda: not cluster.names())


def hook(server: ApiServer, home: str) -> None:
    """What the chart makes for the webhook, and the operator completes."""
    server.core.create_namespaced_secret(home, {"metadata": {"name": f"{HOOK}-certificate"}})
    service = {"name": HOOK, "namespace": home, "path": "/validate"}
    found = {
        "name": "runs.internvl.dev",
        "clientConfig": {"service": service},
        "sideEffects": "None",
        "admissionReviewVersions": ["v1"],
        "failurePolicy": "Ignore",
    }
    hooks: Any = client.AdmissionregistrationV1Api(server.api)
    hooks.create_validating_webhook_configuration({"metadata": {"name": f"{HOOK}-{home}"}, "webhooks": [found]})


@pytest.mark.parametrize("whole_cluster", [True, False], ids=["cluster", "namespace"])
def test_the_charts_rules_are_what_the_operator_uses(audited: ApiServer, tmp_path: Path, whole_cluster: bool) -> None:
    log = audited.control_plane.audit_log

    def used() -> set[Right]:
        """Whether a Role or a ClusterRole gives a right, not where it is used, is the chart's choice."""
        wide = {(right.group, right.resource, right.verb) for right in rules if not right.namespaced}
        return {right._replace(namespaced=right[:3] not in wide) for right in audit.used(audit.read(log))}

    with (
        audited.namespace("home") as home,
        audited.namespace("rights") as namespace,
        FakeKubelet(audited.api) as kubelet,
    ):
        settings = settings_of(home, "" if whole_cluster else namespace)
        rules = granted(home, settings)
        hook(audited, home)
        with OperatorProcess(Cluster(audited, home), tmp_path, **settings) as operator:
            story(Cluster(audited, namespace), kubelet)
            wait_for("the Lease is renewed", lambda: LEASE_RENEWED in used(), on_timeout=lambda: tail(operator.log))
    assert audit.refused(audit.read(log)) == []
    assert rules
    assert used() - rules == set(), "rights that the operator uses and the chart does not grant"
    assert rules - used() == set(), "rights that the chart grants and the operator does not use"
    if not whole_cluster:
        elsewhere = {right for right in audit.used(audit.read(log)) if not right.namespaced}
        assert {right.resource for right in elsewhere} == {"validatingwebhookconfigurations"}


def test_a_right_that_is_taken_away_is_found_in_the_log(audited: ApiServer, tmp_path: Path) -> None:
    rbac: Any = client.RbacAuthorizationV1Api(audited.api)
    with audited.namespace("rights") as namespace, OperatorProcess(Cluster(audited, namespace), tmp_path):
        role = rbac.read_namespaced_role("internvl-operator", namespace)
        role.rules = [rule for rule in role.rules if "configmaps" not in rule.resources]
        rbac.replace_namespaced_role("internvl-operator", namespace, role)
        Cluster(audited, namespace).create()
        log = audited.control_plane.audit_log

        def missed() -> bool:
            return any("configmaps" in line for line in audit.refused(audit.read(log)))

        wait_for("the log says so", missed)
    audit.forget(log)
