"""Who reaches the operator and the pods of runs over the network, as the chart renders it."""

from __future__ import annotations

from contract.test_chart import POD_NAME, container, environment, kind, rules
from internvl_operator.settings import Settings
from ivft_cluster import helm


def test_runs_admit_the_operator_and_prometheus() -> None:
    prometheus = {"namespaceSelector": {"matchLabels": {"team": "observability"}}}
    values = {"networkPolicy": {"prometheus": [prometheus]}}
    objects = helm.template(values, namespace="ops")
    (deployment,) = kind(objects, "Deployment")
    env = {each["name"]: each.get("value", POD_NAME) for each in container(values)["env"]}
    assert Settings.from_env(env).network_policy_peers == (
        {
            "namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": helm.NAMESPACE}},
            "podSelector": deployment["spec"]["selector"],
        },
        prometheus,
    )
    (policy,) = kind(objects, "NetworkPolicy")
    assert policy["spec"]["podSelector"] == deployment["spec"]["selector"]
    assert policy["spec"]["ingress"] == [
        {"ports": [{"protocol": "TCP", "port": "health"}]},
        {"from": [prometheus], "ports": [{"protocol": "TCP", "port": "metrics"}]},
    ]
    (hooked,) = kind(helm.template({"webhook": {"enabled": True}}), "NetworkPolicy")
    assert {"protocol": "TCP", "port": "webhook"} in hooked["spec"]["ingress"][0]["ports"]


def test_nobody_reads_metrics_when_no_prometheus_is_named() -> None:
    (policy,) = kind(helm.template({"networkPolicy": {"prometheus": []}}), "NetworkPolicy")
    assert policy["spec"]["ingress"] == [{"ports": [{"protocol": "TCP", "port": "health"}]}]


def test_network_policies_can_be_turned_off() -> None:
    values = {"networkPolicy": {"enabled": False}}
    objects = helm.template(values)
    assert not kind(objects, "NetworkPolicy")
    assert not [rule for rule in rules(objects) if "networkpolicies" in rule["resources"]]
    assert Settings.from_env(environment(values)).network_policy_peers is None


def test_metrics_with_a_secret_are_served_and_scraped_over_tls() -> None:
    values = {"metrics": {"secretName": "scrape", "serviceMonitor": {"enabled": True}}}
    objects = helm.template(values)
    (pod,) = [each["spec"]["template"] for each in kind(objects, "Deployment")]
    (mount,) = [each for each in pod["spec"]["containers"][0]["volumeMounts"] if each["name"] == "metrics"]
    assert {"name": "metrics", "secret": {"secretName": "scrape"}} in pod["spec"]["volumes"]
    assert str(Settings.from_env(environment(values)).metrics_secret) == mount["mountPath"]
    assert pod["metadata"]["annotations"]["prometheus.io/scheme"] == "https"
    (endpoint,) = kind(objects, "ServiceMonitor")[0]["spec"]["endpoints"]
    assert endpoint["scheme"] == "https"
    assert endpoint["authorization"] == {"credentials": {"name": "scrape", "key": "token"}}
    (service,) = kind(objects, "Service")
    assert endpoint["tlsConfig"]["serverName"].startswith(service["metadata"]["name"] + ".")
