"""What people may do with runs, and what runs may ask for their pods, as the chart renders it."""

from __future__ import annotations

import json
from typing import Any

import pytest
from contract.test_chart import environment, kind
from internvl_api import constants
from internvl_api.admission_policy import build_admission_policy
from internvl_api.spec.defaults import Defaults
from internvl_api.validation.policy import Policy
from internvl_operator.settings import Settings
from ivft_cluster import helm
from ivft_cluster.paths import CHECKOUT

POLICY, BINDING = "ValidatingAdmissionPolicy", "ValidatingAdmissionPolicyBinding"
CHANGED = {"images": ["registry.example.org/ml/"], "serviceAccounts": [], "labels": ["*", "team.example.org/"]}


@pytest.mark.parametrize("changed", [{}, CHANGED], ids=["default", "changed"])
def test_operator_and_api_server_have_the_same_policy(changed: dict[str, Any]) -> None:
    values = {"policy": changed}
    (policy,) = kind(helm.template(values), POLICY)
    read = Settings.from_env(environment(values)).policy
    assert read == Policy.model_validate(changed)
    built, variables = build_admission_policy(), policy["spec"]["variables"]
    lists, found = variables[: len(built["settings"])], variables[len(built["settings"]) :]
    assert {each["name"]: json.loads(each["expression"]) for each in lists} == read.to_dict()
    assert [each["name"] for each in lists] == built["settings"]
    assert found == built["variables"]
    assert policy["spec"]["validations"] == built["validations"]
    assert policy["spec"]["matchConditions"] == built["matchConditions"]


def test_the_policy_is_about_runs_and_binds() -> None:
    objects = helm.template(namespace="ops")
    (policy,), (binding,) = kind(objects, POLICY), kind(objects, BINDING)
    assert policy["spec"]["failurePolicy"] == "Fail"
    (rule,) = policy["spec"]["matchConstraints"]["resourceRules"]
    assert (rule["apiGroups"], rule["resources"]) == ([constants.GROUP], [constants.PLURAL])
    assert binding["spec"] == {"policyName": policy["metadata"]["name"], "validationActions": ["Deny"]}
    (other,) = kind(helm.template(namespace="elsewhere"), POLICY)
    assert other["metadata"]["name"] != policy["metadata"]["name"], "two releases in one cluster"


def test_the_policy_holds_in_the_watched_namespaces_only() -> None:
    (binding,) = kind(helm.template({"watchNamespaces": ["a", "b"]}), BINDING)
    (expression,) = binding["spec"]["matchResources"]["namespaceSelector"]["matchExpressions"]
    assert expression == {"key": "kubernetes.io/metadata.name", "operator": "In", "values": ["a", "b"]}


def test_without_admission_the_operator_alone_refuses() -> None:
    values = {"policy": {"admission": False, "images": []}}
    objects = helm.template(values)
    assert not kind(objects, POLICY)
    assert not kind(objects, BINDING)
    assert Settings.from_env(environment(values)).policy == Policy(images=())


def test_the_render_is_the_same_each_time() -> None:
    assert helm.template() == helm.template()


def test_pod_defaults_reach_the_operator() -> None:
    defaults = {"nodeSelector": {"pool": "ml"}, "tolerations": [{"key": "ml"}], "securityContext": {"runAsUser": 5}}
    read = Settings.from_env(environment({"podDefaults": defaults})).pod_defaults
    assert read.to_dict() == defaults | {"imagePullSecrets": []}


def test_defaults_of_runs_reach_the_operator() -> None:
    defaults = {"outputPrefix": "s3://all", "podTemplate": {"image": "x", "labels": {"a": "b"}}}
    assert Settings.from_env(environment({"defaults": defaults})).defaults.written() == defaults


def test_the_schema_of_defaults_has_the_fields_of_a_spec() -> None:
    schema = json.loads((helm.CHART / "values.schema.json").read_text())["properties"]["defaults"]["properties"]
    for name, field in Defaults.model_json_schema(by_alias=True)["properties"].items():
        below = field.get("$ref", "").rpartition("/")[2]
        wanted = Defaults.model_json_schema(by_alias=True)["$defs"][below]["properties"] if below else {}
        assert set(schema[name].get("properties", {})) == set(wanted), name


def aggregated(objects: list[dict[str, Any]]) -> dict[str, dict[str, set[str]]]:
    """Role of Kubernetes -> resource -> verbs that the chart adds to it."""
    found: dict[str, dict[str, set[str]]] = {}
    for role in kind(objects, "ClusterRole"):
        for label in role["metadata"]["labels"]:
            _, to, name = label.partition("aggregate-to-")
            if to:
                found[name] = {each: set(rule["verbs"]) for rule in role["rules"] for each in rule["resources"]}
    return found


@pytest.mark.parametrize("values", [{}, {"watchNamespaces": ["a"]}], ids=["cluster", "namespaces"])
def test_view_edit_and_admin_get_rights_to_runs(values: dict[str, Any]) -> None:
    found, runs, status = aggregated(helm.template(values)), constants.PLURAL, f"{constants.PLURAL}/status"
    read = {"get", "list", "watch"}
    assert found["view"] == {runs: read, status: {"get"}}
    assert found["edit"] == {runs: read | {"create", "update", "patch", "delete"}, status: {"get"}}
    assert found["admin"] == {runs: found["edit"][runs] | {"deletecollection"}, status: {"get"}}
    assert set(found) == {"view", "edit", "admin"}


def test_aggregated_roles_can_be_turned_off() -> None:
    assert aggregated(helm.template({"aggregatedRoles": {"enabled": False}})) == {}


def test_the_manual_has_every_list_of_the_policy() -> None:
    manual = (CHECKOUT / "docs/security.md").read_text(encoding="utf-8")
    for name, entries in Policy().to_dict().items():
        (row,) = [line for line in manual.splitlines() if line.startswith("|") and f"`{name}`" in line.split("|")[1]]
        assert [each for each in entries if f"`{each}`" not in row] == []  # type: ignore[attr-defined]
