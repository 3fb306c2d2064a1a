"""The chart's rules are what the operator uses: no right is missing, none is unused.

The operator runs with the chart's service account on an audited API server, through a story with everything in it.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from controller.operator_process import Cluster, OperatorProcess
from controller.pod_groups import install_pod_groups
from controller.story import Story
from ivft_cluster import helm
from ivft_cluster.api_server import ApiServer
from ivft_cluster.fake_kubelet import FakeKubelet
from ivft_cluster.ports import free_ports
from ivft_cluster.shell import tail, wait_for

pytestmark = pytest.mark.integration

VALUES = {"gangSchedulers": ["volcano"], "webhook": {"enabled": True}}
ACCOUNT = "internvl-operator"
SETTINGS = {
    "NAMESPACES": "",
    "GANG_SCHEDULERS": "volcano",
    "NETWORK_POLICY_PEERS": "[]",
    "LEADER_ELECTION": "true",
    "LEASE_NAMESPACE": helm.NAMESPACE,
    "LEASE_NAME": "internvl-operator",
    "LEASE_SECONDS": "3",
    "WEBHOOK_SECRET": "internvl-operator-webhook-certificate",
    "WEBHOOK_CONFIGURATION": f"internvl-operator-webhook-{helm.NAMESPACE}",
}
Right = tuple[str, str, str]  # API group, resource, verb


@pytest.fixture
def audited(tmp_path: Path) -> Iterator[ApiServer]:
    with ApiServer(tmp_path / "server", audited=True) as server:
        helm.install(server.kubeconfig, VALUES, wait=False)
        install_pod_groups(server)
        yield server


def kubeconfig_of_the_account(server: ApiServer, path: Path) -> Path:
    """Like the administrator's, with a token of the operator's service account."""
    body = {"spec": {"expirationSeconds": 3600}}
    token = server.core.create_namespaced_service_account_token(ACCOUNT, helm.NAMESPACE, body).status.token
    config = yaml.safe_load(server.kubeconfig.read_text(encoding="utf-8"))
    config["users"][0]["user"] = {"token": token}
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    return path


def requests(server: ApiServer) -> list[dict[str, Any]]:
    """What the operator asked for."""
    lines = server.control_plane.audit_log.read_text(encoding="utf-8").splitlines()
    events = [json.loads(line) for line in lines]
    name = f"system:serviceaccount:{helm.NAMESPACE}:{ACCOUNT}"
    return [event for event in events if event["user"]["username"] == name and "objectRef" in event]


def used(events: list[dict[str, Any]]) -> set[Right]:
    found = set()
    for event in events:
        about = event["objectRef"]
        resource = "/".join(filter(None, (about["resource"], about.get("subresource"))))
        found.add((about.get("apiGroup", ""), resource, event["verb"]))
        if (
            event["verb"] == "patch" and event.get("responseStatus", {}).get("code") == 201
        ):  # applied, and created by it
            found.add((about.get("apiGroup", ""), resource, "create"))
    return found


def granted() -> set[Right]:
    """The rules of the roles that are bound to the operator's account."""
    objects = helm.template(VALUES)
    bound = {each["roleRef"]["name"] for each in objects if each["kind"].endswith("RoleBinding") if is_ours(each)}
    roles = [each for each in objects if each["kind"] in ("Role", "ClusterRole") and each["metadata"]["name"] in bound]
    return {
        (group, resource, verb)
        for role in roles
        for rule in role["rules"]
        for group in rule["apiGroups"]
        for resource in rule["resources"]
        for verb in rule["verbs"]
    }


def is_ours(binding: dict[str, Any]) -> bool:
    return ACCOUNT in {subject["name"] for subject in binding["subjects"]}


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
    for rank in (0, 1):
        run.finish(f"run-train-{rank}", "train")
    run.finish("run-publish-0", "publish")
    wait_for("its TTL deletes the run", lambda: not cluster.names())


def test_the_charts_rules_are_what_the_operator_uses(audited: ApiServer, tmp_path: Path) -> None:
    with audited.namespace("rights") as namespace, FakeKubelet(audited.api) as kubelet:
        cluster = Cluster(audited, namespace)
        config = kubeconfig_of_the_account(audited, tmp_path / "operator.kubeconfig")
        settings = SETTINGS | {"WEBHOOK_PORT": str(free_ports(1)[0])}
        with OperatorProcess(cluster, tmp_path, config, **settings) as operator:
            story(cluster, kubelet)

            def renewed() -> bool:
                return ("coordination.k8s.io", "leases", "update") in used(requests(audited))

            wait_for("the Lease is renewed", renewed, on_timeout=lambda: tail(operator.log))
    events = requests(audited)
    assert granted()
    refused = {
        (event["verb"], event["objectRef"]["resource"])
        for event in events
        if event.get("responseStatus", {}).get("code") == 403
    }
    assert refused == set()
    assert used(events) - granted() == set(), "rights that the operator uses and the chart does not grant"
    assert granted() - used(events) == set(), "rights that the chart grants and the operator does not use"
