"""The chart on a real API server: what Helm puts there, what the operator's account may do, upgrades and removal."""

from __future__ import annotations

import base64
import json
import shutil
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import yaml
from internvl_api.constants import GROUP, PLURAL, VERSION
from internvl_api.validation.check import check_spec
from internvl_api.validation.cluster import InCluster
from internvl_api.validation.policy import Policy
from internvl_operator.certificates import issue
from internvl_operator.clock import utc_now
from internvl_operator.kube.client import Api, ApiError
from internvl_operator.kube.webhook_objects import WebhookObjects
from internvl_operator.release_check import Check, CheckFailed, Cluster, checks
from ivft_cluster import helm
from ivft_cluster.api_server import ApiServer
from ivft_cluster.paths import CHECKOUT
from ivft_cluster.shell import wait_for
from kubernetes import client

pytestmark = pytest.mark.integration

CRD = f"{PLURAL}.{GROUP}"
NAMESPACE = "team-a"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ApiServer]:
    """An API server of its own: the chart's CRD must not meet another test's."""
    with ApiServer(tmp_path_factory.mktemp("chart"), controllers=()) as running:
        for name in (NAMESPACE, "team-b"):
            running.core.create_namespace({"metadata": {"name": name}})
        yield running


@pytest.fixture
def installed(server: ApiServer, request: pytest.FixtureRequest) -> Iterator[ApiServer]:
    """The release with the values of the test's parameter, none by default."""
    helm.install(server.kubeconfig, getattr(request, "param", None), wait=False)
    yield server
    helm.uninstall(server.kubeconfig)


def operator_may(
    server: ApiServer, verb: str, resource: str, *, namespace: str = NAMESPACE, group: str = "", subresource: str = ""
) -> bool:
    """The API server's own answer for the operator's service account."""
    asked = {"verb": verb, "group": group, "resource": resource, "subresource": subresource, "namespace": namespace}
    review = {
        "spec": {
            "user": f"system:serviceaccount:{helm.NAMESPACE}:internvl-operator",
            "groups": ["system:serviceaccounts", "system:authenticated"],
            "resourceAttributes": asked,
        }
    }
    answer: Any = client.AuthorizationV1Api(server.api).create_subject_access_review(review)
    return bool(answer.status.allowed)


def create_run(server: ApiServer, **changes: Any) -> dict[str, Any]:
    example = yaml.safe_load((CHECKOUT / "examples/quickstart.yaml").read_text(encoding="utf-8"))
    example["spec"].update(changes)
    custom: Any = client.CustomObjectsApi(server.api)
    created: dict[str, Any] = custom.create_namespaced_custom_object(GROUP, VERSION, NAMESPACE, PLURAL, example)
    return created


@pytest.mark.parametrize(
    ("verb", "resource", "options"),
    [
        pytest.param("list", PLURAL, {"group": GROUP}, id="list-runs"),
        pytest.param("watch", PLURAL, {"group": GROUP}, id="watch-runs"),
        pytest.param("delete", PLURAL, {"group": GROUP}, id="delete-runs-after-their-ttl"),
        pytest.param("patch", PLURAL, {"group": GROUP, "subresource": "status"}, id="write-status"),
        pytest.param("patch", "pods", {}, id="apply-pods"),
        pytest.param("create", "services", {}, id="apply-services"),
        pytest.param("delete", "pods", {}, id="end-an-attempt"),
        pytest.param("create", "events", {}, id="tell-events"),
        pytest.param("patch", "events", {}, id="count-repeated-events"),
        pytest.param(
            "create", "leases", {"group": "coordination.k8s.io", "namespace": helm.NAMESPACE}, id="make-the-lease"
        ),
    ],
)
def test_operator_may(installed: ApiServer, verb: str, resource: str, options: dict[str, str]) -> None:
    assert operator_may(installed, verb, resource, **options)


