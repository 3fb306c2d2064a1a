"""The admission webhook, as the chart renders it: whose certificate it has, and who may write that."""

from __future__ import annotations

from typing import Any

import pytest
from contract.test_chart import POD_NAME, environment, kind
from internvl_operator import webhook
from internvl_operator.settings import Settings
from ivft_cluster import helm


def test_no_webhook_unless_asked_for() -> None:
    objects = helm.template()
    assert not kind(objects, "ValidatingWebhookConfiguration")
    assert not kind(objects, "Secret")
    assert Settings.from_env(environment()).webhook_port is None


def test_the_operator_may_write_its_webhooks_certificate_and_no_other_secret() -> None:
    values = {"webhook": {"enabled": True}, "watchNamespaces": ["a"]}
    objects = helm.template(values, namespace="ops")
    (configuration,) = kind(objects, "ValidatingWebhookConfiguration")
    (hook,) = configuration["webhooks"]
    (secret,) = kind(objects, "Secret")
    (service,) = [each for each in kind(objects, "Service") if each["metadata"]["name"].endswith("-webhook")]
    assert hook["failurePolicy"] == "Ignore"
    assert hook["clientConfig"] == {
        "service": {"name": service["metadata"]["name"], "namespace": "ops", "path": webhook.PATH}
    }
    assert "data" not in secret, "the chart holds no key"
    (deployment,) = kind(objects, "Deployment")
    (pod,) = deployment["spec"]["template"]["spec"]["containers"]
    read = Settings.from_env({each["name"]: each.get("value", POD_NAME) for each in pod["env"]})
    assert (read.webhook_secret, read.webhook_service) == (secret["metadata"]["name"], service["metadata"]["name"])
    assert read.webhook_configuration == configuration["metadata"]["name"]
    assert read.lease_namespace == secret["metadata"]["namespace"] == "ops"
    assert {each["name"]: each["containerPort"] for each in pod["ports"]}["webhook"] == read.webhook_port
    assert rights_to(objects, "secrets") == [("Role", "ops", [read.webhook_secret], ["get", "update"])]
    configurations = rights_to(objects, "validatingwebhookconfigurations")
    assert configurations == [("ClusterRole", None, [read.webhook_configuration], ["get", "patch"])]


def rights_to(objects: list[dict[str, Any]], resource: str) -> list[tuple[str, str | None, list[str], list[str]]]:
    """Kind of role, its namespace, the objects by name and the verbs."""
    return [
        (each["kind"], each["metadata"].get("namespace"), rule["resourceNames"], rule["verbs"])
        for each in kind(objects, "Role") + kind(objects, "ClusterRole")
        for rule in each["rules"]
        if resource in rule["resources"]
    ]


@pytest.mark.parametrize(
    "values",
    [
        pytest.param({}, id="default"),
        pytest.param({"webhook": {"enabled": True}}, id="webhook"),
        pytest.param(
            {"webhook": {"enabled": True, "certManager": {"enabled": True, "issuerRef": {"name": "a"}}}},
            id="cert-manager",
        ),
    ],
)
def test_two_renders_are_equal(values: dict[str, Any]) -> None:
    assert helm.template(values) == helm.template(values)


def test_cert_manager_issues_the_certificate_where_it_is_told_to() -> None:
    asked = {"webhook": {"enabled": True, "certManager": {"enabled": True, "issuerRef": {"name": "internal"}}}}
    objects = helm.template(asked, namespace="ops")
    (certificate,) = kind(objects, "Certificate")
    (configuration,) = kind(objects, "ValidatingWebhookConfiguration")
    assert not kind(objects, "Secret")
    assert not rights_to(objects, "secrets") + rights_to(objects, "validatingwebhookconfigurations")
    (pod,) = [each["spec"]["template"]["spec"] for each in kind(objects, "Deployment")]
    (mount,) = [each for each in pod["containers"][0]["volumeMounts"] if each["name"] == "webhook"]
    assert {"name": "webhook", "secret": {"secretName": certificate["spec"]["secretName"]}} in pod["volumes"]
    read = Settings.from_env(environment(asked))
    assert (str(read.webhook_certificates), read.webhook_secret) == (mount["mountPath"], None)
    assert certificate["spec"]["issuerRef"] == {"name": "internal"}
    injected = configuration["metadata"]["annotations"]["cert-manager.io/inject-ca-from"]
    assert injected == f"ops/{certificate['metadata']['name']}"
    with pytest.raises(helm.HelmRenderError, match=r"webhook\.certManager\.issuerRef"):
        helm.template({"webhook": {"enabled": True, "certManager": {"enabled": True}}})
