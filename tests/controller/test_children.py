"""Children that are missing, changed, refused or owned by an earlier run."""

import pytest
from controller.builders import custom_resource, terminated, waiting
from controller.fake_server import Server, names_of
from controller.simulator import Operator, World
from internvl_api.constants import KIND
from internvl_operator.kube.client import ApiError


def test_a_missing_secret_is_named_and_the_run_goes_on_when_it_appears() -> None:
    world = World()
    world.server.set_pod("run-preflight-0", waiting("CreateContainerConfigError", 'secret "s3-credentials" not found'))
    world.operator.settle()
    stalled = world.server.condition("Stalled")
    assert (stalled["status"], stalled["reason"]) == ("True", "SecretMissing")
    assert stalled["message"].startswith(
        "spec.secrets.objectStorage: found no Secret 's3-credentials' in namespace 'team'"
    )
    world.server.set_pod("run-preflight-0", {"phase": "Running", "containerStatuses": []})
    world.operator.settle()
    assert world.status["phase"] == "Running"
    assert world.server.attempts("preflight") == {"1"}


@pytest.mark.parametrize(
    ("kind", "name"), [("ConfigMap", "ivft-run"), ("Service", "ivft-run"), ("NetworkPolicy", "ivft-run")]
)
def test_what_somebody_deleted_is_made_again(kind: str, name: str) -> None:
    world = World()
    world.reach("train")
    world.server.remove(kind, name)
    world.operator.settle()
    assert name in world.server.objects[kind]
    assert world.status["attempt"] == 1


def test_what_somebody_changed_is_mended() -> None:
    world = World()
    world.reach("train")
    world.server.change("Service", "ivft-run", lambda raw: raw["spec"].update(selector={"app": "other"}))
    world.operator.settle()
    assert world.server.objects["Service"]["ivft-run"]["spec"]["selector"].keys() == {"internvl.dev/job-uid"}


def test_a_run_of_a_name_that_is_still_held_by_an_earlier_run_waits_for_its_pods() -> None:
    world = World()
    world.reach("train")
    old = {name: dict(raw) for name, raw in world.server.pods.items()}
    del world.server.objects[KIND]["run"]  # and the garbage collector has not come yet
    fresh = custom_resource()
    fresh["metadata"]["uid"] = "another"
    world.server.create(fresh)
    world.operator = Operator(world.server)
    world.operator.settle()
    assert set(world.server.pods) == set(old)
    assert world.server.condition("Reconciling")["reason"] == "WaitingForOldPods"
    for kind in ("Pod", "Service", "ConfigMap", "NetworkPolicy"):
        for name in list(world.server.objects[kind]):
            world.server.remove(kind, name)
    world.operator.settle()
    assert world.pods("preflight") == ["run-preflight-0"]


def test_a_pod_of_an_earlier_run_on_a_dead_node_is_deleted_by_force_in_the_end() -> None:
    world = World()
    world.reach("train")
    dead = world.server.pods["run-train-1"]
    world.server.delete("Pod", "team", "run-train-1", uid=dead["metadata"]["uid"], force=False)
    dead = dict(world.server.pods["run-train-1"])
    world.server.remove(KIND, "run")
    world.server.objects["Pod"]["run-train-1"] = dead  # its kubelet does not answer
    fresh = custom_resource()
    fresh["metadata"]["uid"] = "another"
    world.server.create(fresh)
    world.operator = Operator(world.server)
    world.operator.settle()
    world.later(120 + 59)  # grace period and almost the bound
    assert world.pods("train") == ["run-train-1"]
    assert world.server.condition("Reconciling")["reason"] == "WaitingForOldPods"
    world.later(1)
    assert world.pods("train") == []
    assert world.pods("preflight") == ["run-preflight-0"]


def test_the_status_of_an_earlier_run_is_not_the_next_ones_of_that_name() -> None:
    world = World()
    world.reach("train")
    for name in world.pods("train"):
        world.server.set_pod(name, {"phase": "Failed", **terminated(1, finished=world.server.now)})
    world.operator.hear("Pod")  # and not yet that the run is another one
    world.server.remove(KIND, "run")
    fresh = custom_resource()
    fresh["metadata"]["uid"] = "another"
    world.server.create(fresh)
    world.operator.run_pass()
    assert world.server.status() == {}
    world.operator.settle()
    assert (world.status["stage"], world.status["attempt"]) == ("preflight", 1)


def test_what_the_api_server_refuses_is_told_in_its_own_words_and_tried_again() -> None:
    server = Server()
    refusal = ApiError(403, "Forbidden", 'pods "run-preflight-0" is forbidden: exceeded quota: gpus')
    server.refuse = lambda obj: refusal if obj["kind"] == "Pod" else None
    server.create(custom_resource())
    operator = Operator(server)
    for _ in range(3):
        operator.hear()
        operator.run_pass()
    stalled = server.condition("Stalled")
    assert (stalled["status"], stalled["reason"]) == ("True", "QuotaExceeded")
    assert "exceeded quota: gpus" in stalled["message"]
    assert [write for write in server.writes if write[0] == "status"] == [("status", KIND, "run")]
    server.refuse = lambda obj: None
    operator.settle()
    assert server.condition("Stalled")["status"] == "False"
    assert list(names_of(server, "preflight")) == ["run-preflight-0"]


def test_a_new_run_whose_children_fail_is_in_its_first_attempt() -> None:
    server = Server()
    failure = ApiError(500, "InternalError", "etcd is slow")
    server.refuse = lambda obj: failure if obj["kind"] == "ConfigMap" else None
    server.create(custom_resource())
    operator = Operator(server)
    for _ in range(5):
        operator.hear()
        operator.run_pass()
    assert server.condition("Stalled")["reason"] == "ApiServerError"
    assert server.status()["attempt"] == 1