@pytest.mark.parametrize(
    ("verb", "resource", "options"),
    [
        pytest.param("get", "secrets", {}, id="read-a-secret"),
        pytest.param("list", "secrets", {}, id="list-secrets"),
        pytest.param("delete", "configmaps", {}, id="delete-what-kubernetes-deletes-with-its-owner"),
        pytest.param("patch", PLURAL, {"group": GROUP}, id="change-a-spec"),
        pytest.param("create", "pods", {"subresource": "exec"}, id="exec-into-pods"),
        pytest.param("update", "leases", {"group": "coordination.k8s.io"}, id="change-a-lease-elsewhere"),
        pytest.param("create", "rolebindings", {"group": "rbac.authorization.k8s.io"}, id="grant-rights"),
    ],
)
def test_operator_may_not(installed: ApiServer, verb: str, resource: str, options: dict[str, str]) -> None:
    assert not operator_may(installed, verb, resource, **options)


@pytest.mark.parametrize("installed", [pytest.param({"watchNamespaces": [NAMESPACE]}, id="team-a")], indirect=True)
def test_rights_end_with_the_watched_namespaces(installed: ApiServer) -> None:
    assert operator_may(installed, "create", "pods", namespace=NAMESPACE)
    assert not operator_may(installed, "list", "pods", namespace="team-b")
    assert not operator_may(installed, "list", PLURAL, group=GROUP, namespace="team-b")


def test_the_check_of_helm_test_passes_with_an_operator_and_not_without(installed: ApiServer) -> None:
    """The API server is real; a status, which an operator would write, is written while the check waits."""
    objects: Any = client.CustomObjectsApi(installed.api)
    time, name = count(), "check"

    def sleep(_: float) -> None:
        patch = {"status": {"observedGeneration": 1}}
        objects.patch_namespaced_custom_object_status(GROUP, VERSION, NAMESPACE, PLURAL, name, patch)

    api, check = Api(installed.api.configuration, timeout=30, connections=2), Check(NAMESPACE, name)
    assert list(checks(check, Cluster(api, sleep, lambda: float(next(time)))))[-1] == "the run is deleted"
    with pytest.raises(CheckFailed, match="does it watch this namespace"):
        list(checks(check, Cluster(api, lambda _: None, lambda: float(next(time)))))
    assert objects.list_namespaced_custom_object(GROUP, VERSION, NAMESPACE, PLURAL)["items"] == []


def test_schema_refuses_a_mistake_at_apply(installed: ApiServer) -> None:
    with pytest.raises(client.ApiException, match=r"spec\.workers") as refused:
        create_run(installed, workers=0)
    assert refused.value.status == 422


HOST_PATH = {"podTemplate": {"volumes": [{"name": "host", "hostPath": {"path": "/"}}]}}
REFUSED = [  # one for each setting, and several at once: what Python finds, the server finds
    HOST_PATH,
    {"podTemplate": {"volumes": [{"name": "t", "projected": {"sources": [{"serviceAccountToken": {"path": "t"}}]}}]}},
    {"podTemplate": {"volumes": [
        {"name": "c", "csi": {"driver": "x"}}, {"name": "n", "nfs": {"server": "a", "path": "/"}},
    ]}},
    {"podTemplate": {"image": "evil.example.org/trainer:1"}},
    {"podTemplate": {"serviceAccountName": "payments"}},
    {"podTemplate": {"priorityClassName": "system-node-critical"}},
    {"podTemplate": {"labels": {"app.kubernetes.io/name": "payments"}, "annotations": {"iam.amazonaws.com/role": "a"}}},
    {"podTemplate": {"nodeSelector": {"node-role.kubernetes.io/control-plane": ""}}},
    {"podTemplate": {"tolerations": [{"key": "gpu", "operator": "Exists"}, {"operator": "Exists"}]}},
    {"podTemplate": {"affinity": {"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": {
        "nodeSelectorTerms": [{"matchExpressions": [{"key": "node-role.kubernetes.io/etcd", "operator": "Exists"}]}]
    }}}}},
    {"podTemplate": {"affinity": {"podAntiAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": [
        {"topologyKey": "kubernetes.io/hostname", "labelSelector": {}, "namespaceSelector": {}}
    ]}}}},
    {"podTemplate": {"env": [{"name": "A", "valueFrom": {"secretKeyRef": {"name": "payments", "key": "a"}}}]}},
    {"podTemplate": {"volumes": [{"name": "s", "secret": {"secretName": "payments"}}]}},
    {"secrets": {"objectStorage": "payments"}},
    {"podTemplate": {"volumes": [{"name": "c", "persistentVolumeClaim": {"claimName": "payments"}}]}},
    {"model": {"source": "pvc://payments/tiny"}},
    {"data": {"train": {"pets": {"annotation": "s3://data/pets.jsonl", "root": "pvc://payments"}}}},
    {"scheduling": {"gang": "kueue", "queue": "team-b"}},
    {"podTemplate": {"labels": {"kueue.x-k8s.io/queue-name": "team-b"}}},
    {"scheduling": {"schedulerName": "theirs"}},
]  # fmt: skip
STRICT = {
    "images": ["registry.example.org/ml/"],
    "secrets": ["s3-credentials"],
    "claims": ["data"],
    "queues": ["team-a"],
}
STRICT |= {"schedulers": []}


