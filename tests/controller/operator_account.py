"""The chart's ServiceAccount on a test's API server: an operator process has the rights that the chart gives it."""

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from ivft_cluster import helm
from ivft_cluster.api_server import ApiServer
from ivft_cluster.audit import ACCOUNT
from ivft_cluster.shell import wait_for
from kubernetes import client
from kubernetes.client.exceptions import ApiException

Raw = dict[str, Any]
_HOME = "home-of-the-operator"


def make_account(server: ApiServer, home: str, settings: dict[str, str]) -> str:
    """A token of the account in the namespace `home`, with the chart's rights for an operator with these settings."""
    objects = account_objects(home, settings)
    for each in objects:
        _create(server, each)
    user = f"system:serviceaccount:{home}:{ACCOUNT}"
    for each in objects:
        if each["kind"] in ("Role", "ClusterRole"):  # the authorizer learns of a role and of its binding from watches
            wait_for("the operator has its rights", functools.partial(_has_rights, server, user, each))
    body = {"spec": {"expirationSeconds": 7200}}
    return str(server.core.create_namespaced_service_account_token(ACCOUNT, home, body).status.token)


def kubeconfig_with(token: str, kubeconfig: Path, path: Path) -> Path:
    """Like `kubeconfig`, for the user of the token."""
    config = yaml.safe_load(kubeconfig.read_text(encoding="utf-8"))
    config["users"][0]["user"] = {"token": token}
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    return path


def account_objects(home: str, settings: dict[str, str]) -> list[Raw]:
    """The ServiceAccount and its roles. Names of cluster-wide objects end with `home`: each operator has its own."""
    watched = (_HOME if name == home else name for name in settings.get("NAMESPACES", "").split(",") if name)
    text = _rendered(
        tuple(watched),
        settings.get("GANG_SCHEDULERS", ""),
        "WEBHOOK_SECRET" in settings,
        settings.get("NODE_LEASES") == "true",
    )
    found: list[Raw] = yaml.safe_load(text.replace(_HOME, home))
    for each in found:
        if each["kind"].startswith("Cluster"):
            each["metadata"]["name"] += f"-{home}"
        if each.get("roleRef", {}).get("kind") == "ClusterRole":
            each["roleRef"]["name"] += f"-{home}"
    return found


@functools.cache
def _rendered(watched: tuple[str, ...], schedulers: str, webhook: bool, node_leases: bool) -> str:
    values: Raw = {"watchNamespaces": [*watched], "webhook": {"enabled": webhook}, "nodeLeases": node_leases}
    values["gangSchedulers"] = [each for each in schedulers.split(",") if each]
    objects = helm.template(values, namespace=_HOME)
    bound = {each["roleRef"]["name"] for each in objects if each["kind"].endswith("RoleBinding") if is_ours(each)}
    kept = [each for each in objects if each["kind"] == "ServiceAccount" or is_ours(each)]
    kept += [each for each in objects if each["kind"] in ("Role", "ClusterRole") and each["metadata"]["name"] in bound]
    return str(yaml.safe_dump(kept))


def is_ours(binding: Raw) -> bool:
    """Whether an object binds a role to the operator's account."""
    return ACCOUNT in {subject["name"] for subject in binding.get("subjects", ())}


def _create(server: ApiServer, obj: Raw) -> None:
    rbac: Any = client.RbacAuthorizationV1Api(server.api)
    create = {
        "ServiceAccount": server.core.create_namespaced_service_account,
        "Role": rbac.create_namespaced_role,
        "RoleBinding": rbac.create_namespaced_role_binding,
        "ClusterRole": rbac.create_cluster_role,
        "ClusterRoleBinding": rbac.create_cluster_role_binding,
    }[obj["kind"]]
    try:
        create(*filter(None, (obj["metadata"].get("namespace"),)), obj)
    except ApiException as error:
        if error.status != 409:  # another process of the same operator made it
            raise


def _has_rights(server: ApiServer, user: str, role: Raw) -> bool:
    authorization: Any = client.AuthorizationV1Api(server.api)
    return all(
        authorization.create_subject_access_review(
            {"spec": {"user": user, "resourceAttributes": {"namespace": role["metadata"].get("namespace"), **asked}}}
        ).status.allowed
        for asked in _questions(role)
    )


def _questions(role: Raw) -> Iterator[dict[str, str]]:
    """The first right of each rule."""
    for rule in role["rules"]:
        resource, _, subresource = rule["resources"][0].partition("/")
        asked = {"group": rule["apiGroups"][0], "resource": resource, "subresource": subresource}
        yield asked | {"verb": rule["verbs"][0], "name": rule.get("resourceNames", [""])[0]}
