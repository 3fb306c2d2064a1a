"""Every value of the chart does something: rendered by Helm, another value gives other objects, and valid ones."""

from __future__ import annotations

import copy
import functools
import json
from typing import Any

import pytest
import yaml
from contract.test_chart import container, environment, kind
from internvl_operator.settings import Settings
from ivft_cluster import helm

DIGEST = "sha256:" + "a" * 64
SELECTOR = {"app.kubernetes.io/name": "internvl-operator", "app.kubernetes.io/instance": helm.RELEASE}

# Another value for each, and the values without which it has no effect.
OTHERS: dict[str, Any] = {
    "global.imageRegistry": "registry.example.org",
    "global.imagePullSecrets": [{"name": "pull"}],
    "nameOverride": "tuner",
    "fullnameOverride": "tuner",
    "commonLabels": {"team": "ml"},
    "image.registry": "registry.example.org",
    "image.repository": "other",
    "image.tag": "2.0",
    "image.digest": DIGEST,
    "image.pullPolicy": "Always",
    "trainer.image.registry": "registry.example.org",
    "trainer.image.repository": "other",
    "trainer.image.tag": "2.0",
    "trainer.image.digest": DIGEST,
    "trainer.pullPolicy": "Always",
    "imagePullSecrets": [{"name": "pull"}],
    "replicas": 3,
    "podDisruptionBudget.enabled": False,
    "podDisruptionBudget.maxUnavailable": "50%",
    "strategy": {"type": "Recreate"},
    "revisionHistoryLimit": 1,
    "webhook.enabled": True,
    "webhook.failurePolicy": ("Fail", {"webhook": {"enabled": True}}),
    "webhook.certManager.enabled": (
        True,
        {"webhook": {"enabled": True, "certManager": {"issuerRef": {"kind": "Issuer", "name": "a"}}}},
    ),
    "webhook.certManager.issuerRef": (
        {"kind": "ClusterIssuer", "name": "b"},
        {"webhook": {"enabled": True, "certManager": {"enabled": True, "issuerRef": {"kind": "Issuer", "name": "a"}}}},
    ),
    "watchNamespaces": ["team-a"],
    "gangSchedulers": ["volcano"],
    "nodeLeases": True,
    "podDefaults.nodeSelector": {"pool": "gpu"},
    "podDefaults.cpuNodeSelector": {"pool": "cpu"},
    "podDefaults.tolerations": [{"key": "gpu", "operator": "Exists"}],
    "podDefaults.imagePullSecrets": [{"name": "pull"}],
    "podDefaults.securityContext": {"supplementalGroups": [2000]},
    "defaults": {"outputPrefix": "s3://all/runs"},
    "proxy.http": "http://proxy.example:8080",
    "proxy.https": "http://proxy.example:3128",
    "proxy.noProxy": "10.0.0.0/8",
    "caBundle.configMap": "company-ca",
    "caBundle.key": ("all.pem", {"caBundle": {"configMap": "company-ca"}}),
    "notifications.secretName": "webhooks",
    "prices.currency": ("EUR", {"prices": {"perGpuHour": {"nvidia.com/gpu": 2.5}}}),
    "prices.perGpuHour": {"nvidia.com/gpu": 2.5},
    "aggregatedRoles.enabled": False,
    "podSecurity.runAsUser": None,
    "podSecurity.runAsGroup": None,
    "podSecurity.fsGroup": None,
    "settings": {"logLevel": "DEBUG"},
    "test.enabled": False,
    "test.namespace": "team-a",
    "test.run": {"workers": 1},
    "test.timeoutSeconds": 900,
    "crds.install": False,
    "crds.keep": False,
    "serviceAccount.create": (False, {"serviceAccount": {"name": "mine"}}),
    "serviceAccount.name": "mine",
    "serviceAccount.annotations": {"eks.amazonaws.com/role-arn": "arn:aws:iam::1:role/x"},
    "networkPolicy.enabled": False,
    "networkPolicy.prometheus": [],
    "metrics.annotations": False,
    "metrics.secretName": "scrape",
    "metrics.serviceMonitor.enabled": True,
    "metrics.serviceMonitor.interval": ("5s", {"metrics": {"serviceMonitor": {"enabled": True}}}),
    "metrics.serviceMonitor.labels": ({"release": "p"}, {"metrics": {"serviceMonitor": {"enabled": True}}}),
    "metrics.podMonitor.enabled": True,
    "metrics.podMonitor.interval": ("5s", {"metrics": {"podMonitor": {"enabled": True}}}),
    "metrics.podMonitor.labels": ({"release": "p"}, {"metrics": {"podMonitor": {"enabled": True}}}),
    "prometheusRule.enabled": True,
    "prometheusRule.labels": ({"release": "p"}, {"prometheusRule": {"enabled": True}}),
    "prometheusRule.disabled": (["InternVLRunFailed"], {"prometheusRule": {"enabled": True}}),
    "prometheusRule.overrides": ({"InternVLRunFailed": {"for": "1h"}}, {"prometheusRule": {"enabled": True}}),
    "dashboards.enabled": True,
    "dashboards.labels": ({"other": "1"}, {"dashboards": {"enabled": True}}),
    "dashboards.annotations": ({"grafana_folder": "InternVL"}, {"dashboards": {"enabled": True}}),
    "resources": {"limits": {"memory": "1Gi"}},
    "podAnnotations": {"a": "b"},
    "podLabels": {"a": "b"},
    "nodeSelector": {"pool": "cpu"},
    "tolerations": [{"key": "x", "operator": "Exists"}],
    "affinity": {"nodeAffinity": {}},
    "topologySpreadConstraints": [
        {"maxSkew": 1, "topologyKey": "topology.kubernetes.io/zone", "whenUnsatisfiable": "ScheduleAnyway"}
    ],
    "priorityClassName": "high",
    "extraEnv": [{"name": "HTTPS_PROXY", "value": "http://proxy:3128"}],
    "extraVolumes": [{"name": "ca", "configMap": {"name": "ca"}}],
    "extraVolumeMounts": [{"name": "ca", "mountPath": "/etc/ca"}],
    "extraContainers": [{"name": "proxy", "image": "proxy:1"}],
    "extraInitContainers": [{"name": "wait", "image": "wait:1"}],
    "deploymentAnnotations": {"reloader": "auto"},
    "podSpec": {"dnsPolicy": "Default", "hostAliases": [{"ip": "10.0.0.1", "hostnames": ["store"]}]},
    "podSecurityContext": {"seLinuxOptions": {"level": "s0:c1,c2"}},
    "containerSecurityContext": {"appArmorProfile": {"type": "RuntimeDefault"}},
    "livenessProbe": {"timeoutSeconds": 10},
    "readinessProbe": {"initialDelaySeconds": 5},
    "service.ipFamilyPolicy": "PreferDualStack",
    "service.ipFamilies": ["IPv6"],
    "extraObjects": [{"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "{{ .Release.Name }}-x"}}],
}
LEFT = ("policy.",)  # tests/contract/test_chart_policy.py sets each of its rules


def leaves(values: dict[str, Any], schema: dict[str, Any], path: str = "") -> list[str]:
    found = []
    for name, default in values.items():
        inner, where = schema["properties"][name], f"{path}{name}"
        found += leaves(default, inner, f"{where}.") if inner.get("properties") and default else [where]
    return found


def nested(path: str, value: Any) -> dict[str, Any]:
    for part in reversed(path.split(".")):
        value = {part: value}
    return dict(value)


def merged(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    out = copy.deepcopy(base)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(out.get(key), dict)
        out[key] = merged(out[key], value) if both else value
    return out


def rendered(values: dict[str, Any]) -> dict[tuple[str, str, str], dict[str, Any]]:
    objects = [*helm.template(values), *helm.hooks(values)]
    by_key = {(each["kind"], each["metadata"].get("namespace", ""), each["metadata"]["name"]): each for each in objects}
    assert len(by_key) == len(objects), "two objects of one name"
    return by_key


def test_every_value_is_tried() -> None:
    values = yaml.safe_load((helm.CHART / "values.yaml").read_text())
    schema = yaml.safe_load((helm.CHART / "values.schema.json").read_text())
    here = {path for path in leaves(values, schema) if not path.startswith(LEFT)}
    assert here == set(OTHERS)


@pytest.mark.parametrize("path", OTHERS)
def test_another_value_gives_other_objects(path: str) -> None:
    other = OTHERS[path]
    value, needed = other if isinstance(other, tuple) else (other, {})
    assert rendered(merged(needed, nested(path, value))) != without(json.dumps(needed))


@functools.cache
def without(values: str) -> dict[tuple[str, str, str], dict[str, Any]]:
    return rendered(json.loads(values))


def selects(objects: dict[tuple[str, str, str], dict[str, Any]]) -> None:
    """The Deployment's selector and every Service's select the operator's pod."""
    (deployment,) = [each for each in objects.values() if each["kind"] == "Deployment"]
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    assert deployment["spec"]["selector"]["matchLabels"].items() <= labels.items()
    for service in (each for each in objects.values() if each["kind"] == "Service"):
        assert service["spec"]["selector"].items() <= labels.items()


@pytest.mark.parametrize("values", [
    {"podLabels": {"app.kubernetes.io/version": "mine", "helm.sh/chart": "mine"}},
    {"commonLabels": {"app.kubernetes.io/managed-by": "argo", "team": "ml"}},
    {"nameOverride": "tuner", "webhook": {"enabled": True}},
    {"fullnameOverride": "tuner", "podLabels": {"team": "ml"}},
], ids=str)  # fmt: skip
def test_labels_of_a_user_replace_the_charts_and_selectors_still_match(values: dict[str, Any]) -> None:
    objects = rendered(values)
    selects(objects)
    (deployment,) = [each for each in objects.values() if each["kind"] == "Deployment"]
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    assert (values.get("commonLabels", {}) | values.get("podLabels", {})).items() <= labels.items()
    for each in objects.values():
        assert values.get("commonLabels", {}).items() <= each["metadata"]["labels"].items(), each["kind"]


@pytest.mark.parametrize("value", ["podLabels", "commonLabels"])
@pytest.mark.parametrize("label", SELECTOR)
def test_labels_of_the_selector_are_fixed(value: str, label: str) -> None:
    with pytest.raises(helm.HelmValuesError, match=f"/{value}/{label.replace('/', '~1')}"):
        helm.template({value: {label: "mine"}})


def test_no_key_is_written_twice() -> None:
    """A YAML parser takes the last of two equal keys; an API server may take neither."""
    values = {
        "podAnnotations": {"prometheus.io/port": "1", "kubectl.kubernetes.io/default-container": "x"},
        "podLabels": {"helm.sh/chart": "mine"},
        "metrics": {"serviceMonitor": {"enabled": True, "labels": {"helm.sh/chart": "mine"}}},
    }
    (deployment,) = kind(helm.template(values), "Deployment")
    assert deployment["spec"]["template"]["metadata"]["annotations"]["prometheus.io/port"] == "1"
    with helm.helm_python.Chart.load(helm.CHART) as chart:
        files = chart.render(values, name=helm.RELEASE, namespace=helm.NAMESPACE)
    for text in (text for path, text in files.items() if not path.endswith("NOTES.txt")):
        for node in filter(None, yaml.compose_all(text)):
            refuse_repeated_keys(node)


def refuse_repeated_keys(node: yaml.Node) -> None:
    if isinstance(node, yaml.MappingNode):
        keys = [key.value for key, _ in node.value]
        assert len(keys) == len(set(keys)), keys
        for _, value in node.value:
            refuse_repeated_keys(value)
    elif isinstance(node, yaml.SequenceNode):
        for value in node.value:
            refuse_repeated_keys(value)


@pytest.mark.parametrize(("values", "operator", "trainer"), [
    ({}, "internvl-operator:0.1.0", "internvl-trainer:0.1.0"),
    ({"global": {"imageRegistry": "r.org/ml/"}}, "r.org/ml/internvl-operator:0.1.0", "r.org/ml/internvl-trainer:0.1.0"),
    ({"global": {"imageRegistry": "r.org"}, "image": {"registry": "own.org", "digest": DIGEST},
      "trainer": {"image": {"tag": "1.2-cu13"}}},
     f"own.org/internvl-operator@{DIGEST}", "r.org/internvl-trainer:1.2-cu13"),
])  # fmt: skip
def test_references_of_the_images(values: dict[str, Any], operator: str, trainer: str) -> None:
    assert container(values)["image"] == operator
    assert Settings.from_env(environment(values)).trainer_image == trainer


def test_pull_secrets_reach_the_operator_and_the_pods_of_runs_once() -> None:
    values = {
        "global": {"imagePullSecrets": [{"name": "shared"}]},
        "imagePullSecrets": [{"name": "own"}, {"name": "shared"}],
        "podDefaults": {"imagePullSecrets": [{"name": "runs"}]},
    }
    (deployment,) = kind(helm.template(values), "Deployment")
    assert deployment["spec"]["template"]["spec"]["imagePullSecrets"] == [{"name": "own"}, {"name": "shared"}]
    read = Settings.from_env(environment(values)).pod_defaults
    assert list(read.image_pull_secrets) == [{"name": "runs"}, {"name": "shared"}]


def test_extra_objects_may_be_templates_and_belong_to_the_release() -> None:
    text = "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: '{{ .Release.Name }}-text'}\n"
    objects = rendered({"extraObjects": [OTHERS["extraObjects"][0], text]})
    assert {("ConfigMap", "", f"{helm.RELEASE}-x"), ("ConfigMap", "", f"{helm.RELEASE}-text")} <= set(objects)


def test_more_of_the_pod_is_merged_over_the_charts_own() -> None:
    values = {
        "livenessProbe": {"timeoutSeconds": 10},
        "containerSecurityContext": {"readOnlyRootFilesystem": False},
        "podSpec": {"runtimeClassName": "gvisor"},
        "extraContainers": [{"name": "proxy", "image": "proxy:1"}],
    }
    (deployment,) = kind(helm.template(values), "Deployment")
    pod = deployment["spec"]["template"]["spec"]
    operator, proxy = pod["containers"]
    assert (pod["runtimeClassName"], proxy["name"]) == ("gvisor", "proxy")
    assert operator["livenessProbe"] == {
        "httpGet": {"path": "/healthz", "port": "health"},
        "periodSeconds": 20,
        "timeoutSeconds": 10,
        "failureThreshold": 3,
    }
    assert operator["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": False,
        "capabilities": {"drop": ["ALL"]},
    }


def test_the_ip_families_are_those_of_every_service() -> None:
    values = {"webhook": {"enabled": True}, "service": {"ipFamilyPolicy": "SingleStack", "ipFamilies": ["IPv6"]}}
    services = kind(helm.template(values), "Service")
    found = [(each["spec"]["ipFamilyPolicy"], each["spec"]["ipFamilies"]) for each in services]
    assert found == [("SingleStack", ["IPv6"])] * 2


@pytest.mark.parametrize(("values", "named"), [
    ({"podSpec": {"containers": []}}, "containers"),
    ({"podSecurityContext": {"runAsUser": 5}}, "runAsUser"),
    ({"readinessProbe": {"httpGet": {}}}, "httpGet"),
    ({"service": {"ipFamilies": ["IPv5"]}}, "ipFamilies"),
], ids=str)  # fmt: skip
def test_what_the_chart_decides_is_refused_there(values: dict[str, Any], named: str) -> None:
    with pytest.raises(helm.HelmValuesError, match=named):
        helm.template(values)


def test_settings_are_not_set_behind_the_schemas_back() -> None:
    with pytest.raises(helm.HelmValuesError, match="extraEnv"):
        helm.template({"extraEnv": [{"name": "INTERNVL_OPERATOR_LOG_LEVEL", "value": "DEBUG"}]})


def test_two_renders_are_equal() -> None:
    """Argo CD compares renders: one that differs keeps an application OutOfSync."""
    everything = {"webhook": {"enabled": True}, "dashboards": {"enabled": True}, "prometheusRule": {"enabled": True}}
    assert rendered(everything) == rendered(everything)