@pytest.mark.parametrize("installed", [pytest.param({"policy": STRICT}, id="strict")], indirect=True)
def test_the_api_server_refuses_what_the_policy_refuses(installed: ApiServer) -> None:
    custom: Any = client.CustomObjectsApi(installed.api)

    def said(changes: dict[str, Any]) -> str:
        try:
            name = create_run(installed, **changes)["metadata"]["name"]
        except client.ApiException as error:
            return str(json.loads(error.body)["message"])
        custom.delete_namespaced_custom_object(GROUP, VERSION, NAMESPACE, PLURAL, name)
        return ""

    wait_for("the API server knows the policy", lambda: said(HOST_PATH))
    example = yaml.safe_load((CHECKOUT / "examples/quickstart.yaml").read_text(encoding="utf-8"))["spec"]
    for changes in REFUSED:
        cluster = InCluster(policy=Policy.model_validate(STRICT))
        first, *_ = check_spec(example | changes, cluster).violations
        assert f"denied request: {first.field}: {first.message}" in said(changes)
    allowed = {"labels": {"team": "a", "kueue.x-k8s.io/priority-class": "high"}, "image": "registry.example.org/ml/t:1"}
    created = create_run(installed, podTemplate=allowed)
    assert created["spec"]["podTemplate"] == allowed | {
        key: value for key, value in created["spec"]["podTemplate"].items() if key not in allowed
    }

    helm.upgrade(installed.kubeconfig, {"policy": STRICT | {"labels": []}}, wait=False)
    path = GROUP, VERSION, NAMESPACE, PLURAL, created["metadata"]["name"]
    teams = count()

    def edit_refused() -> bool:
        try:
            custom.patch_namespaced_custom_object(
                *path, {"spec": {"podTemplate": {"labels": {"team": f"team-{next(teams)}"}}}}
            )
        except client.ApiException as error:
            return "spec.podTemplate.labels: found" in str(error.body)
        return False

    wait_for("the API server knows the tightened policy", edit_refused)
    custom.patch_namespaced_custom_object(*path, {"spec": {"runPolicy": {"suspend": True}}})
    custom.patch_namespaced_custom_object(*path, {"metadata": {"labels": {"team": "a"}}})
    custom.delete_namespaced_custom_object(*path)


def test_upgrade_brings_the_new_crd_and_the_new_settings(server: ApiServer, tmp_path: Path) -> None:
    older = tmp_path / "internvl-operator"
    shutil.copytree(helm.CHART, older)
    crd_file = older / "files/internvlfinetunes.yaml"
    crd = yaml.safe_load(crd_file.read_text(encoding="utf-8"))
    crd["spec"]["names"]["shortNames"] = ["older"]
    crd_file.write_text(yaml.safe_dump(crd), encoding="utf-8")

    helm.install(server.kubeconfig, chart=older, wait=False)
    assert short_names(server) == ["older"]
    helm.upgrade(server.kubeconfig, {"settings": {"workerThreads": 3}}, wait=False)
    assert short_names(server) == ["ivft"]
    apps: Any = client.AppsV1Api(server.api)
    deployment = apps.read_namespaced_deployment("internvl-operator", helm.NAMESPACE)
    env = {each.name: each.value for each in deployment.spec.template.spec.containers[0].env}
    assert env["INTERNVL_OPERATOR_WORKER_THREADS"] == "3"
    helm.uninstall(server.kubeconfig)


