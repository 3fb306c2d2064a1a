"""`helm test`: what the chart makes for it, with which rights, and what the check finds."""

from __future__ import annotations

from typing import Any

import pytest
from contract.test_chart import kind
from internvl_api.validation.check import check_spec
from internvl_api.validation.cluster import InCluster
from internvl_operator.kube.client import ApiError
from internvl_operator.release_check import BY_SCHEMA, BY_WEBHOOK, SPEC, Check, CheckFailed, Cluster, checks
from ivft_cluster import helm

Raw = dict[str, Any]
NAME = "internvl-operator-check"


def hooks(values: Raw | None = None) -> list[Raw]:
    return [each for each in helm.hooks(values) if each["metadata"]["name"] == NAME]


def settings(values: Raw | None = None) -> Check:
    (pod,) = kind(hooks(values), "Pod")
    (only,) = pod["spec"]["containers"]
    return Check.from_env({each["name"]: each["value"] for each in only["env"]})


def test_all_of_it_is_removed_after_the_test_and_can_be_left_out() -> None:
    made = hooks()
    assert sorted(each["kind"] for each in made) == ["Pod", "Role", "RoleBinding", "ServiceAccount"]
    for each in made:
        policy = each["metadata"]["annotations"]["helm.sh/hook-delete-policy"]
        assert policy == "before-hook-creation,hook-succeeded"
    assert hooks({"test": {"enabled": False}}) == []


def test_it_may_do_nothing_but_make_and_remove_its_own_run() -> None:
    (role,) = kind(hooks(), "Role")
    rights = {(verb, tuple(rule.get("resourceNames", ()))) for rule in role["rules"] for verb in rule["verbs"]}
    assert rights == {("create", ()), ("get", (NAME,)), ("delete", (NAME,))}
    assert {each for rule in role["rules"] for each in rule["resources"]} == {"internvlfinetunes"}


@pytest.mark.parametrize(
    ("values", "namespace"),
    [
        ({}, helm.NAMESPACE),
        ({"watchNamespaces": ["team-a", "team-b"]}, "team-a"),
        ({"watchNamespaces": ["team-a", "team-b"], "test": {"namespace": "team-b"}}, "team-b"),
    ],
)
def test_its_run_is_in_a_namespace_that_the_operator_watches(values: Raw, namespace: str) -> None:
    assert settings(values).namespace == namespace
    (role,) = kind(hooks(values), "Role")
    assert role["metadata"]["namespace"] == namespace


def test_values_reach_the_check() -> None:
    found = settings({"webhook": {"enabled": True}, "test": {"run": {"workers": 2}, "timeoutSeconds": 900}})
    assert found == Check(helm.NAMESPACE, NAME, {"workers": 2}, webhook=True, timeout=900)
    assert settings().spec is None


def test_no_selector_of_the_operator_finds_the_pod() -> None:
    (pod,) = kind(hooks(), "Pod")
    for service in kind(helm.template(), "Service"):
        assert not service["spec"]["selector"].items() <= pod["metadata"]["labels"].items()


def test_its_runs_are_what_they_are_meant_to_be() -> None:
    assert check_spec(SPEC, InCluster()).violations == ()
    assert check_spec(SPEC | BY_SCHEMA, InCluster()).violations
    assert check_spec(SPEC | BY_WEBHOOK, InCluster()).violations


class Server:
    """An API server with an operator: `statuses` are those of a run, one for each look; the last one stays."""

    def __init__(self, *statuses: Raw, refuses: tuple[str, ...] = ("workers", "spec.output")) -> None:
        self.statuses, self.refuses, self.runs = list(statuses), refuses, dict[str, Raw]()
        self.created: list[Raw] = []
        self.time = 0.0

    def create(self, run: Raw, *, dry_run: bool = False) -> None:
        spec = run["spec"]
        for field, wrong in (("workers", BY_SCHEMA), ("spec.output", BY_WEBHOOK)):
            if field in self.refuses and wrong.items() <= spec.items():
                raise ApiError(422, "Invalid", f"{field} is invalid")
        if not dry_run:
            self.created.append(spec)
            self.runs[run["metadata"]["name"]] = {"metadata": {"uid": "1"}}

    def find(self, kind: str, namespace: str, name: str) -> Raw | None:
        if name not in self.runs:
            return None
        status = self.statuses.pop(0) if len(self.statuses) > 1 else self.statuses[0]
        return self.runs[name] | {"status": status}

    def delete(self, kind: str, namespace: str, name: str, *, uid: str, force: bool) -> None:
        del self.runs[name]

    def sleep(self, seconds: float) -> None:
        self.time += seconds


def lines(server: Server, check: Check) -> list[str]:
    cluster = Cluster(server, server.sleep, lambda: server.time)  # type: ignore[arg-type]
    return list(checks(check, cluster))


SEEN = {"observedGeneration": 1}
CHECK = Check("team", NAME, webhook=True)


def condition(name: str) -> Raw:
    ready = {"type": "Ready", "status": "False", "reason": "BadData", "message": "row 3", "lastTransitionTime": ""}
    return {**SEEN, "conditions": [{**ready, "type": name, "status": "True"}, ready]}


def test_a_release_that_works() -> None:
    server = Server({"observedGeneration": -1}, SEEN)
    assert lines(server, CHECK)[-2:] == ["the operator takes in a run", "the run is deleted"]
    assert (server.runs, server.created) == ({}, [SPEC])


def test_a_run_is_carried_out_and_deleted() -> None:
    server = Server(SEEN, SEEN, condition("Complete"))
    found = lines(server, Check("team", NAME, spec={"workers": 2}))
    assert any(line.startswith("the run is complete") for line in found)
    assert (server.runs, server.created) == ({}, [SPEC, {"workers": 2}])


@pytest.mark.parametrize(
    ("server", "words"),
    [
        (Server(SEEN, refuses=()), "0 workers is accepted"),
        (Server(SEEN, refuses=("workers",)), "only the webhook refuses"),
        (Server({}), "does it watch this namespace"),
        (Server(SEEN, condition("Failed")), "the run has failed: BadData: row 3"),
        (Server(SEEN), "the run is complete: not after 600 s"),
    ],
)
def test_a_release_that_does_not_work_is_explained_and_nothing_is_left(server: Server, words: str) -> None:
    check = Check("team", NAME, spec={"workers": 2}, webhook=True)
    with pytest.raises(CheckFailed, match=words):
        lines(server, check)
    assert server.runs == {}
