"""The chart, rendered by Helm itself: what a user can set, what the operator may do, and how its pod is confined."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jsonschema
import pytest
import yaml
from internvl_api import constants
from internvl_operator.settings import Settings, variable
from ivft_cluster import helm, releases
from ivft_cluster.paths import CHECKOUT
from pydantic.alias_generators import to_camel

# Settings the chart decides by itself: from other values, or fixed because the pod's ports are.
OWN_VALUES = {
    "trainer_image", "image_pull_policy", "namespaces", "gang_schedulers", "metrics_port", "liveness_port",
    "leader_election", "lease_namespace", "lease_name", "lease_identity", "webhook_port", "webhook_certificates",
    "metrics_secret", "network_policy_peers", "policy", "pod_defaults", "webhook_secret", "webhook_service",
    "webhook_configuration", "pod_security", "node_leases", "proxy", "notifications", "prices", "ca_bundle", "defaults",
}  # fmt: skip


POD_NAME = "internvl-operator-0123"  # what the kubelet puts where the manifest has a reference


def kind(objects: list[dict[str, Any]], name: str) -> list[dict[str, Any]]:
    return [each for each in objects if each["kind"] == name]


def container(values: dict[str, Any] | None = None) -> dict[str, Any]:
    (deployment,) = kind(helm.template(values), "Deployment")
    (only,) = deployment["spec"]["template"]["spec"]["containers"]
    return only


def environment(values: dict[str, Any] | None = None) -> dict[str, str]:
    return {each["name"]: each.get("value", POD_NAME) for each in container(values)["env"]}


def test_chart_makefile_and_docs_agree_on_the_oldest_kubernetes() -> None:
    described = yaml.safe_load((helm.CHART / "Chart.yaml").read_text(encoding="utf-8"))
    assert described["kubeVersion"] == f">={releases.FLOOR}.0-0"
    assert f"\nFLOOR := {releases.FLOOR}\n" in (CHECKOUT / "Makefile").read_text(encoding="utf-8")
    for page in ("README.md", "SECURITY.md", "docs/install.md"):
        assert f"Kubernetes {releases.FLOOR} or newer" in (CHECKOUT / page).read_text(encoding="utf-8"), page


def test_every_release_is_in_the_table_of_releases() -> None:
    first, *between, last = sorted(releases.RELEASES, key=lambda minor: [int(part) for part in minor.split(".")])
    table = (CHECKOUT / "docs/kubernetes.md").read_text(encoding="utf-8")
    assert f"| {last} | default of every test |" in table
    assert f"| {', '.join(between)} | can be picked: `make test KUBERNETES={between[-1]}`" in table
    assert f"| {first} | oldest supported;" in table
    readme = (CHECKOUT / "README.md").read_text(encoding="utf-8")
    assert f"The tests run on Kubernetes {releases.DEFAULT}; `KUBERNETES={releases.FLOOR}`" in " ".join(readme.split())


def test_the_makefile_names_the_floor_alone() -> None:
    """The default has one place, in releases.py."""
    makefile = (CHECKOUT / "Makefile").read_text(encoding="utf-8")
    assert releases.DEFAULT not in makefile
    assert "KUBERNETES=$(FLOOR) $(PY) -m pytest" in makefile


def test_lint_has_no_warning() -> None:
    assert helm.lint() == []


@pytest.mark.parametrize(
    ("values", "named"),
    [
        pytest.param({"watchNamespace": ["a"]}, "watchNamespace", id="top-level-typo"),
        pytest.param({"image": {"repo": "x"}}, "repo", id="nested-typo"),
        pytest.param({"settings": {"workerThread": 4}}, "workerThread", id="setting-typo"),
        pytest.param({"settings": {"workerThreads": 0}}, "/settings/workerThreads", id="setting-out-of-bounds"),
        pytest.param({"settings": {"cacheHostPath": "cache"}}, "/settings/cacheHostPath", id="relative-host-path"),
        pytest.param({"image": {"pullPolicy": "Sometimes"}}, "/image/pullPolicy", id="pull-policy"),
        pytest.param({"watchNamespaces": ["Team_A"]}, "/watchNamespaces/0", id="namespace-name"),
        pytest.param({"metrics": {"serviceMonitor": {"interval": "30"}}}, "interval", id="interval-without-unit"),
        pytest.param({"gangSchedulers": ["kueue"]}, "/gangSchedulers/0", id="kueue-has-no-pod-groups"),
        pytest.param({"podSecurity": {"runAsUser": 0}}, "runAsUser", id="root"),
        pytest.param({"podLabels": {"tier": 1}}, "/podLabels/tier", id="label-not-a-string"),
        pytest.param({"policy": {"image": []}}, "image", id="no-such-policy"),
        pytest.param({"policy": {"images": None}}, "images", id="a-policy-taken-away"),
        pytest.param({"policy": None}, "policy", id="no-policy"),
        pytest.param({"podDefaults": None}, "podDefaults", id="no-defaults"),
        pytest.param({"policy": {"images": ["a/*"]}}, "/policy/images/0", id="a-glob-in-the-policy"),
        pytest.param({"podDefaults": {"hostNetwork": True}}, "hostNetwork", id="no-such-default"),
        pytest.param({"proxy": {"noProxy": "a, b"}}, "/proxy/noProxy", id="white-space-in-no-proxy"),
        pytest.param({"proxy": {"no_proxy": "a"}}, "no_proxy", id="no-such-proxy"),
        pytest.param({"caBundle": {"configMap": "Company_CA"}}, "/caBundle/configMap", id="name-of-the-bundle"),
        pytest.param(
            {"notifications": {"url": "https://hooks.example"}}, "url", id="an-address-of-a-webhook-is-secret"
        ),
        pytest.param({"prices": {"perGpuHour": {"nvidia.com/gpu": -1}}}, "/prices/perGpuHour", id="negative-price"),
        pytest.param({"caBundle": {"secret": "ca"}}, "secret", id="a-bundle-is-no-secret"),
    ],
)
def test_schema_refuses(values: dict[str, Any], named: str) -> None:
    with pytest.raises(helm.HelmValuesError, match=named):
        helm.template(values)


def test_names_fit_whatever_the_name_of_the_release() -> None:
    """Helm allows 53 characters, a Service 63."""
    values = {"webhook": {"enabled": True}}
    objects = helm.template(values, release="x" * 53)
    services = {each["metadata"]["name"] for each in kind(objects, "Service")}
    assert {name.rpartition("-")[2] for name in services} == {"metrics", "webhook"}
    assert max(map(len, services)) <= 63


def test_foreign_service_account_needs_a_name() -> None:
    with pytest.raises(helm.HelmRenderError, match=r"serviceAccount\.name"):
        helm.template({"serviceAccount": {"create": False}})
    objects = helm.template({"serviceAccount": {"create": False, "name": "mine"}})
    assert not kind(objects, "ServiceAccount")
    assert kind(objects, "ClusterRoleBinding")[0]["subjects"][0]["name"] == "mine"


def closed_objects(schema: dict[str, Any], path: str = "") -> list[str]:
    """Paths of objects with listed properties that would let an unlisted one through."""
    inner = schema.get("properties", {})
    open_here = [path] if inner and schema.get("additionalProperties") is not False else []
    return open_here + [found for key in inner for found in closed_objects(inner[key], f"{path}/{key}")]


def test_schema_is_closed_and_covers_the_defaults() -> None:
    schema = yaml.safe_load((helm.CHART / "values.schema.json").read_text())
    values = yaml.safe_load((helm.CHART / "values.yaml").read_text())
    jsonschema.Draft7Validator.check_schema(schema)
    jsonschema.validate(values, schema)
    assert closed_objects(schema) == ["/global"]  # other charts have values there
    assert set(values) == set(schema["properties"])


def paths_of(values: dict[str, Any], *above: str) -> Iterator[tuple[tuple[str, ...], Any]]:
    for name, value in values.items():
        yield (*above, name), value
        if isinstance(value, dict):
            yield from paths_of(value, *above, name)


NULLABLE = ("podSecurity", "podDefaults", "resources")  # null removes a field or a label that has a default
DEFAULTS = yaml.safe_load((helm.CHART / "values.yaml").read_text())


@pytest.mark.parametrize(
    "path",
    [path for path, value in paths_of(DEFAULTS) if value and not {"labels", *NULLABLE} & set(path[:-1] or path)],
    ids=".".join,
)
def test_null_for_a_default_is_refused_by_name(path: tuple[str, ...]) -> None:
    values: Any = None
    for name in reversed(path):
        values = {name: values}
    with pytest.raises(helm.HelmValuesError, match=f"missing property '{path[-1]}'"):
        helm.template(values)


def test_settings_in_the_schema_have_the_operators_own_bounds() -> None:
    offered = yaml.safe_load((helm.CHART / "values.schema.json").read_text())["properties"]["settings"]["properties"]
    own = {
        to_camel(name): field
        for name, field in Settings.model_json_schema()["properties"].items()
        if name not in OWN_VALUES
    }
    assert set(offered) == set(own)
    for name, field in own.items():
        for bound in ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "enum"):
            assert offered[name].get(bound) == field.get(bound), f"{name}.{bound}"


def test_settings_are_in_the_manual() -> None:
    manual = (CHECKOUT / "docs/install.md").read_text(encoding="utf-8")
    offered = {to_camel(name) for name in Settings.model_fields if name not in OWN_VALUES}
    assert {name for name in offered if f"`{name}`" not in manual} == set()


def test_every_variable_is_one_the_operator_reads() -> None:
    settings = {
        "workerThreads": 16,
        "retryBaseSeconds": 0.5,
        "logLevel": "DEBUG",
        "workerResources": {"requests": {"cpu": 2, "memory": "4Gi"}},
    }
    env = environment(
        {
            "trainer": {"image": {"repository": "r/t", "tag": "1"}, "pullPolicy": "Always"},
            "watchNamespaces": ["a", "b"],
            "settings": settings,
        }
    )
    assert set(env) <= {variable(name) for name in Settings.model_fields}
    read = Settings.from_env(env)
    assert (read.trainer_image, read.image_pull_policy) == ("r/t:1", "Always")
    assert read.namespaces == ("a", "b")
    assert (read.worker_threads, read.retry_base_seconds, read.log_level) == (16, 0.5, "DEBUG")
    assert read.worker_resources == {"requests": {"cpu": 2, "memory": "4Gi"}}


def test_default_values_are_the_operators_defaults() -> None:
    read = Settings.from_env(environment())
    leading = {
        "leader_election": True,
        "lease_namespace": helm.NAMESPACE,
        "lease_name": "internvl-operator",
        "lease_identity": POD_NAME,
        "network_policy_peers": read.network_policy_peers,
    }
    assert read == Settings(trainer_image=read.trainer_image, **leading)
    assert read.trainer_image == "internvl-trainer:0.1.0"


def test_ports_are_where_the_probes_and_prometheus_look() -> None:
    objects = helm.template()
    read = Settings.from_env(environment())
    ports = {each["name"]: each["containerPort"] for each in container()["ports"]}
    assert ports == {"metrics": read.metrics_port, "health": read.liveness_port}
    (pod,) = [each["spec"]["template"] for each in kind(objects, "Deployment")]
    assert pod["metadata"]["annotations"]["prometheus.io/port"] == str(read.metrics_port)
    (service,) = kind(objects, "Service")
    assert service["spec"]["selector"].items() <= pod["metadata"]["labels"].items()


def operators_roles(objects: list[dict[str, Any]], *kinds: str) -> list[dict[str, Any]]:
    """The roles that a binding gives to the operator; the others are for people."""
    bound = [each["roleRef"] for each in objects if each["kind"].endswith("RoleBinding")]
    names = {(each["kind"], each["name"]) for each in bound}
    return [each for each in objects if each["kind"] in kinds and (each["kind"], each["metadata"]["name"]) in names]


def rules(objects: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [rule for each in operators_roles(objects, "Role", "ClusterRole") for rule in each["rules"]]


@pytest.mark.parametrize(
    "values", [pytest.param({}, id="cluster"), pytest.param({"watchNamespaces": ["a", "b"]}, id="namespaces")]
)
def test_operator_cannot_read_secrets_and_has_no_wildcard_rights(values: dict[str, Any]) -> None:
    granted = rules(helm.template(values))
    assert granted
    named = {word for rule in granted for word in (*rule["apiGroups"], *rule["resources"], *rule["verbs"])}
    assert not named & {"secrets", "*", "escalate", "bind", "impersonate", "pods/exec"}


def test_operator_never_writes_to_spec() -> None:
    verbs = {
        resource: set(rule["verbs"])
        for rule in rules(helm.template())
        if constants.GROUP in rule["apiGroups"]
        for resource in rule["resources"]
    }
    assert not verbs[constants.PLURAL] & {"create", "update", "patch"}
    assert "patch" in verbs[f"{constants.PLURAL}/status"]


@pytest.mark.parametrize(
    ("schedulers", "groups"),
    [
        pytest.param([], set(), id="none"),
        pytest.param(["volcano"], {"scheduling.volcano.sh"}, id="volcano"),
        pytest.param(["volcano", "coscheduling"], {"scheduling.volcano.sh", "scheduling.x-k8s.io"}, id="both"),
    ],
)
def test_pod_group_rights_cover_only_the_listed_schedulers(schedulers: list[str], groups: set[str]) -> None:
    (role,) = operators_roles(helm.template({"gangSchedulers": schedulers}), "ClusterRole")
    rules = [rule for rule in role["rules"] if "podgroups" in rule["resources"]]
    assert {group for rule in rules for group in rule["apiGroups"]} == groups
    assert all(set(rule["verbs"]) == {"get", "list", "watch", "create", "patch"} for rule in rules)
    assert environment({"gangSchedulers": schedulers})["INTERNVL_OPERATOR_GANG_SCHEDULERS"] == ",".join(schedulers)


def test_watched_namespaces_get_roles_and_no_cluster_role() -> None:
    objects = helm.template({"watchNamespaces": ["a", "b"]}, namespace="ops")
    assert not operators_roles(objects, "ClusterRole")
    assert not kind(objects, "ClusterRoleBinding")
    assert [each["metadata"]["namespace"] for each in kind(objects, "Role")] == ["ops", "a", "b"]
    for binding in kind(objects, "RoleBinding"):
        assert binding["subjects"] == [{"kind": "ServiceAccount", "name": "internvl-operator", "namespace": "ops"}]


def test_pod_meets_the_restricted_pod_security_standard() -> None:
    (deployment,) = kind(helm.template(), "Deployment")
    pod = deployment["spec"]["template"]["spec"]
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["runAsUser"] == 10001
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    context = container()["securityContext"]
    assert context["allowPrivilegeEscalation"] is False
    assert context["readOnlyRootFilesystem"] is True
    assert context["capabilities"] == {"drop": ["ALL"]}
    assert all("hostPath" not in volume for volume in pod["volumes"])


@pytest.mark.parametrize(
    ("given", "operators", "runs"),
    [
        pytest.param({"runAsUser": 2000}, (2000, 10001), {"runAsUser": 2000, "runAsGroup": 10001, "fsGroup": 10001}),
        pytest.param({"runAsUser": None, "runAsGroup": None, "fsGroup": None}, (None, None), {}),
        pytest.param({"fsGroup": None}, (10001, 10001), {"runAsUser": 10001, "runAsGroup": 10001}),
        pytest.param(None, (None, None), {}),
    ],
    ids=["another-user", "none-of-the-three", "no-fs-group", "nothing"],
)
def test_the_identity_of_pods_can_be_changed_or_left_out(
    given: Any, operators: tuple[int | None, int | None], runs: dict[str, int]
) -> None:
    (deployment,) = kind(helm.template({"podSecurity": given}), "Deployment")
    context = deployment["spec"]["template"]["spec"]["securityContext"]
    assert (context.pop("runAsUser", None), context.pop("runAsGroup", None)) == operators
    assert context == {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}}
    read = Settings.from_env(environment({"podSecurity": given}))
    assert read.operator_config().pod_security.to_dict() == runs


@pytest.mark.parametrize(
    ("values", "reads"),
    [({}, False), ({"nodeLeases": True}, True), ({"nodeLeases": True, "watchNamespaces": ["team"]}, False)],
)
def test_the_leases_of_nodes_are_read_where_the_chart_grants_it(values: dict[str, Any], reads: bool) -> None:
    roles = [role for role in kind(helm.template(values), "Role") if role["metadata"]["namespace"] == "kube-node-lease"]
    assert [rule["verbs"] for role in roles for rule in role["rules"]] == ([["get"]] if reads else [])
    assert Settings.from_env(environment(values)).node_leases == reads


def test_the_lease_is_all_that_replicas_share() -> None:
    objects = helm.template(release="mine", namespace="ops")
    (role,) = (role for role in kind(objects, "Role") if role["metadata"]["namespace"] == "ops")
    (deployment,) = kind(objects, "Deployment")
    env = deployment["spec"]["template"]["spec"]["containers"][0]["env"]
    read = Settings.from_env({each["name"]: each["value"] for each in env if "value" in each})
    named = [rule for rule in role["rules"] if "resourceNames" in rule]
    assert [(rule["resourceNames"], rule["verbs"]) for rule in named] == [([read.lease_name], ["get", "update"])]
    assert {resource for rule in role["rules"] for resource in rule["resources"]} == {"leases"}
    assert read.lease_namespace == "ops"


@pytest.mark.parametrize(
    ("values", "replicas", "budgets"),
    [
        pytest.param({}, 2, 1, id="default"),
        pytest.param({"replicas": 1}, 1, 0, id="one-has-nothing-to-keep"),
        pytest.param({"podDisruptionBudget": {"enabled": False}}, 2, 0, id="not-wanted"),
        pytest.param({"replicas": 0}, 0, 0, id="stopped"),
    ],
)
def test_replicas(values: dict[str, Any], replicas: int, budgets: int) -> None:
    objects = helm.template(values)
    (deployment,) = kind(objects, "Deployment")
    assert deployment["spec"]["replicas"] == replicas
    found = kind(objects, "PodDisruptionBudget")
    assert len(found) == budgets
    for budget in found:
        assert budget["spec"]["selector"] == deployment["spec"]["selector"]


def test_replicas_prefer_different_nodes_by_default() -> None:
    (apart,) = kind(helm.template(), "Deployment")
    (term,) = apart["spec"]["template"]["spec"]["affinity"]["podAntiAffinity"][
        "preferredDuringSchedulingIgnoredDuringExecution"
    ]
    assert term["podAffinityTerm"]["labelSelector"] == apart["spec"]["selector"]
    (told,) = kind(helm.template({"affinity": {"nodeAffinity": {}}}), "Deployment")
    assert told["spec"]["template"]["spec"]["affinity"] == {"nodeAffinity": {}}


def test_crd_is_the_generated_one() -> None:
    (crd,) = kind(helm.template(), "CustomResourceDefinition")
    generated = yaml.safe_load((CHECKOUT / "crds/internvlfinetunes.yaml").read_text())
    assert crd["spec"] == generated["spec"]
    assert crd["metadata"]["name"] == generated["metadata"]["name"]
    assert crd["metadata"]["annotations"] == {
        "argocd.argoproj.io/sync-options": "ServerSideApply=true,Prune=false,Delete=false",
        "argocd.argoproj.io/sync-wave": "-1",
        "helm.sh/resource-policy": "keep",
    }


@pytest.mark.parametrize(
    ("crds", "kept"),
    [
        pytest.param({"install": False}, None, id="not-installed"),
        pytest.param({"keep": False}, False, id="removed-with-the-release"),
    ],
)
def test_crd_installation_can_be_disabled(crds: dict[str, bool], kept: bool | None) -> None:
    found = kind(helm.template({"crds": crds}), "CustomResourceDefinition")
    policies = ["helm.sh/resource-policy" in (each["metadata"].get("annotations") or {}) for each in found]
    assert policies == ([] if kept is None else [kept])


def test_service_monitor_only_on_request() -> None:
    assert not kind(helm.template(), "ServiceMonitor")
    asked = {"metrics": {"serviceMonitor": {"enabled": True, "labels": {"release": "prom"}}}}
    (monitor,) = kind(helm.template(asked), "ServiceMonitor")
    assert monitor["metadata"]["labels"]["release"] == "prom"
    (service,) = kind(helm.template(asked), "Service")
    assert monitor["spec"]["endpoints"][0]["port"] in [port["name"] for port in service["spec"]["ports"]]
    assert monitor["spec"]["selector"]["matchLabels"].items() <= service["metadata"]["labels"].items()


def test_chart_uses_only_apis_of_the_oldest_supported_release() -> None:
    core = {"v1", "apps/v1", "policy/v1", "networking.k8s.io/v1"}
    floor = core | {"rbac.authorization.k8s.io/v1", "apiextensions.k8s.io/v1", "admissionregistration.k8s.io/v1"}
    assert {each["apiVersion"] for each in helm.template()} <= floor


def test_artifact_hub_shows_licence_and_crd() -> None:
    notes = yaml.safe_load((helm.CHART / "Chart.yaml").read_text(encoding="utf-8"))["annotations"]
    assert notes["artifacthub.io/license"] == notes["licenses"]
    (shown,) = yaml.safe_load(notes["artifacthub.io/crds"])
    (crd,) = kind(helm.template({}), "CustomResourceDefinition")
    assert (shown["name"], shown["kind"]) == (crd["metadata"]["name"], crd["spec"]["names"]["kind"])
    assert shown["version"] in [version["name"] for version in crd["spec"]["versions"]]


def test_chart_and_application_version_agree() -> None:
    chart = yaml.safe_load((helm.CHART / "Chart.yaml").read_text())
    project = (CHECKOUT / "operator/pyproject.toml").read_text()
    assert f'version = "{chart["appVersion"]}"' in project