def test_an_upgrade_and_a_rollback_leave_a_run_and_its_children_as_they_are(installed: ApiServer) -> None:
    run = create_run(installed)
    objects: Any = client.CustomObjectsApi(installed.api)
    path = GROUP, VERSION, NAMESPACE, PLURAL, run["metadata"]["name"]
    objects.patch_namespaced_custom_object_status(*path, {"status": {"stage": "train", "attempt": 3}})
    owner = {"apiVersion": run["apiVersion"], "kind": run["kind"]} | {
        key: run["metadata"][key] for key in ("name", "uid")
    }
    child = {"metadata": {"name": "child", "ownerReferences": [owner]}}
    installed.core.create_namespaced_config_map(NAMESPACE, child)
    apps: Any = client.AppsV1Api(installed.api)

    def state() -> tuple[Any, ...]:
        kept = installed.core.read_namespaced_config_map("child", NAMESPACE)
        return objects.get_namespaced_custom_object(*path), kept.metadata.uid, kept.metadata.resource_version

    def threads() -> list[str]:
        deployment = apps.read_namespaced_deployment("internvl-operator", helm.NAMESPACE)
        env = deployment.spec.template.spec.containers[0].env
        return [each.value for each in env if each.name == "INTERNVL_OPERATOR_WORKER_THREADS"]

    before = state()
    helm.upgrade(installed.kubeconfig, {"settings": {"workerThreads": 3}}, wait=False)
    assert (threads(), state()) == (["3"], before)
    helm.rollback(installed.kubeconfig, 1, wait=False)
    assert (threads(), state()) == ([], before)
    objects.delete_namespaced_custom_object(*path)
    installed.core.delete_namespaced_config_map("child", NAMESPACE)


def short_names(server: ApiServer) -> list[str]:
    crds: Any = client.ApiextensionsV1Api(server.api)
    return list(crds.read_custom_resource_definition(CRD).spec.names.short_names)


def test_an_upgrade_keeps_the_webhooks_certificate(server: ApiServer) -> None:
    """What the operator wrote into the Secret and the configuration, which the chart renders empty."""
    values = {"webhook": {"enabled": True}}
    name = f"internvl-operator-webhook-{helm.NAMESPACE}"
    helm.install(server.kubeconfig, values, wait=False)
    api = Api(server.api.configuration, timeout=30, connections=2)
    objects = WebhookObjects(api, helm.NAMESPACE, "internvl-operator-webhook-certificate", name)
    served = issue("internvl-operator-webhook.internvl-system.svc", utc_now())
    before = objects.read()
    assert before.served == (b"", b"", b"")
    assert objects.trust(served.authorities) is None
    objects.write(before, served)
    helm.upgrade(server.kubeconfig, values | {"settings": {"workerThreads": 3}}, wait=False)
    assert objects.read().served == served
    hooks: Any = client.AdmissionregistrationV1Api(server.api)
    (hook,) = hooks.read_validating_webhook_configuration(name).webhooks
    assert base64.b64decode(hook.client_config.ca_bundle) == served.authorities
    with pytest.raises(ApiError, match="409"):
        objects.write(before, served)
    create_run(server)  # nobody answers, and nobody is held up
    helm.uninstall(server.kubeconfig)
    assert f"{name}' does not exist" in str(objects.trust(served.authorities))
    custom: Any = client.CustomObjectsApi(server.api)
    custom.delete_collection_namespaced_custom_object(GROUP, VERSION, NAMESPACE, PLURAL)


def test_uninstall_keeps_the_runs(server: ApiServer) -> None:
    helm.install(server.kubeconfig, wait=False)
    uid = create_run(server)["metadata"]["uid"]
    helm.uninstall(server.kubeconfig)
    custom: Any = client.CustomObjectsApi(server.api)
    kept = custom.list_namespaced_custom_object(GROUP, VERSION, NAMESPACE, PLURAL)["items"]
    assert [each["metadata"]["uid"] for each in kept] == [uid]
    assert not client.AppsV1Api(server.api).list_namespaced_deployment(helm.NAMESPACE).items


def test_an_absent_namespace_is_in_the_error(server: ApiServer) -> None:
    with pytest.raises(helm.HelmReleaseError, match='namespaces "nowhere" not found'):
        helm.install(server.kubeconfig, {"watchNamespaces": ["nowhere"]}, wait=False)
    helm.uninstall(server.kubeconfig)
