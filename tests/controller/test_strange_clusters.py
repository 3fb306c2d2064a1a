"""Clusters that are not as they should be: a clock that leaps, two operators, changed labels, finalizers."""

from datetime import timedelta

import pytest
from controller.builders import CONFIG, a_run, at, custom_resource, member
from controller.fake_server import Server
from controller.simulator import SETTINGS, Operator, World
from internvl_operator.core.observe import Observed
from internvl_operator.core.policies.refused_child import refusal_reason
from internvl_operator.core.reconcile import reconcile
from internvl_operator.settings import Settings

YEAR = timedelta(days=365)


def test_a_retry_time_that_a_wrong_clock_wrote_does_not_hold_a_run() -> None:
    world = World()
    world.pass_stage("preflight")
    world.server.now += YEAR
    for _ in range(2):
        world.run("train")
        world.end("train", 1, "boom")
        world.collect()
    assert world.status["retryAt"].startswith("2027-")
    world.server.now -= YEAR
    world.operator.settle()
    assert world.pods("train") == ["run-train-0", "run-train-1"]


def test_two_operators_with_different_settings_do_not_replace_each_others_pods_in_a_loop() -> None:
    server = Server()
    server.create(custom_resource())
    images = {"INTERNVL_OPERATOR_TRAINER_IMAGE": "other:2", "INTERNVL_OPERATOR_NETWORK_POLICY_PEERS": "[]"}
    operators = Operator(server, SETTINGS), Operator(server, Settings.from_env(images))
    for _ in range(10):
        for operator in operators:
            operator.hear()
            operator.run_pass()
    assert [write for write in server.writes if write[1] == "Pod"] == [("apply", "Pod", "run-preflight-0")]
    server.set_pod("run-preflight-0", {"phase": "Running"})
    server.now += timedelta(seconds=60)
    for operator in operators:
        operator.hear()
        operator.run_pass()
    assert server.status()["attempt"] == 1


def test_a_pod_whose_labels_somebody_changed_is_named() -> None:
    world = World()
    world.reach("train")
    changed = {"internvl.dev/attempt": "x"}
    world.server.change("Pod", "run-train-1", lambda raw: raw["metadata"]["labels"].update(changed))
    world.operator.settle()
    world.collect()
    told = world.server.condition("Stalled")
    assert told["reason"] == "NameTaken"
    assert "Pod run-train-1 belongs to the run, but somebody has changed its labels" in told["message"]
    assert "kubectl delete pod -n team run-train-1" in told["message"]
    world.server.remove("Pod", "run-train-1")
    world.later(60)
    world.collect()
    world.later(60)
    assert world.pods("train") == ["run-train-0", "run-train-1"]


def test_finalizers_that_keep_a_pod_are_named() -> None:
    run = a_run(status={"stage": "train", "attempt": 2, "stages": [{"name": "preflight", "state": "Succeeded"}]})
    kept = member(1, attempt=1, deletion_timestamp=at(-3600), finalizers=("example.org/keep",), phase="Failed")
    plan = reconcile(run, Observed(pods=(kept,)), at(0), CONFIG)
    assert plan.status is not None
    (told,) = [each.message for each in plan.status.conditions if each.type == "Reconciling"]
    assert "the finalizers example.org/keep keep pod run-train-1: whoever set them has to remove them" in told


@pytest.mark.parametrize(
    ("message", "field"),
    [
        ('error looking up service account team/x: serviceaccount "x" not found', "serviceAccountName"),
        ("no PriorityClass with name high was found", "priorityClassName"),
        ('pod rejected: RuntimeClass "nvidia" not found', "runtimeClassName"),
    ],
)
def test_an_object_that_a_pod_names_and_that_is_missing_is_told_with_its_field(message: str, field: str) -> None:
    reason, words = refusal_reason("Pod run-train-0", "train", "team", 403, "Forbidden", message)
    assert reason == "ForbiddenChild"
    assert words.endswith(f"{message}; create that object, or correct spec.podTemplate.{field}")
