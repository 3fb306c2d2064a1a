"""The administrator's policy in operator and webhook: no pod for what it refuses, and no pod stopped by it."""

from typing import Any

import pytest
from controller.builders import Raw, custom_resource, result
from controller.simulator import SETTINGS, Operator, World
from internvl_api.validation.policy import Policy
from internvl_operator import webhook

HOST = {"volumes": [{"name": "host", "hostPath": {"path": "/"}}]}
NO_LABELS = Policy(labels=())


def governed(world: World, policy: Policy) -> None:
    """Start the operator again, as an administrator does with another policy."""
    world.operator = Operator(world.server, SETTINGS.model_copy(update={"policy": policy}))
    world.operator.settle()


def test_a_refused_run_is_stalled_and_gets_no_pod_until_it_obeys() -> None:
    world = World(podTemplate=HOST)
    stalled = world.server.condition("Stalled")
    assert (stalled["status"], stalled["reason"]) == ("True", "VolumeTypeNotAllowed")
    assert stalled["message"].startswith("spec.podTemplate.volumes: found hostPath, which the policy")
    assert list(world.server.pods) == []
    world.server.edit_spec(podTemplate={})
    world.operator.settle()
    assert world.pods("preflight") == ["run-preflight-0"]


def test_a_tightened_policy_stops_no_running_pod_and_starts_no_further_stage() -> None:
    world = World(podTemplate={"labels": {"team": "a"}})
    world.reach("train")
    governed(world, NO_LABELS)
    stalled = world.server.condition("Stalled")
    assert stalled["reason"] == "LabelNotAllowed"
    assert "2 workers that have started run on" in stalled["message"]
    assert not any("deletionTimestamp" in pod["metadata"] for pod in world.server.pods.values())
    world.end("train", 0, result("train"))
    assert world.pods("publish") == []
    governed(world, Policy())
    assert world.pods("publish") == ["run-publish-0"]


def test_a_tightened_policy_starts_no_further_attempt() -> None:
    world = World(podTemplate={"labels": {"team": "a"}})
    world.reach("train")
    governed(world, NO_LABELS)
    world.end("train", 1)
    world.later(1000)
    assert world.server.attempts("train") == {"1"}
    governed(world, Policy())
    world.later(1000)
    world.collect()
    world.later(1000)
    assert world.server.attempts("train") == {"2"}


def test_a_run_that_the_policy_refuses_can_be_suspended() -> None:
    world = World(podTemplate={"labels": {"team": "a"}})
    world.reach("train")
    governed(world, NO_LABELS)
    world.server.edit_spec(podTemplate={"labels": {"team": "a"}}, runPolicy={"suspend": True})
    world.operator.settle()
    world.collect()
    assert world.status["phase"] == "Suspended"
    assert world.pods("train") == []


def reviewed(new: Raw, old: Raw | None = None, policy: Policy | None = None) -> Any:
    return webhook.review(webhook.Request("7", new, old), webhook.Known(policy or Policy()))["response"]


@pytest.mark.parametrize(("template", "policy"), [(HOST, None), ({"labels": {"team": "a"}}, NO_LABELS)])
def test_the_webhook_says_what_the_operator_says(template: Raw, policy: Policy | None) -> None:
    world = World(podTemplate=template)
    governed(world, policy or Policy())
    response = reviewed(custom_resource(podTemplate=template), policy=policy)
    assert response["allowed"] is False
    assert response["status"]["message"] == world.server.condition("Stalled")["message"]


def test_the_webhook_lets_a_run_of_before_the_policy_be_suspended() -> None:
    before = custom_resource(podTemplate=HOST)
    assert reviewed(custom_resource(podTemplate=HOST, runPolicy={"suspend": True}), before)["allowed"] is True
    more = {"volumes": [*HOST["volumes"], {"name": "more", "nfs": {"server": "a", "path": "/"}}]}
    assert reviewed(custom_resource(podTemplate=more), before)["allowed"] is False
